"""Padding is silent: what a mask leaves out may be NaN or infinite and changes nothing that counts."""

import jax
import jax.numpy as jnp


def silenced(x: jax.Array | None, weights: jax.Array | None, fill: jax.Array | float = 0) -> jax.Array | None:
    """`x` with `fill` wherever it has no weight and is not finite.

    Leaving such a value out of the statistics is not enough: where it takes part in y, its cotangent is 0, and in the
    gradients of the parameters 0 times NaN is NaN.

    Args:
      x: the array, or None, which stays.
      weights: as `combined_weights` makes them, or None: everything counts.
      fill: broadcastable to x.
    """
    if x is None or weights is None:
        return x
    return jnp.where((weights == 0) & ~jnp.isfinite(x), jnp.asarray(fill, x.dtype), x)
