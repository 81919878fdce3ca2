"""Small steps of the arithmetic: precision, products of complex numbers, division, weighted sums."""

import jax
import jax.numpy as jnp


def at_least_float32(x: jax.Array) -> jax.Array:
    """X in float32 at least; float64 and complex stay."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def inner(a: jax.Array, b: jax.Array) -> jax.Array:
    """Re(conj(a) b), elementwise."""
    return a.real * b.real + a.imag * b.imag if jnp.iscomplexobj(a) or jnp.iscomplexobj(b) else a * b


def squared(x: jax.Array) -> jax.Array:
    """|x|**2, real."""
    return inner(x, x)


def safe_divide(a, b):
    """A / b, and 0 where b is 0."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


def weighted_sum(values: jax.Array, weights: jax.Array | None, axes: tuple[int, ...]) -> jax.Array:
    """Sum of weights * values over axes, in which a weight of zero silences even a NaN."""
    if weights is None:
        return jnp.sum(values, axes)
    return jnp.sum(jnp.where(weights == 0, 0, weights * values), axes)
