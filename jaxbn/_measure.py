"""Mean and variance of an array over some of its axes and over its shards."""

from collections.abc import Hashable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxbn._arithmetic import at_least_float32, inner, safe_divide, squared, weighted_sum
from jaxbn._axis_group import AxisGroup, axis_group_of, on_one_device, whole_axes
from jaxbn._cpu import cpu_sums, on_cpu
from jaxbn._inputs import canonical_axes, combined_weights, inexact, size_of
from jaxbn._moments import Measured, Moments, pool

# One value in so many is measured first, unless there are weights: 1.07 passes over the input in place of 2.
_SAMPLED = 16

# By this name the policies of a `jax.checkpoint` know the statistics that derivative rules keep.
STATISTICS = "jaxbn_statistics"


def moments(
    x: jax.Array,
    axis: int | Sequence[int] | None = None,
    *,
    where: jax.Array | None = None,
    weights: jax.Array | None = None,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Moments:
    """Count, mean and biased variance of x over `axis`, exact however far the mean lies from zero.

    The values are summed as distances from the mean of a sample of them, in units of their size, so that neither
    cancellation nor overflow of the squares costs digits (Chan, Golub and LeVeque 1983, section 3).

    Args:
      x: floating or complex array of any shape.
      axis: the axes to reduce, as in `jnp.mean`; None reduces all. The remaining axes are the features.
      where: boolean, broadcastable to x: True counts. What it leaves out may be anything, NaN included.
      weights: real, broadcastable to x: a weight of 2 counts as the same value twice. No gradient flows to them.
      axis_name: named axis, or tuple of them, over whose shards the values are pooled.
      axis_index_groups: groups of equal size of indices on `axis_name`; shards pool within their group.

    Returns:
      Moments of shape [features], float32 at least. A feature that saw nothing has count, mean and var 0.

    Raises:
      TypeError: x is not floating or complex, or `where` is not boolean.
      ValueError: an axis out of range or named twice, `where` or `weights` that do not broadcast, an axis name that
        is not bound.
    """
    x = inexact(x)
    axis_group = axis_group_of(axis_name, axis_index_groups)
    return measure(x, combined_weights(x, where, weights), canonical_axes(axis, x.ndim), axis_group).moments


def measure(x: jax.Array, weights: jax.Array | None, axes: tuple[int, ...], axis_group: AxisGroup) -> Measured:
    """Moments of x over `axes`, its mean as two floats; weights as `combined_weights` makes them."""
    return axis_group.select_group(measure_groups(x, weights, axes, axis_group))


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def measure_groups(x: jax.Array, weights: jax.Array | None, axes: tuple[int, ...], axis_group: AxisGroup) -> Measured:
    """`measure` for every group of shards: [features], or [groups, features]."""
    return pool_shards(_measure_shard(x, weights, axes), axis_group, equal_counts=weights is None)


def _measure_shard(x, weights, axes):
    """Moments of this shard, from the sums of c = x - shift and of |c|**2.

    The shift is the mean of a sample of x. The mean of a share f of all values is within sqrt((1 - f) / f) standard
    deviations of their mean, whatever they are (Cauchy and Schwarz), so that the sums lose at most 1 / f roundings of
    the variance. The sample is all of x where there are weights, of which a feature's share is known too late.
    """
    count = _count(x, weights, axes)
    mean = _sampled_mean(x, axes) if weights is None else _refined_mean(x, weights, axes, count)
    # The select also keeps compilers from fusing the division with the addition of shift and offset: the shift that is
    # added has to be the rounded one that is subtracted.
    shift = jnp.where(jnp.isfinite(mean), mean, 0)
    per_unit = _per_unit(shift)
    first, second = on_cpu(partial(cpu_sums, axes), partial(_sums, axes), x, weights, shift, per_unit)
    offset, square = safe_divide(first, count), safe_divide(second, count)
    unit = 1 / per_unit  # Not the square of it, which may overflow.
    var = jnp.maximum(square - squared(offset * per_unit), 0) * unit * unit
    mean = shift + offset
    return Measured(count, mean, (shift - mean) + offset, var)


def _sampled_mean(x, axes):
    """Mean of a sample; where the first value is as near as roundings are, that: a constant is then exact."""
    x = at_least_float32(x[sample(x, axes[1:])])
    mean = safe_divide(jnp.sum(x, axes), jnp.asarray(size_of(x.shape, axes), x.real.dtype))
    if not on_one_device(x) or size_of(x.shape, axes) == 0:
        return mean
    first = x[tuple(0 if axis in axes else slice(None) for axis in range(x.ndim))]
    return jnp.where(jnp.abs(mean - first) <= 2.0**-20 * jnp.abs(first), first, mean)


def _refined_mean(x, weights, axes, count):
    """Weighted mean, and the mean of what is left of it: exact where x is constant."""
    mean = jnp.zeros((), at_least_float32(x).dtype)
    for _ in range(2):
        rest = at_least_float32(x) - (jnp.expand_dims(mean, axes) if mean.ndim else mean)
        mean = mean + safe_divide(weighted_sum(rest, weights, axes), count)
        mean = jnp.where(jnp.isfinite(mean), mean, 0)
    return mean


def sample(x: jax.Array, axes: tuple[int, ...]) -> tuple[slice, ...]:
    """Slices of about a sixteenth of the positions of each example, their axes given; all where there are fewer.

    They stay away from the borders where they can. Examples and what a mesh of explicit axes shards stay whole, sizes
    that are symbols (`jax.export`) too.
    """
    whole = [axis for axis in whole_axes(x, axes) if isinstance(x.shape[axis], int)]
    slices, most = [slice(None)] * x.ndim, _SAMPLED
    if size_of(x.shape, whole) < most:
        return tuple(slices)
    for axis in whole:
        size = x.shape[axis]
        stride = min(most, size)
        slices[axis] = slice((size - 1) % stride // 2, None, stride)
        most //= stride
    return tuple(slices)


def pool_shards(m: Measured, axis_group: AxisGroup, *, equal_counts: bool = False) -> Measured:
    """Moments of every group of shards, from those of this one, in one collective of vectors.

    Args:
      m: [features] each; the count may be a scalar.
      axis_group: the shards.
      equal_counts: whether all shards have the same count, which is then not sent.
    """
    if axis_group.axis_name is None:
        return m
    m = m._replace(count=jnp.broadcast_to(m.count, m.var.shape))
    mean, remainder, var, *sent = axis_group.gather((m.mean, m.remainder, m.var) + (m.count,) * (not equal_counts))
    count = sent[0] if sent else jnp.broadcast_to(m.count, var.shape)
    return pool(Measured(count, mean, remainder, var), axis_group.shard_axis)


def _count(x, weights, axes):
    """How many values, or the sum of their weights: [], or [features]."""
    dtype = at_least_float32(x).real.dtype
    if weights is None:
        return jnp.asarray(size_of(x.shape, axes), dtype)
    count = jnp.sum(weights, axes) * size_of(x.shape, [a for a in axes if weights.shape[a] == 1])
    return jnp.broadcast_to(count, [size for axis, size in enumerate(x.shape) if axis not in axes]).astype(dtype)


def _per_unit(shift):
    """A power of two, 2**-30 over the shift: [features]. What it scales neither overflows nor underflows when squared.

    For c that is not 0 is at least 2**-25 of the shift, by which it was rounded, and may be up to 2**78 of it. Where
    the shift is 0 c may be from 1e-17 to 1e18.
    """
    limits = jnp.finfo(shift.dtype)
    ratio = 2.0**-30 / jnp.where(shift == 0, 2.0**-22, jnp.abs(shift))
    return lax.reduce_precision(jnp.clip(ratio, limits.smallest_normal, 1 / limits.smallest_normal), limits.nexp, 0)


def _sums(axes, x, weights, shift, per_unit):
    """Sums of c = x - shift and of |c * per_unit|**2 over `axes`: [features]."""
    c = at_least_float32(x) - jnp.expand_dims(shift, axes)
    second = squared(c * jnp.expand_dims(per_unit, axes))
    return weighted_sum(c, weights, axes), weighted_sum(second, weights, axes)


@measure_groups.defjvp
def _measure_jvp(axes, axis_group, primals, tangents):
    x, weights = primals
    measured = checkpoint_name(measure_groups(x, weights, axes, axis_group), STATISTICS)
    dmean, half_dvar = _mean_tangents(x, weights, measured, tangents[0], axes, axis_group)
    zero_count, zero_remainder = jnp.zeros_like(measured.count), jnp.zeros_like(measured.remainder)
    return measured, Measured(zero_count, dmean, zero_remainder, 2 * half_dvar)


@partial(jax.checkpoint, prevent_cse=False, static_argnums=(4, 5))
def _mean_tangents(x, weights, measured, dx, axes, axis_group):
    """mean(dx) and mean(Re(conj(x - mean) dx)); what is kept for the backward pass is x and three vectors."""
    c = centered(x, axis_group.select_group(measured), axes)
    return tangent_means(at_least_float32(dx), c, weights, measured.count, axes, axis_group)


def tangent_means(dx, c, weights, count, axes, axis_group):
    """mean(dx) and mean(Re(conj(c) dx)) over axes and shards, weighted, in one collective: as `axis_group.psum`."""
    share = safe_divide(jnp.ones_like(count), count)
    # A NaN that has no weight is silenced here too: times the zero cotangent of its sum it would be NaN again.
    c = c if weights is None else jnp.where(weights == 0, 0, c)
    local = weighted_sum(dx, weights, axes), weighted_sum(inner(c, dx), weights, axes)
    first, second = axis_group.psum(local)
    return first * share, second * share


def centered(x: jax.Array, measured: Measured, axes: tuple[int, ...]) -> jax.Array:
    """X minus its exact mean, float32 at least."""
    return (at_least_float32(x) - jnp.expand_dims(measured.mean, axes)) - jnp.expand_dims(measured.remainder, axes)
