"""Lanczos' method on Hessians whose eigenvalues are known, or are taken from the dense matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import jaxbn
from jaxbn.diagnostics import Spectrum, hessian_vector_product, spectrum
from jaxbn.training import LossOutput

KEY = jax.random.key(0)
ROUNDING = 1e-5  # of eigenvalues, relative to the greatest: tens of roundings of float32
NORM = jaxbn.batch_norm()


def diagonal(variables, batch, rng):
    """A loss with the Hessian diag(batch)."""
    return LossOutput(0.5 * jnp.sum(batch * variables["params"] ** 2), 1, {})


def of_diagonal(values, **arguments):
    values = jnp.asarray(values, float)
    return spectrum(diagonal, {"params": jnp.ones_like(values)}, values, key=KEY, **arguments)


def network(train):
    """The mean square error of a network of 3, 4 and 1 units with batch norm."""

    def loss(variables, batch, rng):
        params = variables["params"]
        of_norm = {"params": params["norm"], "batch_stats": variables["batch_stats"]}
        h, moved = NORM.apply(of_norm, batch @ params["first"], train=train)
        return LossOutput(jnp.sum((jnp.tanh(h) @ params["second"] - 1) ** 2), batch.shape[0], moved)

    return loss


LOSSES = {"in training": network(True), "with frozen statistics": network(False)}
BATCH = 3 * jax.random.normal(KEY, (16, 3))


def variables():
    rng = np.random.default_rng(0)
    of_norm = NORM.init(KEY, jnp.zeros((16, 4)))
    params = {"first": (3, 4), "second": (4, 1)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in params.items()}
    return {"params": params | {"norm": of_norm["params"]}, "batch_stats": of_norm["batch_stats"]}


def dense(loss):
    flat, unravel = ravel_pytree(variables()["params"])

    def mean(flat):
        output = loss(variables() | {"params": unravel(flat)}, BATCH, KEY)
        return output.loss_sum / output.weight_sum

    return jax.hessian(mean)(flat), flat, unravel


@pytest.mark.parametrize("mode", LOSSES)
def test_eigenvalues_of_a_network_are_those_of_the_dense_matrix(mode):
    loss = LOSSES[mode]
    hessian, flat, unravel = dense(loss)
    expected = np.linalg.eigvalsh(np.asarray(hessian, np.float64))
    size = np.max(np.abs(expected))
    found = spectrum(loss, variables(), BATCH, key=KEY, iterations=flat.size)
    np.testing.assert_allclose(found.values[0], expected, atol=ROUNDING * size)
    some = spectrum(loss, variables(), BATCH, key=KEY, iterations=14)
    np.testing.assert_allclose(some.leading(2)[0], expected[::-1][:2], atol=ROUNDING * size)

    product = hessian_vector_product(loss, variables(), BATCH, unravel(jnp.arange(flat.size, dtype=float)))
    np.testing.assert_allclose(ravel_pytree(product)[0], hessian @ jnp.arange(flat.size), atol=25 * ROUNDING * size)


def test_every_ritz_value_is_within_its_error_of_an_eigenvalue():
    eigenvalues = np.linspace(-1, 2, 30) ** 3
    found = of_diagonal(eigenvalues, iterations=8, probes=2)
    nearest = np.min(np.abs(np.asarray(found.values)[..., None] - eigenvalues), axis=-1)
    assert np.all(nearest <= found.errors + ROUNDING * 8)
    assert np.max(found.errors) > 0.01  # eight steps do not settle thirty eigenvalues
    values, errors = found.leading(3)
    assert np.all(np.diff(values) < 0)
    np.testing.assert_array_equal(errors, found.errors[0, ::-1][:3])


def test_quadrature_gives_the_moments_of_a_diagonal_matrix():
    # Starts of 1 and -1 weigh all entries alike, so that even one probe is exact for a diagonal matrix.
    eigenvalues = np.linspace(-1, 2, 30)
    found = of_diagonal(eigenvalues, iterations=4)
    for power in range(8):  # Gauss: exact up to the power of 2 * iterations - 1
        moment = np.sum(found.weights[0] * found.values[0] ** power)
        np.testing.assert_allclose(moment, np.mean(eigenvalues**power), rtol=10 * ROUNDING)


def test_equal_eigenvalues_exhaust_the_subspace_and_are_found_all_the_same():
    found = of_diagonal([1.0, 1, 1, 1, 5, 5], iterations=6, probes=3)
    np.testing.assert_allclose(found.values, np.broadcast_to([1.0, 1, 1, 1, 5, 5], (3, 6)), rtol=ROUNDING)
    np.testing.assert_allclose(np.sum(found.weights * (found.values > 3), axis=1), 1 / 3, rtol=ROUNDING)


def test_a_hessian_of_zeros():
    found = of_diagonal(np.zeros(5), iterations=5)
    np.testing.assert_array_equal(found.values, 0)
    np.testing.assert_array_equal(found.density([0.0], 1.0), jax.scipy.stats.norm.pdf(0.0))


def test_the_density_is_a_sum_of_gaussians_and_integrates_to_one():
    found = Spectrum(jnp.array([[0.0, 2.0], [1.0, 3.0]]), jnp.array([[0.25, 0.75], [0.5, 0.5]]), jnp.zeros((2, 2)))
    points = np.linspace(-10, 13, 2001)
    density = found.density(points, 0.5)
    pairs = zip((0.0, 2.0, 1.0, 3.0), (0.125, 0.375, 0.25, 0.25), strict=True)
    expected = sum(w * np.exp(-2 * (points - v) ** 2) * np.sqrt(2 / np.pi) for v, w in pairs)
    np.testing.assert_allclose(density, expected, atol=ROUNDING)
    assert np.trapezoid(density, points) == pytest.approx(1, rel=ROUNDING)
