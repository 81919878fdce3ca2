"""Moments of a set of values, and of several sets put together."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._arithmetic import safe_divide, squared
from jaxbn._axis_group import AxisGroup

# The largest |mean - shift| / std at which one pass of sums is kept: squaring loses (1 + ratio**2) roundings of var.
_MAX_RATIO = 2.0
# Each new shift leaves at most the rounding error of a sum, so the second is exact and the third only a reserve.
_MAX_SHIFTS = 3


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
    count = a.count + b.count
    share_a, share_b = safe_divide(a.count, count), safe_divide(b.count, count)
    gap = (b.mean - a.mean) + (b.remainder - a.remainder)
    # By adding zeros, and not by its shape alone, it is sharded as the gap is on a mesh of explicit axes.
    whole = share_b + jnp.zeros_like(gap.real) == 1
    mean = jnp.where(whole, b.mean, a.mean + gap * share_b)
    remainder = jnp.where(whole, b.remainder, ((a.mean - mean) + gap * share_b) + a.remainder)
    var = a.var * share_a + b.var * share_b + squared(gap) * share_a * share_b
    return Measured(count, mean, remainder, var)


def pool_moments(m: Measured, axis: int | Sequence[int], axis_group: AxisGroup) -> Measured:
    """Moments of many sets put together: those along `axis` of m, and those of all shards; measured as x itself is."""
    shifted = partial(_shifted_pool, m, axis, axis_group)
    return measured_until_kept(shifted, shifted(None))


def _shifted_pool(m, axis, axis_group, shift):
    c = (m.mean if shift is None else m.mean - jnp.expand_dims(shift, axis)) + m.remainder
    std = jnp.sqrt(m.var)
    if shift is not None:
        peak = axis_group.psum(jnp.max(jnp.where(m.count == 0, 0, jnp.maximum(jnp.abs(c), std)), axis))
        unit = unit_of(peak)
        c, std = (v / jnp.expand_dims(unit, axis) for v in (c, std))
    count = jnp.broadcast_to(m.count, std.shape)
    sums = count, count * c, count * (squared(std) + squared(c))
    number, first, second = axis_group.psum(jax.tree.map(lambda v: jnp.sum(v, axis), sums))
    return from_sums(number, first, second, shift, None if shift is None else unit)


def measured_until_kept(shifted, first) -> Measured:
    """shifted(shift) -> (Measured, retry): the first, or one from the mean so far until digits are kept."""

    def again(state):
        step, (measured, _) = state
        return step + 1, shifted(measured.mean)

    return lax.while_loop(lambda s: (s[0] < _MAX_SHIFTS) & s[1][1], again, (0, first))[1][0]


def from_sums(count, first, second, shift, unit) -> tuple[Measured, jax.Array]:
    offset, square = safe_divide(first, count), safe_divide(second, count)
    lost = square > (1 + _MAX_RATIO**2) * (square - squared(offset))
    var = jnp.maximum(square - squared(offset), 0)
    if unit is not None:
        offset, var = offset * unit, var * unit * unit
    shift = jnp.zeros_like(offset) if shift is None else shift
    mean = shift + offset
    # No float lies nearer to the mean than such a shift does.
    settled = mean == shift
    retry = jnp.any((lost & ~settled) | jnp.isinf(second))
    return Measured(count, mean, (shift - mean) + offset, var), retry


def unit_of(peak):
    """Peak rounded to a power of two whose reciprocal is a normal number too."""
    limits = jnp.finfo(peak.dtype)
    peak = jnp.clip(peak, limits.smallest_normal, 1 / limits.smallest_normal)
    return lax.reduce_precision(peak, limits.nexp, 0)
