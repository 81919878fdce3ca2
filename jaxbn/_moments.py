"""Moments of a set of values, and of several sets put together."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._arithmetic import safe_divide, squared


class Moments(NamedTuple):
    """What one set of values says of each feature.

    Attributes:
      count: how many values each feature saw, or the sum of their weights: float32 at least, [] or [features].
      mean: [features], float32 at least; complex for complex values.
      var: the biased variance, mean(|x - mean|**2): [features], real, float32 at least.
    """

    count: jax.Array  # type: ignore[assignment]  # The field hides tuple.count, which nobody needs here.
    mean: jax.Array
    var: jax.Array


class Measured(NamedTuple):
    """Moments whose mean is kept as two floats: the exact mean is `mean + remainder`."""

    count: jax.Array  # type: ignore[assignment]  # As in Moments.
    mean: jax.Array
    remainder: jax.Array
    var: jax.Array

    @property
    def moments(self) -> Moments:
        """The same with the mean rounded to one float."""
        return Moments(self.count, self.mean, self.var)


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Moments of the values behind `a` and the values behind `b` put together, exactly.

    mean = mean_a + (mean_b - mean_a) n_b / n; var = (n_a var_a + n_b var_b) / n + |mean_b - mean_a|**2 n_a n_b / n**2
    (Chan, Golub and LeVeque 1983, equation 2.1). Zero count is the neutral element; two of them give zeros.

    Args:
      a: Moments of any shape.
      b: Moments of the same or a broadcastable shape.
    """
    first, second = (Measured(m.count, m.mean, jnp.zeros_like(m.mean), m.var) for m in (a, b))
    return merge_measured(first, second).moments


def merge_measured(a: Measured, b: Measured) -> Measured:
    """`merge_moments` for means that are kept as two floats."""
    # By adding zeros, and not by their shape alone, vectors are sharded alike too on a mesh of explicit axes.
    zeros = sum(jnp.zeros_like(v.real) for v in (*a, *b))
    return pool(jax.tree.map(lambda *both: jnp.stack([v + zeros for v in both]), a, b), axis=0)


def pool(m: Measured, axis: int | Sequence[int]) -> Measured:
    """Moments of all the values behind those along `axis` of m, whose fields have one shape, exactly.

    share_i = n_i / n; mean = sum(share_i mean_i); var = sum(share_i (var_i + |mean_i - mean|**2)) (Chan, Golub and
    LeVeque 1983, section 2). Distances are taken from the rounded mean first, then from what rounding it lost.
    """
    count = jnp.sum(m.count, axis)
    whole = jnp.expand_dims(count, axis)
    # By a division alone, which compilers turn into a product, a set with all the values would not stay as it is.
    share = lax.stop_gradient(jnp.where((m.count == whole) & (whole != 0), 1, safe_divide(m.count, whole)))
    means = jnp.where(m.count == 0, 0, m.mean)
    center = lax.stop_gradient(jnp.sum(share * means, axis))
    center = jnp.where(jnp.isfinite(center), center, 0)  # As in `_measure`: what is subtracted is what is added.
    c = (means - jnp.expand_dims(center, axis)) + m.remainder
    offset = jnp.sum(share * c, axis)
    # In units of the largest, a power of two, squares neither overflow nor underflow. Nothing cancels below, for the
    # offset is no more than what rounding the center lost.
    peak = lax.stop_gradient(jnp.max(jnp.maximum(jnp.abs(c), jnp.sqrt(m.var)), axis))
    limits = jnp.finfo(peak.dtype)
    unit = lax.reduce_precision(jnp.clip(peak, limits.smallest_normal, 1 / limits.smallest_normal), limits.nexp, 0)
    per_unit = jnp.expand_dims(1 / unit, axis)
    square = jnp.sum(share * (m.var * per_unit * per_unit + squared(c * per_unit)), axis)
    var = (square - squared(offset / unit)) * unit * unit
    mean = center + offset
    return Measured(count, mean, (center - mean) + offset, var)
