"""The experiment `chain`: its mathematics against closed forms, its protocol, and a whole small run."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from scipy import stats

from experiments import chain
from experiments.framework import run
from experiments.framework.record import open_record
from experiments.framework.results import results_of
from experiments.framework.verdict import judge
from experiments.training import linear_chain
from experiments.training.linear_chain import LINEAR, NORMALIZED, OFF

# Double precision, a few hundred operations on numbers of order one.
ROUNDING = 1e-12
# The library's batch norm in float32: one rounding of each of 64 values, summed.
FLOAT32_ROUNDING = 1e-6


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


def unit_batch(size: int = 64, seed: int = 0) -> jax.Array:
    """A batch whose mean square is 1 exactly, so that the plain chain's cost is the product of its weights."""
    x = jax.random.normal(jax.random.key(seed), (size,), jnp.float64)
    return x / jnp.sqrt(jnp.mean(x**2))


def some_weights(layers: int, seed: int = 1) -> jax.Array:
    return 1 + 0.3 * jax.random.normal(jax.random.key(seed), (layers,), jnp.float64)


def plain(layers: int) -> linear_chain.Chain:
    return linear_chain.chain(np.full(layers, LINEAR))


def normalized(layers: int, epsilon: float) -> linear_chain.Chain:
    return linear_chain.chain(np.array([LINEAR] * (layers - 1) + [NORMALIZED]), (epsilon,))


@partial(jax.jit, static_argnums=0)
def stepped(network, weights, x, rates):
    return linear_chain.step(network, weights, x, lambda slope: rates)


def test_cost_of_a_plain_chain_is_the_product_of_its_weights():
    weights = some_weights(7)
    np.testing.assert_allclose(linear_chain.cost(plain(7), weights, unit_batch()), np.prod(weights), rtol=ROUNDING)


def test_change_of_two_layers_is_the_quadratic_of_the_book():
    weights, rates = jnp.array([0.7, 1.4]), jnp.array([1e-3, 0.1, 2.0])
    step = stepped(plain(2), weights, unit_batch(), rates)
    # (w1 - r w2)(w2 - r w1) - w1 w2 = -r (w1^2 + w2^2) + r^2 w1 w2
    first, second = -rates * (0.7**2 + 1.4**2), rates**2 * 0.7 * 1.4
    np.testing.assert_allclose(step.forecast, first, rtol=ROUNDING)
    np.testing.assert_allclose(step.second_order, second, rtol=ROUNDING)
    np.testing.assert_allclose(step.true, first + second, rtol=ROUNDING)


def test_rates_may_depend_on_the_slope():
    # The rate 0.1 / g.g is the one that is forecast to lower the cost by 0.1.
    step = jax.jit(lambda w, x: linear_chain.step(plain(3), w, x, lambda slope: 0.1 / slope[None]))
    np.testing.assert_allclose(step(some_weights(3), unit_batch()).forecast, [-0.1], rtol=ROUNDING)


def test_second_order_term_is_the_sum_over_pairs_of_layers():
    weights, rate = np.asarray(some_weights(6)), 0.05
    step = stepped(plain(6), jnp.asarray(weights), unit_batch(), jnp.array([rate]))
    g = np.asarray(step.gradient)
    pairs = [rate**2 * g[i] * g[j] * np.prod(np.delete(weights, [i, j])) for i in range(6) for j in range(i + 1, 6)]
    np.testing.assert_allclose(step.second_order[0], sum(pairs), rtol=ROUNDING)


def test_second_order_term_through_batch_norm_agrees_with_the_hessian():
    # An epsilon as large as the variance: otherwise the curvature is zero and any code would pass.
    weights, x, network = some_weights(4), unit_batch(), normalized(4, 1.0)
    step = stepped(network, weights, x, jnp.ones(1))
    hessian = jax.jit(jax.hessian(linear_chain.cost, argnums=1), static_argnums=0)(network, weights, x)
    g = step.gradient
    assert abs(g @ hessian @ g) > 0.01
    np.testing.assert_allclose(step.second_order[0], g @ hessian @ g / 2, rtol=ROUNDING)


def test_gradient_through_batch_norm_is_the_closed_form():
    weights, x, epsilon = some_weights(5), unit_batch(), 0.3
    g = jax.jit(jax.grad(lambda w: linear_chain.cost(normalized(5, epsilon), w, x)))(weights)
    # cost = w_l p s^2 / sqrt(p^2 s^2 + epsilon), with p the product of the lower weights and s^2 the variance of x
    p, variance, top = np.prod(weights[:-1]), np.var(x), weights[-1]
    total = p**2 * variance + epsilon
    np.testing.assert_allclose(g[:-1], top * variance * epsilon * total**-1.5 * p / weights[:-1], rtol=ROUNDING)
    np.testing.assert_allclose(g[-1], p * variance / np.sqrt(total), rtol=ROUNDING)


def test_full_expansion_gives_the_true_change():
    weights, rate = some_weights(20), 0.02
    step = stepped(plain(20), weights, unit_batch(), jnp.array([rate]))
    terms = linear_chain.expansion_in_rate(weights, step.gradient) * rate ** np.arange(21)
    np.testing.assert_allclose(jnp.sum(terms[1:]), step.true[0], rtol=1e-9)  # terms up to 100 times the sum cancel
    np.testing.assert_allclose(terms[1], step.forecast[0], rtol=ROUNDING)
    np.testing.assert_allclose(terms[2], step.second_order[0], rtol=ROUNDING)


def test_two_equal_layers_need_the_second_order_once_it_exceeds_the_tolerance():
    # w = g = 1: the change is -2 r + r^2, so the first order is off by r / (2 - r) of it.
    ones = jnp.ones(2)
    needed = [int(linear_chain.orders_needed(ones, ones, rate, 0.1)) for rate in (0.1, 0.2)]
    assert needed == [1, 2]


def test_orders_needed_count_every_layer_of_a_long_chain_of_large_weights():
    # w_i - r g_i = 0 everywhere: the change is minus the product, reached by the binomial series only at its end.
    weights = jnp.full(30, 1.1)
    assert int(linear_chain.orders_needed(weights, weights, 1.0, 0.1)) == 30


def test_chain_normalized_throughout_does_what_is_forecast_at_every_rate():
    weights, rates = some_weights(10), jnp.array([1e-3, 1.0, 1e4])
    step = stepped(linear_chain.chain(np.full(10, NORMALIZED), (chain.NEGLIGIBLE,)), weights, unit_batch(), rates)
    assert np.all(linear_chain.relative_error(step, step.forecast) == 0)


def test_relative_error_ignores_what_is_below_rounding():
    step = linear_chain.Step(None, *map(jnp.asarray, (1.001, 1.0, 0.0, 0.01)))
    assert linear_chain.relative_error(step, step.forecast) == 0
    assert linear_chain.relative_error(step._replace(resolution=1e-9), step.forecast) > 0


@pytest.mark.parametrize("epsilon", [chain.NEGLIGIBLE, 0.1])
def test_normalized_chain_of_unit_weights_is_the_standardized_input(epsilon):
    x = unit_batch()
    expected = (x - x.mean()) / np.sqrt(x.var() + epsilon)
    np.testing.assert_allclose(normalized(4, epsilon)(jnp.ones(4), x), expected, rtol=ROUNDING)


def test_each_normalized_layer_has_its_own_epsilon():
    x, kinds, epsilons = unit_batch(), np.array([LINEAR, NORMALIZED + 1, NORMALIZED]), (0.1, 2.0)
    y = linear_chain.chain(kinds, epsilons)(jnp.array([2.0, 3.0, 5.0]), x)
    first = linear_chain.standardize(2.0 * x, 2.0)
    np.testing.assert_allclose(y, 5.0 * linear_chain.standardize(3.0 * first, 0.1), rtol=ROUNDING)


@jax.jit
def stepped_by_kinds(kinds, weights, x):
    return linear_chain.step(linear_chain.chain(kinds, (0.1, 0.2)), weights, x, lambda slope: jnp.ones(1))


@pytest.mark.parametrize("kinds", chain.ARMS.values(), ids=chain.ARMS)
def test_layers_that_are_off_change_nothing(kinds):
    lower, top = kinds
    weights, x = some_weights(9), unit_batch()
    short = stepped_by_kinds(np.array([lower, lower, top]), weights[6:], x)
    long = stepped_by_kinds(np.array([OFF] * 6 + [lower, lower, top]), weights, x)
    np.testing.assert_array_equal(long.gradient[:6], 0)
    np.testing.assert_allclose(long.gradient[6:], short.gradient, rtol=ROUNDING)
    np.testing.assert_allclose(long.true, short.true, rtol=ROUNDING)
    np.testing.assert_allclose(long.second_order, short.second_order, rtol=1e-9)  # a sum that cancels


@pytest.mark.parametrize("factor", [1e-6, 0.5, 1e6, -1.0, -1e6])
def test_h_hat_depends_on_the_sign_of_a_lower_weight_only(factor):
    h = unit_batch()
    h_hat = linear_chain.standardize(h, chain.NEGLIGIBLE)
    changed = linear_chain.standardize(factor * h, chain.NEGLIGIBLE)
    np.testing.assert_allclose(changed, np.sign(factor) * h_hat, rtol=0, atol=ROUNDING)


def test_h_hat_is_unit_in_float32_while_the_variance_is_above_epsilon():
    h_hat = linear_chain.standardize((1e3 * unit_batch()).astype(jnp.float32), chain.DEFAULT)
    assert h_hat.dtype == jnp.float32
    assert abs(float(jnp.mean(h_hat))) < FLOAT32_ROUNDING
    assert abs(float(jnp.var(h_hat)) - 1) < FLOAT32_ROUNDING


def test_output_of_a_zeroed_layer_is_zero():
    y = normalized(4, chain.NEGLIGIBLE)(jnp.array([1.0, 0.0, 1.0, 2.0]), unit_batch())
    np.testing.assert_array_equal(y, 0)


def test_kolmogorov_distance_is_scipys():
    h = 0.3 + unit_batch()
    np.testing.assert_allclose(linear_chain.kolmogorov_distance(h), stats.kstest(h, "norm").statistic, rtol=1e-9)


def test_one_standardized_gaussian_sample_in_twenty_exceeds_the_limit():
    h = jax.random.normal(jax.random.key(0), (4000, 64), jnp.float64)
    h = (h - h.mean(axis=1, keepdims=True)) / h.std(axis=1, keepdims=True)
    exceeding = jnp.mean(jax.vmap(linear_chain.kolmogorov_distance)(h) > linear_chain.kolmogorov_limit(64))
    assert abs(float(exceeding) - 0.05) < 4 * np.sqrt(0.05 * 0.95 / 4000)  # four standard errors


def test_largest_usable_rate_ends_at_the_first_bad_one():
    error = jnp.asarray(np.where(chain.SCAN < 0.02, 0.01, 0.5))
    np.testing.assert_allclose(chain.largest_usable(error.at[-1].set(0)), 0.01)
    np.testing.assert_allclose(chain.largest_usable(jnp.full_like(error, jnp.nan)), 10**-7.5)
    np.testing.assert_allclose(chain.largest_usable(jnp.zeros_like(error)), chain.SCAN[-1])


def test_share_of_what_is_true_and_quantiles_of_numbers():
    truth = xr.DataArray([[True, False, True, True]], dims=("seed", "draw"))
    assert float(chain.over_draws(truth)[0]) == 0.75
    number = xr.DataArray([[1.0, 2.0, np.inf, np.inf, 3.0]], dims=("seed", "draw"))
    assert float(chain.over_draws(number).sel(quantile=0.5)[0]) == 3.0


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    settings = chain.EXPERIMENT.settings["smoke"]
    config = {"experiment": "chain", "preset": "smoke", "settings": {}, "provenance": {}}
    record = open_record(tmp_path_factory.mktemp("chain") / "run", config)
    run.measure(chain.EXPERIMENT, settings, record, lambda *_: None)
    return settings, results_of(chain.EXPERIMENT, record.rows())


def test_smoke_run_supports_what_holds_at_any_depth(smoke):
    _, found = smoke
    outcomes = {claim.sentence: judge(claim, found).outcome for claim in chain.EXPERIMENT.claims}
    kept = [
        claim for claim in outcomes if claim.startswith(("With h normalized", "Under the norm", "h_hat", "The lower"))
    ]
    assert [outcomes[claim] for claim in kept] == ["supported"] * 4


def test_every_effect_is_known_for_every_seed(smoke):
    settings, found = smoke
    for claim in chain.EXPERIMENT.claims:
        effect = claim.effect(found)
        assert list(effect.seed.values) == list(settings.every_seed), claim.sentence
        assert effect.notnull().all(), claim.sentence


def test_tables_of_a_smoke_run_lack_nothing(smoke):
    settings, found = smoke
    tables = [table(settings, found) for table in chain.EXPERIMENT.tables]
    assert all(len(row) == len(table.columns) for table in tables for row in table.rows)
    assert not any("nan" in cell or cell == "–" for table in tables for row in table.rows for cell in row)


def test_two_signs_cannot_be_flipped_in_a_chain_of_two_layers(smoke):
    _, found = smoke
    same = found.same.sel(change="two signs flipped", arithmetic=chain.EXACT)
    assert same.sel(depth=2).isnull().all()
    assert (same.sel(depth=10) == 1).all()


def test_a_pilot_draws_other_chains(smoke):
    settings, found = smoke
    pilot = chain.measured(replace(settings, first_seed=run.PILOT_SEED), 2)
    assert list(pilot.seed.values) == [run.PILOT_SEED, run.PILOT_SEED + 1]
    place = {"arm": "plain", "scale": "around 1.0", "step": chain.MAIN, "quantile": 0.5}
    assert not np.isin(pilot.error.sel(place), found.error.sel({**place, "depth": 2})).any()
