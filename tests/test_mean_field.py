"""The networks of the experiment `mean_field` against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.training.equal_layers import (
    BATCH,
    CONSTANT,
    LINEAR,
    NONE,
    RELU,
    Arm,
    Drawn,
    flow,
    linear_rate,
    normalized,
    relu_rate,
)


def test_rate_of_the_theory_tends_to_its_limit_from_above():
    assert relu_rate(1e9) == pytest.approx(np.pi / (np.pi - 1))
    assert (np.diff(relu_rate(2.0 ** np.arange(3, 20))) < 0).all()
    assert linear_rate(1e9) == pytest.approx(1)


@pytest.mark.parametrize("batch", [8, 32])
def test_rate_of_the_theory_is_that_of_one_wide_random_layer(batch):
    """One layer far from both ends, by sampling its units: theorem 8 without its algebra."""
    rng = np.random.default_rng(0)
    h, gradient = rng.standard_normal((2, batch, 40_000))
    gradient -= gradient.mean(0)  # as it comes from the norm of the layer above
    deviation = h.std(0)
    z = (h - h.mean(0)) / deviation
    x = np.maximum(z, 0)
    variance = 2 * np.mean(np.var(x, 0, ddof=1))  # of the next h between examples; here it is 1: weights of 2 / width
    down = (z > 0) * gradient
    down = (down - down.mean(0) - z * np.mean(z * down, 0)) / deviation
    assert 2 * np.mean(down**2) / np.mean(gradient**2) / variance == pytest.approx(relu_rate(batch), rel=0.01)


def network(depth=3, width=4, batch=6, seed=0):
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal(shape) for shape in ((5, width), (depth, width, width), (batch, 5), (batch, width))]
    first, kernels, images, direction = (jnp.asarray(one, jnp.float32) for one in arrays)
    return Drawn(first, kernels, images, jnp.zeros(batch, int), direction, noise=images)


def test_gradients_of_a_linear_network_are_products_of_its_weights():
    own = network()
    found = flow(Arm(NONE, LINEAR, 1.0, 0.0), own)
    gradient, expected = np.asarray(own.direction, np.float64), []
    for kernel in np.asarray(own.kernels, np.float64)[::-1]:
        gradient = gradient @ kernel.T
        expected.append(np.log(np.mean(gradient**2)))
    np.testing.assert_allclose(found, expected[::-1], rtol=1e-5)


def test_statistics_held_constant_change_the_gradient_alone():
    h = jax.random.normal(jax.random.key(0), (6, 4))
    values = [normalized(kind, h) for kind in (BATCH, CONSTANT)]
    np.testing.assert_array_equal(*values)
    gradient = jax.grad(lambda h: normalized(CONSTANT, h)[0].sum())(h)
    expected = np.zeros((6, 4))
    expected[0] = 1 / np.sqrt(np.var(h, 0) + 1e-5)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_growth_does_not_depend_on_the_size_of_the_weights():
    one, ten = (flow(Arm(BATCH, RELU, gain, 0.0), network(width=16)) for gain in (100.0, 1000.0))
    np.testing.assert_allclose(ten[1:], one[1:], atol=1e-4)  # the first h is the images', whatever the gain
