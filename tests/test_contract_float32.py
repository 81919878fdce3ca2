"""In float32 outputs and gradients of every normalizer are those of float64, on hard features too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from normalizers import AGAIN, CASES, QUICK, draw, ready

run = pytest.mark.parametrize(
    "name",
    # The noise that `noisy` draws from one key differs between dtypes.
    [pytest.param(name, marks=pytest.mark.slow if name in AGAIN else ()) for name in CASES if name != "noisy"],
)
# Relative to the largest entry. Statistics that are near 0 divide by sqrt(epsilon), 1/300, where terms cancel.
ROUNDED = 2e-5
# An eigenvalue that is 0 but for epsilon = 1e-5 is known to the rounding of the largest, some 10: to a tenth at worst,
# of directions in which nothing of x lies.
BY_EIGENVALUES = 5e-3


def inputs():
    """[kinds, ...]: features as they come, one constant, one nearly constant, all made of two, and all equal."""
    x = np.array(draw(), np.float64)
    rng = np.random.default_rng(5)
    constant, nearly = x.copy(), x.copy()
    constant[..., 1] = 2.5
    nearly[..., 1] = 2.5 + 2.0**-12 * np.round(4 * rng.normal(size=x.shape[:-1]))
    dependent = np.round(8 * x[..., :2]) / 8 @ np.array([[1.0, -2.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    return np.stack([x, constant, nearly, dependent, np.full_like(x, 1.5)]).astype(np.float32)


KINDS = ("as they come", "one constant", "one nearly constant", "dependent", "all equal")


@functools.cache
def observed(name, dtype):
    """y and the gradients by params and x, [kinds, ...] each."""
    norm, arguments = ready(name).norm, CASES[name].arguments
    with jax.enable_x64(dtype == np.float64):
        wide = lambda v: jnp.asarray(v, dtype if np.asarray(v).dtype == np.float32 else np.asarray(v).dtype)
        variables, dy = jax.tree.map(wide, jax.device_get((ready(name).variables, draw(7))))

        def loss(params, x):
            y, _ = norm.apply({**variables, "params": params}, x, train=True, **arguments)
            return jnp.sum(y * dy), y

        gradient = jax.grad(loss, (0, 1), has_aux=True)
        each = lambda xs: jax.lax.map(functools.partial(gradient, variables["params"]), xs)
        return jax.device_get(jax.jit(each, compiler_options=QUICK)(wide(inputs())))


@run
@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
def test_float32_is_float64_rounded(name, kind):
    by_eigenvalues = name == "whitening_norm" and KINDS[kind] == "dependent"
    tolerance = BY_EIGENVALUES if by_eigenvalues else ROUNDED
    both = (jax.tree.leaves(observed(name, dtype)) for dtype in (np.float32, np.float64))
    for narrow, wide in zip(*both, strict=True):
        error = np.max(np.abs(narrow[kind] - wide[kind]))
        assert error <= tolerance * np.max(np.abs(wide[kind]), initial=1e-3), error
