"""Padding is silent: what a mask leaves out may be NaN or infinite and changes nothing that counts."""

from collections.abc import Sequence
from typing import overload

import jax
import jax.numpy as jnp

from jaxbn._inputs import along, combined_weights


@overload
def silenced(x: jax.Array, weights: jax.Array | None, fill: jax.Array | float = 0) -> jax.Array: ...


@overload
def silenced(x: None, weights: jax.Array | None, fill: jax.Array | float = 0) -> None: ...


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
    fill = jnp.asarray(fill)
    fill = (fill if jnp.iscomplexobj(x) else fill.real).astype(x.dtype)
    return jnp.where((weights == 0) & ~jnp.isfinite(x), fill, x)


def at_running_mean(
    x: jax.Array,
    mean: jax.Array,
    where: jax.Array | None,
    weights: jax.Array | None,
    feature_axis: int | Sequence[int],
) -> jax.Array:
    """`x` as an evaluation reads it: at the running mean, [features], wherever it has no weight and is not finite."""
    return silenced(x, combined_weights(x, where, weights), along(mean, x.ndim, feature_axis))
