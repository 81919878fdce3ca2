"""Running statistics: closed forms of every averaging rule, and what must leave them alone."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxbn import Moments, init_batch_stats, running_moments, update_batch_stats

# Three roundings of 2^-24 for each of at most twenty steps, on values of size one.
STEPS = {"rtol": 4e-6, "atol": 4e-6}
RULES = {
    "decay": {"decay": 0.9},
    "unbiased": {"decay": 0.9, "unbiased": True},
    "debias": {"decay": 0.9, "debias": True},
    "cumulative": {"decay": None},
    "cumulative unbiased": {"decay": None, "unbiased": True},
}


def start(features=(3,), **rule):
    return init_batch_stats(features, decay=rule["decay"], debias=rule.get("debias", False))


def batches(steps, features=3, count=8.0):
    rng = np.random.default_rng([steps, int(count)])
    return [
        Moments(
            jnp.full(features, count),
            jnp.asarray(rng.normal(size=features), jnp.float32),
            jnp.asarray(rng.uniform(0.5, 2, features), jnp.float32),
        )
        for _ in range(steps)
    ]


def run(batch_stats, sequence, **rule):
    for moments in sequence:
        batch_stats = update_batch_stats(batch_stats, moments, **rule)
    return batch_stats


def stack(sequence, name):
    return np.stack([np.asarray(getattr(m, name), np.float64) for m in sequence])


def test_statistics_start_at_mean_zero_and_variance_one():
    chex.assert_trees_all_equal(
        init_batch_stats((2, 3), decay=0.9), {"mean": jnp.zeros((2, 3)), "var": jnp.ones((2, 3))}
    )


def test_debiased_statistics_start_at_zero_with_a_weight():
    batch_stats = init_batch_stats((3,), decay=0.9, debias=True)
    assert set(batch_stats) == {"mean", "var", "weight"}
    assert all(np.all(value == 0) for value in batch_stats.values())


def test_before_the_first_batch_debiased_moments_are_those_of_no_normalization():
    mean, var = running_moments(init_batch_stats((3,), decay=0.9, debias=True), debias=True)
    np.testing.assert_array_equal(mean, 0)
    np.testing.assert_array_equal(var, 1)


def test_one_step_is_decay_old_plus_one_minus_decay_new():
    (batch,) = batches(1)
    new = update_batch_stats(start(decay=0.75), batch, decay=0.75)
    # 0.75 and 0.25 are exact in binary, and so is everything but the last rounding.
    np.testing.assert_allclose(new["mean"], 0.25 * np.asarray(batch.mean), rtol=2e-7)
    np.testing.assert_allclose(new["var"], 0.75 + 0.25 * np.asarray(batch.var), rtol=2e-7)


@given(st.floats(0.0, 1.0), st.integers(1, 20))
def test_decay_closed_form(decay, steps):
    sequence = batches(steps)
    new = run(start(decay=decay), sequence, decay=decay)
    powers = decay ** np.arange(steps - 1, -1, -1.0)[:, None]
    for name, initial in (("mean", 0.0), ("var", 1.0)):
        expected = decay**steps * initial + (1 - decay) * np.sum(powers * stack(sequence, name), 0)
        np.testing.assert_allclose(new[name], expected, **STEPS)


@given(st.floats(0.0, 0.9375), st.integers(1, 20))
def test_debias_equals_the_weighted_average_of_the_batches(decay, steps):
    sequence = batches(steps)
    rule = {"decay": decay, "debias": True}
    powers = decay ** np.arange(steps - 1, -1, -1.0)
    moments = running_moments(run(start(**rule), sequence, **rule), debias=True)
    for name, value in zip(("mean", "var"), moments, strict=True):
        np.testing.assert_allclose(value, np.average(stack(sequence, name), axis=0, weights=powers), **STEPS)


def test_debias_gives_a_constant_input_its_value_at_every_step():
    rule, (batch,) = {"decay": 0.99, "debias": True}, batches(1)
    batch_stats = start(**rule)
    for _ in range(12):
        batch_stats = update_batch_stats(batch_stats, batch, **rule)
        mean, var = running_moments(batch_stats, debias=True)
        # A quotient of two averages that carry the same few roundings a step.
        np.testing.assert_allclose(mean, batch.mean, **STEPS)
        np.testing.assert_allclose(var, batch.var, **STEPS)


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_no_decay_is_the_plain_average_of_the_batches(steps):
    sequence = batches(steps)
    mean, var = running_moments(run(start(decay=None), sequence, decay=None))
    np.testing.assert_allclose(mean, stack(sequence, "mean").mean(0), **STEPS)
    np.testing.assert_allclose(var, stack(sequence, "var").mean(0), **STEPS)


def test_no_decay_forgets_where_it_started():
    (batch,) = batches(1)
    mean, var = running_moments(update_batch_stats(start(decay=None), batch, decay=None))
    chex.assert_trees_all_close((mean, var), (batch.mean, batch.var), rtol=2e-7)  # Two roundings.


@pytest.mark.parametrize("rule", ["decay", "debias"])
def test_conventions_do_not_mix(rule):
    # Read without the correction, debiased averages are the raw ones; and plain ones know no weight at all.
    batch_stats = run(start(**RULES[rule]), batches(3), **RULES[rule])
    mean, var = running_moments(batch_stats)
    chex.assert_trees_all_equal((mean, var), (batch_stats["mean"], batch_stats["var"]))
    assert ("weight" in batch_stats) == (rule == "debias")


@pytest.mark.parametrize("rule", [{"decay": 0.9, "debias": True}, {"decay": None}])
def test_statistics_of_the_other_convention_are_refused(rule):
    plain = init_batch_stats((3,), decay=0.9)
    with pytest.raises(ValueError, match="weight"):
        update_batch_stats(plain, batches(1)[0], **rule)


def test_unbiased_stores_the_variance_times_n_over_n_minus_one():
    (batch,) = batches(1, count=5.0)
    new = update_batch_stats(start(decay=0.0), batch, decay=0.0, unbiased=True)
    np.testing.assert_allclose(new["var"], np.asarray(batch.var) * 5 / 4, rtol=2e-7)  # Two roundings.
    chex.assert_trees_all_equal(new["mean"], batch.mean)


@pytest.mark.parametrize("count", [0.5, 1.0])
def test_unbiased_variance_of_one_value_is_finite(count):
    (batch,) = batches(1, count=count)
    chex.assert_tree_all_finite(update_batch_stats(start(decay=0.9), batch, decay=0.9, unbiased=True))


@pytest.mark.parametrize("rule", RULES)
def test_feature_that_saw_nothing_keeps_its_statistics(rule):
    before = run(start(**RULES[rule]), batches(3), **RULES[rule])
    batch = batches(1)[0]._replace(count=jnp.array([8.0, 0.0, 8.0]))
    after = update_batch_stats(before, batch, **RULES[rule])
    for name in before:
        assert after[name][1] == before[name][1]
        assert after[name][0] != before[name][0]


@pytest.mark.parametrize("rule", ["debias", "cumulative"])
def test_feature_that_joins_late_is_averaged_over_its_own_batches(rule):
    sequence = batches(6)
    late = [m._replace(count=jnp.array([8.0, 8.0 * (i > 2), 8.0])) for i, m in enumerate(sequence)]
    debias = rule == "debias"
    mean, var = running_moments(run(start(**RULES[rule]), late, **RULES[rule]), debias=debias)
    own = run(start(**RULES[rule]), sequence[3:], **RULES[rule])
    expected = running_moments(own, debias=debias)
    np.testing.assert_allclose((mean[1], var[1]), (expected[0][1], expected[1][1]), **STEPS)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("field", ["mean", "var"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_batch_that_is_not_finite_changes_nothing(rule, field, value):
    before = run(start(**RULES[rule]), batches(2), **RULES[rule])
    batch = batches(1)[0]
    broken = batch._replace(**{field: getattr(batch, field).at[1].set(value)})
    chex.assert_trees_all_equal(update_batch_stats(before, broken, **RULES[rule]), before)


@pytest.mark.parametrize("rule", RULES)
def test_batch_that_is_not_finite_shows_on_request(rule):
    batch = batches(1)[0]
    broken = batch._replace(mean=batch.mean.at[1].set(np.nan))
    after = update_batch_stats(start(**RULES[rule]), broken, skip_nonfinite=False, **RULES[rule])
    np.testing.assert_array_equal(np.isnan(after["mean"]), [False, True, False])


@pytest.mark.parametrize("rule", RULES)
def test_structure_shapes_and_dtypes_stay(rule):
    before = start(**RULES[rule])
    after = update_batch_stats(before, batches(1)[0], **RULES[rule])
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)


@pytest.mark.parametrize("rule", RULES)
def test_inputs_are_not_mutated(rule):
    before = start(**RULES[rule])
    kept = {name: np.array(value) for name, value in before.items()}
    identity = dict(before)
    update_batch_stats(before, batches(1)[0], **RULES[rule])
    chex.assert_trees_all_equal(before, kept)
    assert all(before[name] is identity[name] for name in before)


@pytest.mark.parametrize("rule", RULES)
def test_no_gradient_flows_into_running_statistics(rule):
    batch, before = batches(1)[0], start(**RULES[rule])

    def total(batch, before):
        return sum(jnp.sum(v) for v in update_batch_stats(before, batch, **RULES[rule]).values())

    for gradient in jax.tree.leaves(jax.grad(total, argnums=(0, 1))(batch, before)):
        np.testing.assert_array_equal(gradient, 0)


def test_updates_run_in_a_scan():
    sequence = batches(6)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *sequence)
    rule = RULES["debias"]
    scanned, _ = jax.lax.scan(lambda stats, m: (update_batch_stats(stats, m, **rule), None), start(**rule), stacked)
    chex.assert_trees_all_close(scanned, run(start(**rule), sequence, **rule), **STEPS)


def test_scalar_count_serves_all_features():
    batch = batches(1)[0]
    scalar = batch._replace(count=jnp.array(8.0))
    for rule in RULES.values():
        chex.assert_trees_all_equal(
            update_batch_stats(start(**rule), scalar, **rule), update_batch_stats(start(**rule), batch, **rule)
        )


def test_complex_mean_is_kept():
    batch_stats = init_batch_stats((2,), jnp.complex64, decay=0.5)
    batch = Moments(jnp.full(2, 4.0), jnp.array([1 + 2j, -1j], jnp.complex64), jnp.array([1.0, 2.0]))
    new = update_batch_stats(batch_stats, batch, decay=0.5)
    chex.assert_type([new["mean"], new["var"]], [jnp.complex64, jnp.float32])
    np.testing.assert_array_equal(new["mean"], [0.5 + 1j, -0.5j])


def test_decay_may_be_traced():
    # Annealed decays and grids of decays are arrays.
    batch = batches(1)[0]
    update = jax.jit(lambda decay: update_batch_stats(start(decay=0.5), batch, decay=decay))
    chex.assert_trees_all_close(update(0.75), update_batch_stats(start(decay=0.5), batch, decay=0.75), rtol=2e-7)
