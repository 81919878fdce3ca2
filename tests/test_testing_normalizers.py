"""Every normalizer of the library against the laws that apply to it; a new one is tested by being listed."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from normalizers import CASES

import jaxbn
import jaxbn.linen
import jaxbn.nnx
import jaxbn.testing as laws
from jaxbn import variants

# Laws of state and modes, for normalizers whose output is not standardized.
STATE = (
    laws.statistics_keep_structure,
    laws.switches_are_independent,
    laws.running_statistics_get_no_gradient,
    laws.updated_statistics_are_constants,
    laws.eval_treats_examples_independently,
    laws.mask_silences,
    laws.no_retrace,
)
# A few of each kind, for every run; the whole list is for `pytest -m slow`.
QUICK = (
    laws.gradient_matches_float64,
    laws.running_closed_form,
    laws.statistics_keep_structure,
    laws.eval_treats_examples_independently,
    laws.evaluation_closed_form,
)


class Listed(NamedTuple):
    """A normalizer, what has to be said of it, and which laws do not apply for a reason that stands here."""

    norm: Any
    options: Mapping[str, Any] = {}
    only: Sequence[laws.Law] | None = None
    excused: Mapping[str, str] = {}


def _sharded(build, **options):
    """A Normalizer with its version for shards, for factories that hide axis_name in **options."""
    return build(**options), {"sharded": build(axis_name=laws.AXIS, **options)}


def _listed(build, *, given=None, excused=None, arguments=None, **options):
    norm, found = _sharded(build, **(given or {}))
    found |= options | ({} if arguments is None else {"arguments": arguments})
    return Listed(norm, found, excused=excused or {})


def first_class(shape):
    return {"condition": np.zeros(shape[0], np.int32)}


def one_graph(shape):
    return {"segment_ids": np.zeros(shape[0], np.int32)}


def vectors(shape):
    return {"condition": np.ones((shape[0], 5), np.float32)}


# No mean is taken out, so only the scale drops out.
SQUARES = (
    laws.mask_silences,
    laws.scale_invariance,
    laws.permutation_equivariance,
    laws.sets_are_independent,
    laws.forward_equals_reverse,
)

LISTED: dict[str, Listed] = {
    "batch_norm": Listed(jaxbn.batch_norm),
    "batch_norm, debias": Listed(functools.partial(jaxbn.batch_norm, debias=True)),
    "batch_norm, cumulative": Listed(functools.partial(jaxbn.batch_norm, decay=None, use_scale=False)),
    "batch_norm, unbiased": Listed(functools.partial(jaxbn.batch_norm, unbiased=True, use_bias=False, decay=0.5)),
    "batch_norm, other axis": Listed(jaxbn.batch_norm(feature_axis=1), {"feature_axis": 1}),
    "batch_norm, large epsilon": Listed(jaxbn.batch_norm(epsilon=0.5)),
    "linen.BatchNorm": Listed(jaxbn.linen.BatchNorm),
    "nnx.BatchNorm": Listed(jaxbn.nnx.BatchNorm),
    "linen.Norm": Listed(jaxbn.linen.Norm(jaxbn.batch_norm())),
    "ghost_batch_norm": Listed(
        variants.ghost_batch_norm(group_size=2),
        {"scope": laws.ghost(2)},
        excused={
            "permutation_equivariance": "which examples share a group depends on their order",
        },
    ),
    "ghost_batch_norm, shuffled": Listed(
        variants.ghost_batch_norm(group_size=2, shuffle=True),
        {"arguments": {"rng": jax.random.key(0)}},
        only=STATE,
    ),
    "batch_renorm, the paper's limits": _listed(variants.batch_renorm),
    "batch_renorm": Listed(variants.batch_renorm(r_max=1.1, d_max=0.2), only=STATE),
    "virtual_batch_norm": Listed(variants.virtual_batch_norm(reference_size=2), only=STATE),
    "whitening_norm, one by one": _listed(
        variants.whitening_norm,
        given={"group_size": 1},
        excused={
            "mask_per_feature": "refused: a covariance needs the same examples of all features",
            "empty_mask_keeps_statistics": "refused: a covariance needs the same examples of all features",
            "running_closed_form": "the whitening matrix is averaged, not the variance",
        },
    ),
    "whitening_norm": Listed(variants.whitening_norm(group_size=2), only=STATE),
    "whitening_norm, Newton": Listed(
        variants.whitening_norm(inverse_root=variants.newton_inverse_square_root), only=STATE
    ),
    "conditional_batch_norm, classes": _listed(
        variants.conditional_batch_norm, given={"num_classes": 3}, arguments=first_class
    ),
    "conditional_batch_norm, vectors": _listed(
        variants.conditional_batch_norm, given={"condition_size": 5}, arguments=vectors
    ),
    "split_batch_norm": _listed(variants.split_batch_norm, arguments={"domain": 0}),
    "split_batch_norm, one domain": _listed(
        variants.split_batch_norm, given={"share_affine": True}, arguments={"domain": 1}
    ),
    "stochastic_batch_norm": _listed(variants.stochastic_batch_norm, given={"bank_size": 2}),
    "stochastic_batch_norm, drawn": Listed(
        variants.stochastic_batch_norm(bank_size=2), {"arguments": {"rng": jax.random.key(0)}}, only=STATE
    ),
    "mean_only_batch_norm": Listed(variants.mean_only_batch_norm(), only=STATE),
    "recurrent_batch_norm": _listed(
        variants.recurrent_batch_norm, given={"max_length": 3}, arguments={"step": np.int32(1)}
    ),
    "running_norm": Listed(variants.running_norm(), only=STATE),
    "graph_norm": Listed(variants.graph_norm(1), {"arguments": one_graph, "scope": laws.BATCH}),
    "layer_norm": Listed(variants.layer_norm(), {"scope": laws.LAYER, "features": 4}),
    "instance_norm": Listed(variants.instance_norm(), {"scope": laws.INSTANCE, "ranks": (4,)}),
    "group_norm": Listed(variants.group_norm(num_groups=2), {"scope": laws.group(2), "features": 4}),
    "rms_norm": Listed(variants.rms_norm(), {"scope": laws.LAYER, "features": 4}, only=SQUARES),
    "filter_response_norm": Listed(
        variants.filter_response_norm(use_threshold=False), {"scope": laws.INSTANCE, "ranks": (4,)}, only=SQUARES
    ),
    "noisy": Listed(variants.noisy(jaxbn.batch_norm()), {"arguments": {"rng": jax.random.key(0)}}, only=STATE),
    "frozen": Listed(variants.frozen(jaxbn.batch_norm(), freeze_params=True), only=STATE),
}

# Of `normalizers.CASES`, which the contract tests run over, those that the laws cannot be put to.
UNLISTED = {
    "identity": "normalizes nothing",
    "batch_norm, positions too": "the laws' inputs have one feature axis",
    "layer_norm, positions too": "the laws' inputs of rank 2 have no positions",
}


def test_every_normalizer_is_listed():
    assert set(CASES) <= set(LISTED) | set(UNLISTED)


@pytest.mark.slow
def test_batch_norm_keeps_every_law():
    report = laws.check(jaxbn.batch_norm, strict=True)
    assert [outcome.status for outcome in report.outcomes] == ["holds"] * len(laws.LAWS)


def test_first_batch_of_a_cumulative_average_replaces_what_was_there():
    laws.check(jaxbn.batch_norm(decay=None), [laws.evaluation_closed_form], ranks=(2,))


@pytest.mark.parametrize("name", [name for name in LISTED if name != "batch_norm"])
def test_normalizer_keeps_a_law_of_each_kind(name):
    norm, options, only, excused = LISTED[name]
    chosen = [law for law in QUICK if only is None or law in only]
    # Without images, whose programs would be compiled for a law or two.
    ranks = options.get("ranks", (2,))
    laws.check(norm, chosen, strict=True, excused=excused, examples=8, **{**options, "ranks": ranks})


@pytest.mark.slow
@pytest.mark.parametrize("name", LISTED)
def test_normalizer_keeps_every_law(name):
    norm, options, only, excused = LISTED[name]
    laws.check(norm, only, strict=True, excused=excused, **options)
