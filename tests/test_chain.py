"""The experiment `chain`: its mathematics against closed forms, its protocol, and a whole small run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import chain, chain_rows, linear_chain
from experiments.errors import UserError
from experiments.framework import record

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


@functools.partial(jax.jit, static_argnums=0)
def stepped(chain_function, weights, x, rates):
    expansion = linear_chain.taylor(chain_function, weights, x)
    return linear_chain.step_change(chain_function, weights, x, expansion, rates), expansion


def test_cost_of_a_plain_chain_is_the_product_of_its_weights():
    weights = some_weights(7)
    np.testing.assert_allclose(
        linear_chain.cost(linear_chain.plain, weights, unit_batch()), np.prod(weights), rtol=ROUNDING
    )


def test_change_of_two_layers_is_the_quadratic_of_the_book():
    weights, rates = jnp.array([0.7, 1.4]), jnp.array([1e-3, 0.1, 2.0])
    change, _ = stepped(linear_chain.plain, weights, unit_batch(), rates)
    # (w1 - r w2)(w2 - r w1) - w1 w2 = -r (w1^2 + w2^2) + r^2 w1 w2
    first, second = -rates * (0.7**2 + 1.4**2), rates**2 * 0.7 * 1.4
    np.testing.assert_allclose(change.forecast, first, rtol=ROUNDING)
    np.testing.assert_allclose(change.second_order, second, rtol=ROUNDING)
    np.testing.assert_allclose(change.true, first + second, rtol=ROUNDING)


def test_second_order_term_is_the_sum_over_pairs_of_layers():
    weights, rate = np.asarray(some_weights(6)), 0.05
    change, expansion = stepped(linear_chain.plain, jnp.asarray(weights), unit_batch(), jnp.array([rate]))
    g = np.asarray(expansion.gradient)
    pairs = [rate**2 * g[i] * g[j] * np.prod(np.delete(weights, [i, j])) for i in range(6) for j in range(i + 1, 6)]
    np.testing.assert_allclose(change.second_order[0], sum(pairs), rtol=ROUNDING)


def test_curvature_through_batch_norm_agrees_with_the_hessian():
    # An epsilon as large as the variance: otherwise the curvature is zero and any code would pass.
    weights, x, network = some_weights(4), unit_batch(), linear_chain.normalized(1.0)
    _, expansion = stepped(network, weights, x, jnp.array([0.1]))
    hessian = jax.jit(jax.hessian(linear_chain.cost, argnums=1), static_argnums=0)(network, weights, x)
    g = expansion.gradient
    assert abs(g @ hessian @ g) > 0.01
    np.testing.assert_allclose(expansion.curvature, g @ hessian @ g, rtol=ROUNDING)


def test_gradient_through_batch_norm_is_the_closed_form():
    weights, x, epsilon = some_weights(5), unit_batch(), 0.3
    g = jax.jit(jax.grad(lambda w: linear_chain.cost(linear_chain.normalized(epsilon), w, x)))(weights)
    # cost = w_l p s^2 / sqrt(p^2 s^2 + epsilon), with p the product of the lower weights and s^2 the variance of x
    p, variance, top = np.prod(weights[:-1]), np.var(x), weights[-1]
    total = p**2 * variance + epsilon
    np.testing.assert_allclose(g[:-1], top * variance * epsilon * total**-1.5 * p / weights[:-1], rtol=ROUNDING)
    np.testing.assert_allclose(g[-1], p * variance / np.sqrt(total), rtol=ROUNDING)


def test_full_expansion_gives_the_true_change():
    weights, rate = some_weights(20), 0.02
    change, expansion = stepped(linear_chain.plain, weights, unit_batch(), jnp.array([rate]))
    terms = linear_chain.expansion_in_rate(weights, expansion.gradient) * rate ** np.arange(21)
    np.testing.assert_allclose(jnp.sum(terms[1:]), change.true[0], rtol=1e-9)  # terms up to 100 times the sum cancel
    np.testing.assert_allclose(terms[1], change.forecast[0], rtol=ROUNDING)
    np.testing.assert_allclose(terms[2], change.second_order[0], rtol=ROUNDING)


def test_two_equal_layers_need_the_second_order_once_it_exceeds_the_tolerance():
    # w = g = 1: the change is -2 r + r^2, so the first order is off by r / (2 - r) of it.
    ones = jnp.ones(2)
    needed = [int(linear_chain.orders_needed(ones, ones, jnp.asarray(rate), 0.1)) for rate in (0.1, 0.2)]
    assert needed == [1, 2]


def test_orders_needed_count_every_layer_of_a_long_chain_of_large_weights():
    # w_i - r g_i = 0 everywhere: the change is minus the product, reached by the binomial series only at its end.
    weights = jnp.full(30, 1.1)
    assert int(linear_chain.orders_needed(weights, weights, jnp.asarray(1.0), 0.1)) == 30


def test_chain_normalized_throughout_does_what_is_forecast_at_every_rate():
    weights, rates = some_weights(10), jnp.array([1e-3, 1.0, 1e4])
    network = linear_chain.normalized_throughout(chain_rows.NEGLIGIBLE)
    change, _ = stepped(network, weights, unit_batch(), rates)
    assert np.all(linear_chain.relative_error(change, change.forecast) == 0)


def test_relative_error_ignores_what_is_below_rounding():
    change = linear_chain.StepChange(*map(jnp.asarray, (1.001, 1.0, 0.0, 0.01)))
    assert linear_chain.relative_error(change, change.forecast) == 0
    assert linear_chain.relative_error(change._replace(resolution=1e-9), change.forecast) > 0


@pytest.mark.parametrize("epsilon", [chain_rows.NEGLIGIBLE, 0.1])
def test_normalized_chain_of_unit_weights_is_the_standardized_input(epsilon):
    x = unit_batch()
    np.testing.assert_allclose(
        linear_chain.normalized(epsilon)(jnp.ones(4), x), (x - x.mean()) / np.sqrt(x.var() + epsilon), rtol=ROUNDING
    )


def test_inactive_layers_change_nothing():
    weights, x, network = some_weights(9), unit_batch(), linear_chain.normalized(1e-5)
    deep = linear_chain.shortened(network, jnp.arange(9) >= 6)
    taylor = jax.jit(linear_chain.taylor, static_argnums=0)
    short, long = taylor(network, weights[6:], x), taylor(deep, weights, x)
    np.testing.assert_array_equal(long.gradient[:6], 0)
    np.testing.assert_allclose(long.gradient[6:], short.gradient, rtol=1e-9)  # cancels down to epsilon in the lower
    for name in ("value", "slope"):
        np.testing.assert_allclose(getattr(long, name), getattr(short, name), rtol=ROUNDING)


@pytest.mark.parametrize("factor", [1e-6, 0.5, 1e6, -1.0, -1e6])
def test_h_hat_depends_on_the_sign_of_a_lower_weight_only(factor):
    h = unit_batch()
    h_hat = linear_chain.standardize(h, chain_rows.NEGLIGIBLE)
    changed = linear_chain.standardize(factor * h, chain_rows.NEGLIGIBLE)
    np.testing.assert_allclose(changed, np.sign(factor) * h_hat, rtol=0, atol=ROUNDING)


def test_h_hat_is_unit_in_float32_while_the_variance_is_above_epsilon():
    h_hat = linear_chain.standardize((1e3 * unit_batch()).astype(jnp.float32), chain_rows.DEFAULT)
    assert h_hat.dtype == jnp.float32
    assert abs(float(jnp.mean(h_hat))) < FLOAT32_ROUNDING
    assert abs(float(jnp.var(h_hat)) - 1) < FLOAT32_ROUNDING


def test_output_of_a_zeroed_layer_is_zero():
    y = linear_chain.normalized(chain_rows.NEGLIGIBLE)(jnp.array([1.0, 0.0, 1.0, 2.0]), unit_batch())
    np.testing.assert_array_equal(y, 0)


def test_kolmogorov_distance_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    h = 0.3 + unit_batch()
    np.testing.assert_allclose(linear_chain.kolmogorov_distance(h), stats.kstest(h, "norm").statistic, rtol=1e-9)


def test_one_standardized_gaussian_sample_in_twenty_exceeds_the_limit():
    h = jax.random.normal(jax.random.key(0), (4000, 64), jnp.float64)
    h = (h - h.mean(axis=1, keepdims=True)) / h.std(axis=1, keepdims=True)
    exceeding = jnp.mean(jax.vmap(linear_chain.kolmogorov_distance)(h) > linear_chain.kolmogorov_limit(64))
    assert abs(float(exceeding) - 0.05) < 4 * np.sqrt(0.05 * 0.95 / 4000)  # four standard errors


def test_largest_usable_rate_ends_at_the_first_bad_one():
    error = jnp.asarray(np.where(chain_rows.SCAN < 0.02, 0.01, 0.5))
    np.testing.assert_allclose(chain_rows.largest_usable(error.at[-1].set(0)), 0.01)
    np.testing.assert_allclose(chain_rows.largest_usable(jnp.full_like(error, jnp.nan)), 10**-7.5)
    np.testing.assert_allclose(chain_rows.largest_usable(jnp.zeros_like(error)), chain_rows.SCAN[-1])


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    settings = chain.PRESETS["smoke"]
    config = {"experiment": "chain", "preset": "smoke", "settings": settings}
    run = record.open_record(tmp_path_factory.mktemp("chain") / "run", config)
    chain.run(settings, run, lambda *_: None)
    return settings, run


def test_smoke_run_supports_what_holds_at_any_depth(smoke):
    settings, run = smoke
    outcomes = {found.claim: found.outcome for found in chain.judge(settings, run.rows())}
    kept = [
        claim for claim in outcomes if claim.startswith(("With h normalized", "Under the norm", "h_hat", "The lower"))
    ]
    assert [outcomes[claim] for claim in kept] == ["supported"] * 4


def test_smoke_run_fills_its_tables_and_its_picture(smoke, tmp_path):
    settings, run = smoke
    tables = chain.tabulate(settings, run.rows())
    assert all(len(row) == len(table.columns) for table in tables for row in table.rows)
    assert not any("nan" in cell for table in tables for row in table.rows for cell in row)
    (picture,) = chain.draw(settings, run.rows(), tmp_path)
    assert (tmp_path / picture.file).stat().st_size > 10_000


def test_finished_depths_are_not_measured_again(smoke, monkeypatch):
    settings, run = smoke
    monkeypatch.setattr(chain_rows, "step_rows", lambda *_: pytest.fail("measured again"))
    before = run.rows()
    chain.run(settings, run, lambda *_: None)
    assert run.rows() == before


@pytest.mark.parametrize("depths", [[5], [1, 5], [5, 3]])
def test_unusable_depths_are_refused(depths):
    with pytest.raises(UserError, match="depths"):
        chain.run({**chain.PRESETS["smoke"], "depths": depths}, None, lambda *_: None)
