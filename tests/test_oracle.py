"""The oracle itself: against exact rational arithmetic, against autodiff of the plain formula, against differences."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import plain, reference, relative_errors

RNG = np.random.default_rng(0)
# Two correct float64 programs differ by a few hundred roundings of 1.1e-16.
FLOAT64 = {"rtol": 1e-12, "atol": 1e-13}


def draw(*shape, dtype=np.float64):
    values = RNG.normal(size=shape)
    return values + 1j * RNG.normal(size=shape) if dtype == np.complex128 else values


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e3, 1e6, 1e18])
def test_statistics_equal_exact_rational_arithmetic(offset):
    x = (offset + max(1.0, offset / 1e6) * RNG.normal(size=37)).astype(np.float32)
    exact = [Fraction(float(v)) for v in x]
    mean = sum(exact) / len(exact)
    var = sum((v - mean) ** 2 for v in exact) / len(exact)
    ours, _ = reference(x[:, None], axis=0)
    # A float64 mean is rounded once; the deviations carry 1e-16 of the offset, here a millionth of it at most.
    np.testing.assert_allclose(ours.mean[0], float(mean), rtol=1e-15)
    np.testing.assert_allclose(ours.var[0], float(var), rtol=1e-9)


CASES = {
    "plain": ((12, 3), (0,), None, np.float64),
    "convolution": ((4, 3, 3, 2), (0, 1, 2), None, np.float64),
    "channels first": ((4, 2, 3, 3), (0, 2, 3), None, np.float64),
    "weights": ((12, 3), (0,), RNG.uniform(0.1, 2, (12, 1)), np.float64),
    "mask": ((12, 3), (0,), (RNG.uniform(size=(12, 3)) > 0.3) * 1.0, np.float64),
    "complex": ((12, 3), (0,), RNG.uniform(0.1, 2, (12, 1)), np.complex128),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_autodiff_of_the_plain_formula(case):
    shape, axis, weights, dtype = CASES[case]
    x, dy = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype)
    features = tuple(n for a, n in enumerate(shape) if a not in axis)
    scale, bias = draw(*features), draw(*features)
    exact, _ = reference(x, dy, scale, bias, axis=axis, epsilon=0.1, weights=weights)
    with jax.enable_x64(True):

        def forward(x, scale, bias):
            scale, bias = (jnp.expand_dims(v, axis) for v in (scale, bias))
            return plain(x, scale, bias, axis=axis, epsilon=0.1, weights=weights)

        def loss(*arguments):
            return jnp.sum(forward(*arguments) * dy).real

        arguments = jnp.asarray(x), jnp.asarray(scale), jnp.asarray(bias)
        gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arguments)
        np.testing.assert_allclose(exact.y, jax.jit(forward)(*arguments), **FLOAT64)
    for ours, autodiff in zip(exact[4:], gradients, strict=True):
        np.testing.assert_allclose(ours, autodiff, **FLOAT64)


def test_gradients_equal_finite_differences():
    x, dy, scale, bias = draw(7, 2), draw(7, 2), draw(2), draw(2)
    h = 1e-6

    def loss(x, scale, bias):
        return np.sum(reference(x, dy, scale, bias, axis=0)[0].y * dy)

    exact, _ = reference(x, dy, scale, bias, axis=0)
    for index, gradient in enumerate(exact[4:]):
        for position in np.ndindex(gradient.shape):
            high, low = ([x.copy(), scale.copy(), bias.copy()] for _ in range(2))
            high[index][position] += h
            low[index][position] -= h
            # Central differences: h^2 of curvature and 1e-16 / h of rounding, both about 1e-10 to 1e-12.
            np.testing.assert_allclose((loss(*high) - loss(*low)) / (2 * h), gradient[position], atol=1e-8)


def test_error_measure_sees_a_wrong_feature_among_right_ones():
    x = draw(50, 3) * np.array([1.0, 1e9, 1e-9])
    exact, sizes = reference(x, axis=0, epsilon=0.0)
    wrong = {"y": exact.y * np.array([1, 1, 1 + 1e-5]), "mean": exact.mean, "var": exact.var * (1 + 1e-4)}
    errors = relative_errors(wrong, exact, sizes, axis=0, sensitivity=0.0)
    assert errors["mean"] == 0
    np.testing.assert_allclose([errors["y"], errors["var"]], [1e-5, 1e-4], rtol=1e-6)


def test_error_measure_reports_nan_as_infinite():
    exact, sizes = reference(draw(5, 2), axis=0)
    assert relative_errors({"y": exact.y * np.nan}, exact, sizes, axis=0)["y"] == np.inf
