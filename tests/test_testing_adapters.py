"""Modules of each library as subjects: what is read off them, and what the laws find in layers as shipped."""

import functools
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
import jaxbn.testing as laws
import jaxbn.variants
from jaxbn.testing._signatures import defaults, parameters_of, required
from jaxbn.testing.adapters import subject_of

# Enough for the findings here, each of which is far beyond its bound.
QUICK = {"examples": 8, "shrink": False}


@pytest.fixture(autouse=True)
def rank_promotion():
    """Layers of other libraries promote ranks."""
    with jax.numpy_rank_promotion("allow"):
        yield


def broken(layer, names):
    report = laws.survey(layer, names, **QUICK)
    assert all(outcome.status != "n/a" for outcome in report.outcomes)
    return {outcome.law.name for outcome in report.broken}


def stated(subject):
    return subject.epsilon, subject.decay


# ---- what is read


@pytest.mark.parametrize("layer", [nn.BatchNorm, jaxbn.linen.BatchNorm, nnx.BatchNorm, jaxbn.nnx.BatchNorm])
def test_flax_layers_state_their_hyperparameters_and_have_all_versions(layer):
    subject = subject_of(functools.partial(layer, epsilon=1e-3, momentum=0.9))
    assert stated(subject) == (1e-3, 0.9)
    assert not {"where", "shards", "channels first", "running", "scale", "bias"} & set(subject.missing)


def test_linen_instance_is_taken_as_it_is():
    subject = subject_of(nn.BatchNorm(epsilon=0.1, use_scale=False))
    assert subject.epsilon == 0.1
    assert "scale" in subject.missing


def test_linen_layer_without_statistics():
    subject = subject_of(nn.LayerNorm(), scope=laws.LAYER, features=4)
    assert {"running", "batch"} <= set(subject.missing)
    laws.check(subject, [laws.unit_variance, laws.shift_invariance], examples=8)


def test_nnx_instance_is_refused_with_the_remedy():
    with pytest.raises(TypeError, match="pass its class"):
        subject_of(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))


def test_factory_states_hyperparameters_and_has_all_versions():
    subject = subject_of(functools.partial(jaxbn.batch_norm, decay=0.7))
    assert (*stated(subject), subject.rule) == (1e-5, 0.7, "exponential")
    assert subject.missing.keys() <= {"devices"}


def test_feature_axis_beside_axis_is_no_layout():
    assert "channels first" in subject_of(jaxbn.variants.layer_norm, scope=laws.LAYER, features=4).missing


def test_factory_of_something_else_is_refused():
    with pytest.raises(TypeError, match=r"returned int; expected a Normalizer"):
        subject_of(lambda: 3)


def test_class_with_unknown_required_arguments_is_refused():
    class Mine(nnx.Module):
        def __init__(self, depth):
            self.depth = depth

    with pytest.raises(TypeError, match="Mine needs depth"):
        subject_of(Mine)


class FieldMode(nn.Module):
    """A right layer whose mode is a field, as in many code bases."""

    use_running_average: bool = False

    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=self.use_running_average, momentum=0.9)(x)


class AttributeMode(nnx.Module):
    """A right layer whose mode is what `.train()` and `.eval()` set."""

    def __init__(self, num_features, *, rngs):
        self.inside = nnx.BatchNorm(num_features, momentum=0.9, rngs=rngs)

    def __call__(self, x):
        return self.inside(x)


class NoMode(nn.Module):
    """Nothing switches it to test mode."""

    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(x)


# Those that read the running statistics, by way of evaluation.
IN_TEST_MODE = ["running_closed_form", "eval_is_affine", "eval_treats_examples_independently", "folding_keeps_function"]


@pytest.mark.parametrize("layer", [FieldMode, FieldMode(), AttributeMode], ids=["field", "instance", "attribute"])
def test_mode_is_found_where_the_call_does_not_take_it(layer):
    assert broken(layer, IN_TEST_MODE) == set()


def test_layer_that_cannot_be_switched_to_test_mode_is_not_condemned_for_it():
    report = laws.survey(NoMode, [*IN_TEST_MODE, "zero_mean"], **QUICK)
    assert [outcome.status for outcome in report.outcomes] == ["n/a"] * 4 + ["holds"]
    assert "it could not be switched to test mode" in report.facts
    assert all("could not be switched to test mode" in outcome.detail for outcome in report.outcomes[:4])


def test_subject_can_be_changed_by_options():
    subject = subject_of(jaxbn.batch_norm)
    assert subject_of(subject, epsilon=0.5).epsilon == 0.5
    assert subject.epsilon == 1e-5


def test_signatures_see_through_metaclasses_and_partials():
    layer = functools.partial(nnx.BatchNorm, epsilon=0.5)
    assert required(layer) == ["num_features", "rngs"]
    assert defaults(layer)["epsilon"] == 0.5
    assert "momentum" in parameters_of(layer)


def test_adapted_module_computes_what_the_module_does():
    x = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
    module = nn.BatchNorm(use_running_average=False)
    expected, moved = module.apply(module.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    for layer in (nn.BatchNorm, nnx.BatchNorm):
        y, batch_stats = subject_of(layer).run(x)
        np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(batch_stats["mean"], moved["batch_stats"]["mean"], rtol=1e-6)


# ---- known findings: should a library mend one, its line here goes


def test_flax_cancels_far_from_zero_unless_told_otherwise():
    assert broken(nn.BatchNorm, ["backward_stable"]) == {"backward_stable"}
    assert broken(functools.partial(nn.BatchNorm, use_fast_variance=False), ["backward_stable"]) == set()


def test_flax_averages_masked_shards_as_if_their_counts_were_equal():
    found = broken(nn.BatchNorm, ["axis_name_with_unequal_masks", "axis_name_equals_concatenation"])
    assert found == {"axis_name_with_unequal_masks"}


def test_flax_loses_the_statistics_of_a_feature_that_saw_nothing():
    assert broken(nnx.BatchNorm, ["empty_mask_keeps_statistics"]) == {"empty_mask_keeps_statistics"}


def test_haiku_is_read_and_gives_nan():
    hk = pytest.importorskip("haiku", reason="dm-haiku is not installed; the table in the README needs it")
    subject = subject_of(hk.BatchNorm)
    assert stated(subject) == (1e-5, 0.99)
    assert subject.running.kind == "debiased"
    assert broken(hk.BatchNorm, ["far_constant_feature", "layouts_agree", "unit_variance"]) == {"far_constant_feature"}


def test_equinox_is_read_and_does_not_keep_its_closed_form():
    eqx = pytest.importorskip("equinox", reason="equinox is not installed; the table in the README needs it")
    layer = functools.partial(eqx.nn.BatchNorm, mode="batch")
    assert stated(subject_of(layer)) == (1e-5, 0.99)
    assert broken(layer, ["running_closed_form", "unit_variance"]) == {"running_closed_form"}


def test_torch_is_read_by_callback():
    torch = pytest.importorskip("torch", reason="torch is not installed; the table in the README needs it")
    subject = subject_of(torch.nn.BatchNorm1d)
    assert (subject.epsilon, round(subject.decay, 6), subject.unbiased) == (1e-5, 0.9, True)
    assert broken(torch.nn.BatchNorm1d, ["running_closed_form", "unit_variance", "gradient_matches_float64"]) == set()


@pytest.mark.parametrize(
    ("package", "layer", "arguments", "scope"),
    [
        ("torch", "nn.LayerNorm", {}, "layer"),
        ("torch", "nn.LayerNorm", {"normalized_shape": 2}, "layer"),
        ("torch", "nn.GroupNorm", {"num_groups": 2}, "group:2"),
        ("torch", "nn.InstanceNorm2d", {}, "instance"),
        ("equinox", "nn.LayerNorm", {}, "layer"),
        ("equinox", "nn.LayerNorm", {"shape": 2}, "layer"),
        ("equinox", "nn.GroupNorm", {"groups": 2}, "group:2"),
        ("haiku", "LayerNorm", {"axis": -1}, "layer"),
        ("haiku", "InstanceNorm", {}, "instance"),
    ],
)
def test_norm_of_another_library_runs_in_its_own_scope(package, layer, arguments, scope):
    library = pytest.importorskip(package, reason=f"{package} is not installed; the table in the README needs it")
    subject = subject_of(functools.partial(operator.attrgetter(layer)(library), **arguments))
    assert subject.scope.name == scope
    few = ["zero_mean", "unit_variance", "shift_invariance", "gradient_matches_float64"]
    assert not laws.survey(subject, few, **QUICK).broken


def test_torch_runs_on_narrow_inputs():
    torch = pytest.importorskip("torch", reason="torch is not installed; the table in the README needs it")
    subject = subject_of(torch.nn.BatchNorm1d)
    y, _ = subject.run(jnp.arange(8.0).reshape(4, 2).astype(jnp.bfloat16))
    np.testing.assert_allclose(y[:, 0], [-1.34, -0.447, 0.447, 1.34], atol=0.01)
