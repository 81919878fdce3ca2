"""Mean and variance of an array over some of its axes and over its shards."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxbn._arithmetic import at_least_float32, inner, safe_divide, weighted_sum
from jaxbn._axis_group import AxisGroup, whole_axes
from jaxbn._cpu import on_cpu, sums_on_cpu
from jaxbn._inputs import size_of
from jaxbn._moments import Measured, Sums, around, finite_or_zero, pool_along, pool_moments, sums_around

# One value in so many is measured first, where there are no weights: 1.07 passes over the input in place of 2.
_SAMPLED = 16
# So many shards at most gather the moments of all: at 256, 3 KiB a feature and device.
GATHERED = 256

# By this name the policies of a `jax.checkpoint` know the statistics that derivative rules keep.
STATISTICS = "jaxbn_statistics"


def measure(x: jax.Array, weights: jax.Array | None, axes: tuple[int, ...], axis_group: AxisGroup) -> Measured:
    """Moments of x over `axes`, its mean as two floats; weights as `combined_weights` makes them."""
    return axis_group.select_group(measure_groups(x, weights, axes, axis_group))


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def measure_groups(x: jax.Array, weights: jax.Array | None, axes: tuple[int, ...], axis_group: AxisGroup) -> Measured:
    """`measure` for every group of shards: [features], or [groups, features]."""
    count = _count(x, weights, axes)
    sums = on_cpu(partial(sums_on_cpu, axes), partial(_sums_near_mean, axes), x, weights, count)
    offset, square = safe_divide(sums.first, count), safe_divide(sums.second, count) / sums.unit / sums.unit
    return pool_shards(around(sums.shift, count, offset, square), axis_group, equal_counts=weights is None)


def _sums_near_mean(axes, x, weights, count) -> Sums:
    """Sums around the mean of a sample of x.

    The mean of a share f of all values is within sqrt((1 - f) / f) standard deviations of their mean, whatever they are
    (Cauchy and Schwarz), so that the sums lose at most 1 / f roundings of the variance. With weights the sample is all
    of x: what share of a feature's weight the sampled positions have is known too late.
    """
    if weights is None:
        sampled = at_least_float32(x[sample(x, axes[1:])])
        mean = jnp.sum(sampled, axes) / max(size_of(sampled.shape, axes), 1)
    else:
        mean = safe_divide(weighted_sum(at_least_float32(x), weights, axes), count)
    return sums_around(finite_or_zero(mean), x, weights, axes)


def sample(x: jax.Array, axes: tuple[int, ...]) -> tuple[slice, ...]:
    """Slices of about a sixteenth of the positions of each example, their axes given; all where there are fewer.

    They stay away from the borders where they can. Examples and what a mesh of explicit axes shards stay whole, so that
    each device samples what it has; sizes that are symbols (`jax.export`) too.
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
    """Moments of every group of shards, from those of this one.

    Up to 256 shards gather the moments of all, in one collective; their number of floats grows with the shards. Beyond
    that two sums, first the means, then the distances from their mean: one collective more, of a few floats a feature.

    Args:
      m: [features] each; the count may be a scalar.
      axis_group: the shards.
      equal_counts: whether all shards have the same count, which is then not sent.
    """
    if axis_group.axis_name is None:
        return m
    m = m._replace(count=jnp.broadcast_to(m.count, m.var.shape))
    if axis_group.size() > GATHERED:
        return pool_moments(m, axis_group.psum, axis_group.select_group)
    mean, remainder, var, *sent = axis_group.gather((m.mean, m.remainder, m.var) + (m.count,) * (not equal_counts))
    count = sent[0] if sent else jnp.broadcast_to(m.count, var.shape)
    return pool_along(Measured(count, mean, remainder, var), axis_group.shard_axis)


def _count(x, weights, axes):
    """How many values, or the sum of their weights: [], or [features]."""
    dtype = at_least_float32(x).real.dtype
    if weights is None:
        return jnp.asarray(size_of(x.shape, axes), dtype)
    count = jnp.sum(weights, axes) * size_of(x.shape, [a for a in axes if weights.shape[a] == 1])
    return jnp.broadcast_to(count, [size for axis, size in enumerate(x.shape) if axis not in axes]).astype(dtype)


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
