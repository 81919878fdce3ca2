"""Every normalizer there is, ready to be called: contract tests run over this list, so list a new one here."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxbn
from jaxbn import variants

SHAPE = (8, 3, 4)  # [batch, positions, features], for all of them.
KEY = jax.random.key(0)
# The lowest level of optimization compiles fastest, and these tests hardly do anything but compile.
QUICK = {"xla_backend_optimization_level": 0}


class Case(NamedTuple):
    """One normalizer, and what has to be known to call it.

    Attributes:
      build: build(axis_name, **options) -> Normalizer; axis_name is None or the name over which the batch is sharded,
        options are further hyperparameters.
      arguments: further arguments of apply. Arrays that are not scalars have one entry an example.
      splits: whether shards that share statistics make up the whole batch.
      takes_groups: whether `axis_index_groups` is among its options.
      differentiates: whether the gradient is that of the function; False where one is held back by design.
    """

    build: Callable[[Any], jaxbn.Normalizer]
    arguments: Mapping[str, Any] = {}
    splits: bool = True
    takes_groups: bool = True
    differentiates: bool = True


def _alone(build, **options):
    """One whose statistics are each example's own: a sharded batch needs no axis name."""
    return Case(lambda axis_name, **more: build(**options | more), takes_groups=False)


def _shared(build, **options):
    return lambda axis_name, **more: build(axis_name=axis_name, **options | more)


def _around(wrap):
    return lambda axis_name, **more: wrap(jaxbn.batch_norm(axis_name=axis_name, **more))


CLASSES = np.array([0, 2, 1, 0, 2, 2, 1, 0], np.int32)
GRAPHS = np.array([0, 1, 0, 2, 2, 1, 2, 0], np.int32)
DOMAINS = np.array([0, 1, 0, 1, 0, 1, 0, 1], np.int32)
VECTORS = np.random.default_rng(1).normal(size=(8, 5)).astype(np.float32)
_SMOOTH = {"activation": jnp.tanh}  # Finite differences say what the derivative is.

CASES: dict[str, Case] = {
    "batch_norm": Case(_shared(jaxbn.batch_norm)),
    "batch_norm, debias": Case(_shared(jaxbn.batch_norm, debias=True, activation=jnp.tanh)),
    "batch_norm, cumulative": Case(_shared(jaxbn.batch_norm, decay=None, use_scale=False)),
    "batch_norm, other axis": Case(_shared(jaxbn.batch_norm, feature_axis=1, unbiased=True, use_bias=False)),
    "identity": _alone(jaxbn.identity),
    "ghost_batch_norm": Case(_shared(variants.ghost_batch_norm, group_size=2), takes_groups=False),
    "ghost_batch_norm, shuffled": Case(
        _shared(variants.ghost_batch_norm, group_size=2, shuffle=True), {"rng": KEY}, takes_groups=False
    ),
    "batch_renorm": Case(_shared(variants.batch_renorm, r_max=1.1, d_max=0.2), differentiates=False),
    "batch_renorm, the paper's limits": Case(_shared(variants.batch_renorm, decay=None, **_SMOOTH)),
    "virtual_batch_norm": Case(
        _shared(variants.virtual_batch_norm, reference_size=3), splits=False, takes_groups=False
    ),
    "whitening_norm": Case(_shared(variants.whitening_norm, group_size=2)),
    "whitening_norm, Newton": Case(_shared(variants.whitening_norm, inverse_root=variants.newton_inverse_square_root)),
    "conditional_batch_norm, classes": Case(
        _shared(variants.conditional_batch_norm, num_classes=3), {"condition": CLASSES}
    ),
    "conditional_batch_norm, vectors": Case(
        _shared(variants.conditional_batch_norm, condition_size=5, kernel_init=jax.nn.initializers.normal()),
        {"condition": VECTORS},
    ),
    "split_batch_norm": Case(_shared(variants.split_batch_norm), {"domain": DOMAINS}),
    "split_batch_norm, one domain": Case(_shared(variants.split_batch_norm, share_affine=True), {"domain": 1}),
    "stochastic_batch_norm": Case(_shared(variants.stochastic_batch_norm, bank_size=2)),
    "stochastic_batch_norm, drawn": Case(_shared(variants.stochastic_batch_norm, bank_size=2), {"rng": KEY}),
    "mean_only_batch_norm": Case(_shared(variants.mean_only_batch_norm)),
    "recurrent_batch_norm": Case(_shared(variants.recurrent_batch_norm, max_length=3), {"step": np.int32(1)}),
    "running_norm": Case(_shared(variants.running_norm), takes_groups=False, differentiates=False),
    "graph_norm": Case(_shared(variants.graph_norm, num_segments=4), {"segment_ids": GRAPHS}, takes_groups=False),
    "layer_norm": _alone(variants.layer_norm),
    "layer_norm, positions too": _alone(variants.layer_norm, axis=(1, 2), feature_axis=-1),
    "instance_norm": _alone(variants.instance_norm),
    "group_norm": _alone(variants.group_norm, num_groups=2, **_SMOOTH),
    "rms_norm": _alone(variants.rms_norm),
    "filter_response_norm": _alone(variants.filter_response_norm, learn_epsilon=True),
    "noisy": Case(_around(variants.noisy), {"rng": KEY}, splits=False),
    "frozen": Case(_around(variants.frozen)),
}


# The name before the comma is listed already, so that these cost time rather than find much.
AGAIN = {
    "batch_norm, cumulative",
    "batch_norm, other axis",
    "batch_renorm, the paper's limits",
    "split_batch_norm, one domain",
    "stochastic_batch_norm, drawn",
    "ghost_batch_norm, shuffled",
    "layer_norm, positions too",
    "whitening_norm, Newton",
    "conditional_batch_norm, vectors",
}


class Ready(NamedTuple):
    """A normalizer with variables in the midst of training, its two modes compiled, and which were traced so far."""

    norm: jaxbn.Normalizer
    variables: dict
    arguments: Mapping[str, Any]
    train: Callable[..., tuple[jax.Array, dict]]
    evaluate: Callable[..., tuple[jax.Array, dict]]
    traces: list[str]


def draw(seed: int = 0, shape: tuple[int, ...] = SHAPE, offset: float = 3.0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(offset, 2.0, shape), jnp.float32)


@functools.cache
def ready(name: str) -> Ready:
    case = CASES[name]
    norm, traces = case.build(None), []

    def compiled(train):
        def apply(variables, x, **arguments):
            traces.append("train" if train else "evaluate")
            return norm.apply(variables, x, train=train, **arguments)

        return jax.jit(apply, compiler_options=QUICK)

    return Ready(norm, in_training(norm, draw()), case.arguments, compiled(True), compiled(False), traces)


def in_training(norm: jaxbn.Normalizer, x: jax.Array) -> dict:
    """Variables off their initial values: random scales and biases, positive ones, and statistics that fit x."""
    variables = norm.init(KEY, x)
    rng = np.random.default_rng(2)

    def moved(path, v):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if jnp.issubdtype(v.dtype, jnp.integer) or "whitening" in name:
            return v
        return v + jnp.asarray(rng.uniform(0.1, 0.9, v.shape), v.dtype)

    return jax.tree_util.tree_map_with_path(moved, variables)
