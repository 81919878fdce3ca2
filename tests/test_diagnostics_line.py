"""Taylor series, landscape and interpolation: what the loss does on a line, for losses whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from experiments.training import linear_chain
from jaxbn.diagnostics import interpolate, landscape, taylor
from jaxbn.training import LossOutput

ROUNDING = 1e-5  # Tens of roundings of float32.
A = np.array([[3.0, 1.0], [1.0, 2.0]], np.float32)
W = np.array([1.0, -2.0], np.float32)
G = A @ W  # the gradient of w.A.w / 2 at W
RATES = np.array([-0.3, 0.1, 1.0], np.float32)
VARIABLES = {"params": jnp.asarray(W)}


def quadratic(variables, batch, rng):
    """`w.A.w / 2`, as the mean of three examples that are all alike."""
    w = variables["params"]
    return LossOutput(3 * 0.5 * w @ (batch @ w), 3, {})


def of_quadratic(w):
    return 0.5 * np.einsum("...i,ij,...j->...", w, A, w)


def test_two_orders_forecast_a_quadratic_loss_exactly():
    found = taylor(quadratic, VARIABLES, jnp.asarray(A), rates=RATES)
    np.testing.assert_allclose(found.gradient, G, rtol=ROUNDING)
    np.testing.assert_allclose(found.terms, [-RATES * (G @ G), 0.5 * RATES**2 * (G @ A @ G)], rtol=ROUNDING)
    np.testing.assert_allclose(found.forecasts[1], found.true, rtol=ROUNDING)
    np.testing.assert_allclose(found.true, of_quadratic(W - RATES[:, None] * G) - of_quadratic(W), rtol=ROUNDING)


def test_the_relative_error_of_the_first_order_is_the_second_over_the_first():
    found = taylor(quadratic, VARIABLES, jnp.asarray(A), rates=RATES)
    np.testing.assert_allclose(found.relative_error[0], np.abs(RATES) * (G @ A @ G) / (2 * G @ G), rtol=ROUNDING)
    assert np.all(found.relative_error[1] < ROUNDING)


def test_a_difference_within_rounding_is_no_error():
    found = taylor(quadratic, VARIABLES, jnp.asarray(A), rates=[1e-9])
    assert found.true[0] == 0
    assert found.relative_error[0, 0] == 0


def test_a_step_along_a_direction_of_ones_own():
    direction = np.array([0.0, 2.0], np.float32)
    found = taylor(quadratic, VARIABLES, jnp.asarray(A), rates=[1.0], direction=jnp.asarray(direction))
    np.testing.assert_allclose(found.terms[:, 0], [G @ direction, 0.5 * direction @ A @ direction], rtol=ROUNDING)


def test_orders_up_to_the_depth_forecast_a_product_of_weights_exactly():
    def product(variables, batch, rng):
        return LossOutput(jnp.prod(variables["params"]), 1, {})

    weights = jnp.array([0.9, -1.2, 1.1, 0.8])
    found = taylor(product, {"params": weights}, None, rates=[0.5], orders=4)
    expansion = linear_chain.expansion_in_rate(weights, found.gradient)
    np.testing.assert_allclose(found.terms[:, 0], expansion[1:] * 0.5 ** np.arange(1, 5), rtol=ROUNDING)
    assert found.relative_error[3, 0] < ROUNDING < found.relative_error[2, 0]


@pytest.mark.parametrize("kind", [linear_chain.LINEAR, linear_chain.NORMALIZED])
def test_it_agrees_with_the_step_of_a_chain(kind):
    network = linear_chain.chain(jnp.array([linear_chain.LINEAR, kind, kind]), (1e-5,))
    x = jax.random.normal(jax.random.key(0), (16,))
    weights = jnp.array([0.9, -1.2, 1.1])

    def loss(variables, batch, rng):
        return LossOutput(linear_chain.cost(network, variables["params"], batch), 1, {})

    found = taylor(loss, {"params": weights}, x, rates=[0.01, 0.1])
    step = linear_chain.step(network, weights, x, lambda slope: jnp.array([0.01, 0.1]))
    np.testing.assert_allclose(found.terms, [step.forecast, step.second_order], rtol=ROUNDING)
    # Differences of two costs of size 1.
    np.testing.assert_allclose(found.true, step.true, atol=ROUNDING)


def test_functions_with_a_reverse_rule_alone_have_all_orders():
    @jax.custom_vjp
    def cube(w):
        return jnp.sum(w**3)

    cube.defvjp(lambda w: (jnp.sum(w**3), w), lambda w, g: (3 * g * w**2,))

    def loss(variables, batch, rng):
        return LossOutput(cube(variables["params"]), 1, {})

    found = taylor(loss, {"params": jnp.array([2.0])}, None, rates=[1.0], orders=3, direction=jnp.array([1.0]))
    np.testing.assert_allclose(found.terms[:, 0], [12, 6, 1], rtol=ROUNDING)


def test_landscape_of_a_quadratic_loss():
    found = landscape(quadratic, VARIABLES, jnp.asarray(A), rates=RATES)
    there = W - RATES[:, None] * G
    cosines = (there @ A @ G) / np.linalg.norm(there @ A, axis=1) / np.linalg.norm(G)
    curvature = np.linalg.norm(A @ G)
    np.testing.assert_allclose(found.loss_here, of_quadratic(W), rtol=ROUNDING)
    np.testing.assert_allclose(found.gradient_norm, np.linalg.norm(G), rtol=ROUNDING)
    np.testing.assert_allclose(found.loss, of_quadratic(there), rtol=ROUNDING)
    np.testing.assert_allclose(found.gradient_distance, np.abs(RATES) * curvature, rtol=ROUNDING)
    np.testing.assert_allclose(found.gradient_cosine, cosines, rtol=ROUNDING)
    np.testing.assert_allclose(found.beta, curvature / np.linalg.norm(G), rtol=ROUNDING)


def test_beta_smoothness_is_the_greatest_of_all_rates_that_move():
    def quartic(variables, batch, rng):
        return LossOutput(variables["params"] ** 4, 1, {})

    found = landscape(quartic, {"params": jnp.array(1.0)}, None, rates=[0.0, 1.0, 2.0], direction=jnp.array(1.0))
    # (4 (1 + r)^3 - 4) / r
    np.testing.assert_allclose(found.beta, [np.nan, 28, 52], rtol=ROUNDING)
    assert found.beta_smoothness == pytest.approx(52)
    still = landscape(quartic, {"params": jnp.array(1.0)}, None, rates=[0.0])
    assert np.isnan(still.beta_smoothness)


def test_interpolation_of_a_quadratic_loss_on_a_line_and_a_plane():
    corners = [{"params": jnp.asarray(w)} for w in (W, G, np.ones(2, np.float32))]
    a, b = np.array([-0.5, 0.0, 0.3, 1.0]), np.array([0.0, 1.0])
    line = interpolate(quadratic, quadratic, corners[:2], jnp.asarray(A), (a,))
    plane = interpolate(quadratic, quadratic, corners, jnp.asarray(A), (a, b))
    where = W + a[:, None] * (G - W)
    np.testing.assert_allclose(line.recomputed, of_quadratic(where), rtol=ROUNDING)
    assert plane.recomputed.shape == (4, 2)
    np.testing.assert_allclose(plane.recomputed[:, 0], line.recomputed, rtol=ROUNDING)
    np.testing.assert_allclose(plane.recomputed[:, 1], of_quadratic(where + 1 - W), rtol=ROUNDING)


NORM = jaxbn.batch_norm(use_scale=False, use_bias=False, epsilon=1e-12)


def normalized(train):
    """The mean square of the normalized `x w`: 1 whatever w is, where the statistics are right."""

    def loss(variables, batch, rng):
        h = batch @ variables["params"]
        y, moved = NORM.apply({"params": {}, "batch_stats": variables["batch_stats"]}, h, train=train)
        return LossOutput(jnp.sum(y**2), y.size, moved)

    return loss


def test_stale_statistics_show_a_hill_where_there_is_none():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 3)), jnp.float32)
    x = x - jnp.mean(x, axis=0, keepdims=True)
    w = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2)), jnp.float32)
    var = jnp.var(x @ w, axis=0)
    # The other end is the same network with weights three times as large, and its statistics fit.
    ends = [{"params": size * w, "batch_stats": {"mean": jnp.zeros(2), "var": size**2 * var}} for size in (1.0, 3.0)]
    a = np.array([0.0, 0.5, 1.0])
    found = interpolate(normalized(True), normalized(False), ends, x, (a,))
    np.testing.assert_allclose(found.recomputed, 1, rtol=ROUNDING)
    np.testing.assert_allclose(found.stale, (1 + 2 * a) ** 2, rtol=ROUNDING)
    np.testing.assert_allclose(found.averaged, (1 + 2 * a) ** 2 / (1 + 8 * a), rtol=ROUNDING)


def test_counters_are_not_interpolated():
    def loss(variables, batch, rng):
        return LossOutput(variables["params"] * variables["batch_stats"]["step"], 1, {})

    ends = [{"params": jnp.array(1.0), "batch_stats": {"step": jnp.array(step)}} for step in (3, 10)]
    np.testing.assert_allclose(interpolate(loss, loss, ends, None, ([0.5],)).averaged, 3)
