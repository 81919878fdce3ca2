"""Moments of a set of values, and of several sets put together."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._arithmetic import at_least_float32, safe_divide, squared, weighted_sum

# The least var / mean(|x - shift|**2) that is no mere rounding; a shift is at most 4 standard deviations off: 1 / 17.
_FLAT = 2.0**-10


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


class Sums(NamedTuple):
    """Sums over the values of each feature, around a shift.

    Attributes:
      unit: a power of two, by which distances are multiplied before they are squared: [features].
      shift: [features].
      first: sum of x - shift.
      second: sum of |unit (x - shift)|**2.
    """

    unit: jax.Array
    shift: jax.Array
    first: jax.Array
    second: jax.Array


def sums_around(shift: jax.Array, x: jax.Array, weights: jax.Array | None, axes: tuple[int, ...]) -> Sums:
    """Sums of x over `axes`, around a shift [features]."""
    unit = unit_near(shift)
    c = at_least_float32(x) - jnp.expand_dims(shift, axes)
    second = squared(jnp.expand_dims(unit, axes) * c)
    return Sums(unit, shift, weighted_sum(c, weights, axes), weighted_sum(second, weights, axes))


def unit_near(shift: jax.Array) -> jax.Array:
    """A power of two by which c = x - shift can be multiplied, so that its square is a normal number of float32.

    That is 2**-8 for c from 1e-17 to 1e18. Near a smaller shift, of which c that is not 0 is at least 2**-25, by which
    it was rounded, 2**-30 / |shift|.
    """
    size = jnp.abs(shift)
    unit = jnp.where((size == 0) | (size > 2.0**-32), 2.0**-8, 2.0**-30 / size)
    return lax.reduce_precision(unit, jnp.finfo(size.dtype).nexp, 0)


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
    return pool_along(jax.tree.map(lambda *both: jnp.stack([v + zeros for v in both]), a, b), axis=0)


def pool_moments(m: Measured, total: Callable, own: Callable = lambda v: v) -> Measured:
    """Moments of many sets put together, exactly.

    share_i = n_i / n; mean = sum(share_i mean_i); var = sum(share_i (var_i + |mean_i - mean|**2)) (Chan, Golub and
    LeVeque 1983, section 2).

    Args:
      m: moments of each set, all of one shape.
      total: total(tree) -> its sum over the sets, in one go.
      own: own(v) -> what `total` returned, shaped to meet the entries of each set.
    """
    means = jnp.where(m.count == 0, 0, m.mean)
    count, first = total((m.count, m.count * means))
    center, whole = finite_or_zero(safe_divide(first, count)), own(count)
    # By a division alone, which compilers turn into a product, a set with all the values would not stay as it is.
    share = jnp.where((m.count == whole) & (whole != 0), 1, safe_divide(m.count, whole))
    c = (means - own(center)) + m.remainder
    offset, square = total((share * c, share * (m.var + squared(c))))
    return around(center, count, offset, square)


def pool_along(m: Measured, axis: int) -> Measured:
    """`pool_moments` of the sets that lie along an axis of m."""
    m = m._replace(count=jnp.broadcast_to(m.count, m.var.shape))
    return pool_moments(m, partial(jax.tree.map, partial(jnp.sum, axis=axis)), partial(jnp.expand_dims, axis=axis))


def around(shift: jax.Array, count: jax.Array, offset: jax.Array, square: jax.Array) -> Measured:
    """Moments from a shift near the mean, mean(x - shift) and mean(|x - shift|**2)."""
    var = square - squared(offset)
    # All values are equal, and the shift is theirs but for its rounding: what is left of the variance is rounding too.
    flat = var < _FLAT * square
    mean = shift + offset
    return Measured(count, mean, jnp.where(flat, 0, (shift - mean) + offset), jnp.where(flat, 0, var))


def finite_or_zero(shift: jax.Array) -> jax.Array:
    """A shift that can be subtracted.

    The select also keeps compilers from fusing the division that made the shift with the addition of an offset to it:
    what is added has to be the rounded number that is subtracted.
    """
    return jnp.where(jnp.isfinite(shift), shift, 0)
