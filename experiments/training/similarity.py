"""How alike two representations of the same examples are."""

import jax.numpy as jnp
from jax import Array


def linear_cka(x: Array, y: Array) -> Array:
    """Linear centered kernel alignment, []: from 0 to 1, and 1 where one is a rotated and scaled copy of the other.

    `|Y'X|^2 / (|X'X| |Y'Y|)` in Frobenius norms, of the columns less their means (Kornblith et al. 2019); 0 where one
    of the two is the same for all examples, which is like nothing.

    Args:
      x: [examples, units].
      y: [examples, other units].
    """
    x, y = _centered(x), _centered(y)
    size = jnp.linalg.norm(x.T @ x) * jnp.linalg.norm(y.T @ y)
    return jnp.where(size > 0, jnp.sum((y.T @ x) ** 2) / jnp.where(size > 0, size, 1), 0)


def _centered(x: Array) -> Array:
    """Columns of mean 0; the whole brought to a largest entry of 1, so that no fourth power leaves float32."""
    x = x - jnp.mean(x, axis=0, keepdims=True)
    largest = jnp.max(jnp.abs(x))
    return x / jnp.where(largest > 0, largest, 1)
