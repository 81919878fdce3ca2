"""What the laws stand on: the oracle, scopes, bounds, strategies, and what is read off a layer's outputs."""

import pathlib
import re
import subprocess
import sys

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from textbook import Textbook, factory

import jaxbn
import jaxbn.testing as laws
from jaxbn.testing import LawResult, Report, agree
from jaxbn.testing import _bounds as bounds
from jaxbn.testing import _oracle as oracle
from jaxbn.testing._measure import measure_epsilon
from jaxbn.testing._scope import SCOPES, ghost, group

ALL_SCOPES = [*SCOPES.values(), ghost(2), group(2)]
scopes = pytest.mark.parametrize("scope", ALL_SCOPES, ids=lambda scope: scope.name)
# Two float64 programs for the same numbers.
FLOAT64 = {"rtol": 1e-12, "atol": 1e-13}


@pytest.fixture
def rng():
    """A generator of this test alone."""
    return np.random.default_rng(0)


# ---- scopes


@scopes
@pytest.mark.parametrize("shape", [(4, 6), (4, 2, 3, 6)])
def test_joining_undoes_splitting(scope, shape, rng):
    x = rng.normal(size=shape)
    np.testing.assert_array_equal(scope.join(scope.split(x), shape), x)


@pytest.mark.parametrize(
    ("scope", "axes"),
    [("batch", (0, 1, 2)), ("layer", (3,)), ("instance", (1, 2)), ("example", (1, 2, 3))],
)
def test_scope_is_the_mean_over_its_axes(scope, axes, rng):
    x = rng.normal(size=(4, 2, 3, 6))
    sets = SCOPES[scope].split(x)
    np.testing.assert_allclose(sets.mean(0), x.mean(axes).reshape(-1), **FLOAT64)


def test_group_scope_is_runs_of_features_within_an_example(rng):
    x = rng.normal(size=(4, 2, 3, 6))
    expected = x.reshape(4, 2, 3, 2, 3).mean((1, 2, 4)).reshape(-1)
    np.testing.assert_allclose(group(2).split(x).mean(0), expected, **FLOAT64)


def test_ghost_scope_is_runs_of_examples(rng):
    x = rng.normal(size=(4, 2, 3, 6))
    expected = x.reshape(2, 2, 2, 3, 6).mean((1, 2, 3)).reshape(-1)
    np.testing.assert_allclose(ghost(2).split(x).mean(0), expected, **FLOAT64)


# ---- oracle


def test_weights_of_the_oracle_repeat_values(rng):
    x, weights = rng.normal(size=(4, 2)), np.array([2, 1, 1, 4])
    w = np.broadcast_to(weights[:, None], x.shape)
    repeated = oracle.normalize(np.repeat(x, weights, axis=0), laws.BATCH, 0.1)
    np.testing.assert_allclose(np.repeat(oracle.normalize(x, laws.BATCH, 0.1, w), weights, 0), repeated, **FLOAT64)


@pytest.mark.parametrize("scope", [laws.BATCH, laws.LAYER, ghost(2)], ids=lambda scope: scope.name)
def test_gradient_of_the_oracle_is_that_of_autodiff(scope, rng):
    x, dy = rng.normal(size=(4, 6)), rng.normal(size=(4, 6))
    sets = scope.split(np.arange(24).reshape(4, 6)).astype(int)
    with jax.enable_x64(True):

        def loss(flat):
            v = flat[sets]
            xhat = (v - v.mean(0, keepdims=True)) / jnp.sqrt(v.var(0, keepdims=True) + 0.1)
            return jnp.sum(xhat * scope.split(dy))

        autodiff = np.asarray(jax.grad(loss)(jnp.asarray(x.reshape(-1)))).reshape(4, 6)
    np.testing.assert_allclose(oracle.gradient(x, dy, scope, 0.1), autodiff, **FLOAT64)


# ---- bounds


def test_bound_contains_the_worst_of_many_float32_programs(rng):
    # Sequential sums, the worst order there is, and both textbook formulas for the variance.
    x = (3 + rng.normal(size=(200, 8))).astype(np.float32)
    bound = bounds.output(x.T, laws.BATCH, 1e-5)
    exact = oracle.normalize(x.T, laws.BATCH, 1e-5)
    for one_pass in (False, True):
        total = np.float32(0)
        squares = np.float32(0)
        for column in x.T:
            total, squares = total + column, squares + column * column
        mean = total / np.float32(8)
        var = squares / np.float32(8) - mean * mean if one_pass else ((x - mean[:, None]) ** 2).mean(1)
        y = (x - mean[:, None]) / np.sqrt(var + np.float32(1e-5))[:, None]
        assert (np.abs(y.T - exact) <= bound).all()


def test_bound_says_nothing_where_rounding_is_out_of_first_order():
    assert (bounds.output(np.full((8, 1), 1e4), laws.BATCH, 1e-5) == np.inf).all()


def test_agree_names_the_worst_place():
    with pytest.raises(laws.BrokenLawError, match=r"y\[1\]: expected 2, got 2.5, apart 0.5, bound 0.1"):
        agree([1.0, 2.0], [1.05, 2.5], 0.1, "y")


def test_nan_never_agrees():
    with pytest.raises(laws.BrokenLawError, match="got nan"):
        agree([1.0], [np.nan], 1e9, "y")


def test_infinite_bound_says_nothing():
    agree([1.0], [np.nan], np.inf, "y")


def test_shapes_that_differ_do_not_agree():
    with pytest.raises(laws.BrokenLawError, match=r"y has shape \(2,\), expected \(1,\)"):
        agree([1.0], [1.0, 1.0], np.inf, "y")


# ---- what is read off outputs


@pytest.mark.parametrize("epsilon", [1e-3, 1e-5, 2e-12, 0.5])
def test_epsilon_is_measured(epsilon):
    subject = laws.adapters.subject_of(factory(Textbook)(epsilon=epsilon))
    np.testing.assert_allclose(measure_epsilon(subject), epsilon, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "kind", "decay", "unbiased"),
    [
        ({"decay": 0.9}, "exponential", 0.9, False),
        ({"decay": 0.999, "unbiased": True}, "exponential", 0.999, True),
        ({"decay": 0.8, "debias": True}, "debiased", 0.8, False),
        ({"decay": None, "unbiased": True}, "cumulative", 0.0, True),
    ],
)
def test_rule_of_running_statistics_is_recognized(options, kind, decay, unbiased):
    rule = laws.adapters.subject_of(jaxbn.batch_norm(**options)).running
    assert rule.fits
    assert (rule.kind, rule.unbiased) == (kind, unbiased)
    np.testing.assert_allclose(rule.decay, decay, atol=1e-6)


def test_stated_decay_is_held_against_the_layer():
    with pytest.raises(AssertionError, match="running_closed_form"):
        laws.check(jaxbn.batch_norm(decay=0.9), [laws.running_closed_form], decay=0.99, shrink=False)


# ---- strategies


@hypothesis.given(laws.strategies.batches(dtypes=(jnp.float32, jnp.bfloat16), layouts=(-1, 1)))
def test_batches_have_masks_and_weights_of_their_shape(batch):
    for extra in (batch.where, batch.weights):
        assert extra is None or extra.shape == batch.x.shape
    assert batch.x.dtype in (jnp.float32, jnp.bfloat16)
    if batch.where is not None:
        counts = np.moveaxis(batch.where, batch.feature_axis, -1).reshape(-1, 2).sum(0)
        assert (counts >= 2).all()
    if batch.weights is not None:
        assert batch.weights.min() >= 0.25


@hypothesis.given(laws.strategies.batches(masked=False, weighted=False))
def test_values_are_exact_in_float32(batch):
    # Multiples of an eighth below 2^10: shifting and scaling by powers of two round nothing.
    assert (batch.x * 8 == np.round(batch.x * 8)).all()
    assert np.abs(batch.x).max() < 2**10


# ---- check and its report


def test_law_can_be_called_by_itself():
    laws.zero_mean(jaxbn.batch_norm(), examples=5)
    with pytest.raises(AssertionError, match="breaks zero_mean"):
        laws.zero_mean(lambda x: x + 1, examples=5, shrink=False)


def test_failing_input_is_shrunk():
    def outside(x):
        axes = tuple(range(x.ndim - 1))
        mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
        return (x - mean) / jnp.sqrt(var * x.shape[0] / (x.shape[0] - 1) + 1e-5)

    (outcome,) = laws.survey(outside, [laws.unit_variance], epsilon=1e-5).broken
    x = outcome.inputs["x"]
    # The smallest shape, and one value in it that is not zero.
    assert x.shape == (4, 2)
    assert np.count_nonzero(x) == 1
    assert "mean square of y" in outcome.detail


def test_check_is_deterministic():
    first, second = (laws.survey(lambda x: x, [laws.zero_mean]).broken[0].inputs["x"] for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_function_that_raises_in_a_law_breaks_it():
    def picky(x):
        if len(x) == 8:
            raise ValueError("not eight\nplease")
        return x

    (outcome,) = laws.survey(picky, ["dense_equals_convolution"]).broken
    assert outcome.detail == "raised ValueError: not eight"


def test_layer_without_a_law_s_needs_is_reported_as_such():
    report = laws.survey(lambda x: x, [laws.running_closed_form, laws.mask_equals_subset, laws.layouts_agree])
    assert [outcome.detail for outcome in report.outcomes] == [
        "needs running statistics",
        "needs a mask (where=)",
        "needs a version with feature_axis=1",
    ]


def test_what_changes_the_shape_is_refused():
    with pytest.raises(TypeError, match=r"of x with shape \(4, 2\) it made shape \(2,\)"):
        laws.check(lambda x: x.mean(0))


def test_what_cannot_be_checked_is_refused():
    with pytest.raises(TypeError, match="3 is no Normalizer, module or function"):
        laws.check(3)


def test_unknown_law_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match="no law is called 'nothing'; there are zero_mean"):
        laws.check(jaxbn.batch_norm(), ["nothing"])


def test_law_with_an_unknown_need_is_refused():
    with pytest.raises(ValueError, match=r"needs \['luck'\]"):
        laws.law(statement="", bound="", source="", inputs=dict, needs=("luck",))


def test_report_shows_pairs_and_lists_of_arrays_by_name():
    pair = {"x_dy": (np.zeros(2, np.float32), np.ones(2, np.float32)), "batches": [np.zeros(1, np.float32)]}
    text = str(LawResult(laws.zero_mean, "BROKEN", "why", pair))
    for line in ("x = [0., 0.]", "dy = [1., 1.]", "batches[0] = [0.]"):
        assert line in text


def test_markdown_counts_what_applies_and_has_promises_apart():
    outcomes = [LawResult(laws.zero_mean, "holds"), LawResult(laws.unit_variance, "BROKEN", "why")]
    outcomes += [LawResult(laws.hard_inputs, "BROKEN", "why"), LawResult(laws.affine_last, "n/a", "needs a scale")]
    table = laws.markdown([Report("layer", "", outcomes)])
    assert table.splitlines() == [
        "| law | layer |",
        "| --- | --- |",
        "| `zero_mean` | holds |",
        "| `unit_variance` | **broken** |",
        "| `affine_last` | – |",
        "| laws broken / applicable | 1 / 2 |",
        "| *promises of this library* |  |",
        "| `hard_inputs` | **broken** |",
        "| promises broken / applicable | 1 / 1 |",
    ]


# ---- the order of the files


def test_files_import_only_from_those_before_them_in_the_stated_order():
    folder = pathlib.Path(laws.__file__).parent
    stated = re.findall(r"\b[_a-z]+\b", re.search(r"imports only from those before it:\n\n(.*)", laws.__doc__, re.S)[1])
    order = [name for name in dict.fromkeys(stated) if (folder / f"{name}.py").exists()]
    assert {path.stem for path in folder.glob("*.py")} == {*order, "__init__"}
    for place, name in enumerate(order):
        text = (folder / f"{name}.py").read_text(encoding="utf-8")
        found = re.findall(r"from jaxbn\.testing\.(\w+) import|from jaxbn\.testing import (\w+)", text)
        imported = {module for pair in found for module in pair if module}
        assert imported <= set(order[:place]), f"{name} imports {imported - set(order[:place])}"


# ---- what importing needs


def program(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_the_library_needs_neither_hypothesis_nor_chex():
    found = program("import sys; sys.modules['hypothesis'] = sys.modules['chex'] = None; import jaxbn")
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("missing", ["hypothesis", "chex"])
def test_missing_package_is_named_with_the_remedy(missing):
    found = program(f"import sys; sys.modules[{missing!r}] = None; import jaxbn.testing")
    assert found.returncode == 1
    assert f'jaxbn.testing needs {missing}: pip install "jaxbn[testing]"' in found.stderr
