"""Mean and variance of an array over some of its axes and over its shards."""

from collections.abc import Hashable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxbn._arithmetic import at_least_float32, inner, safe_divide, squared, weighted_sum
from jaxbn._axis_group import AxisGroup, axis_group_of
from jaxbn._cpu import Rows, as_they_are, long_rows, on_cpu, unfused
from jaxbn._inputs import canonical_axes, combined_weights, inexact, size_of
from jaxbn._moments import Measured, Moments, from_sums, measured_until_kept, unit_of

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

    One pass over x where |mean| is at most 2 standard deviations or so; otherwise x is measured again from a shift
    near its mean, so that neither cancellation nor overflow of the squares costs digits (Chan, Golub and LeVeque 1983,
    section 3).

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
    return axis_group.select_group(measure_groups(x, weights, None, axes, axis_group))


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def measure_groups(
    x: jax.Array,
    weights: jax.Array | None,
    guess: jax.Array | None,
    axes: tuple[int, ...],
    axis_group: AxisGroup,
) -> Measured:
    """`measure` for every group of shards: as `axis_group.psum` gives it.

    The guess, a mean near that of x (the running one), saves a pass where the mean is far from zero. It changes
    roundings only. Shards that share statistics would have to share it: without axis names alone.
    """
    if axis_group.axis_name is not None or weights is not None:
        guess = None  # Under weights XLA would send the count, the same in both branches, in a collective of its own.
    if axis_group.branch:
        return _measure_until_kept(x, weights, guess, axes, axis_group)
    shifted = partial(_shifted, x, weights, axes, axis_group)
    mean = shifted(None)[0].mean
    # Where it can, a compiler fuses the division that made the mean with the addition of an offset to it, and the mean
    # that is subtracted from x is not the one that is reported. A select stands in its way; a loop does too.
    return shifted(jnp.where(jnp.isfinite(mean), mean, 0))[0]


# Compiled once a shape: called op by op, a loop whose body is a new closure would be compiled at every call.
@partial(jax.jit, static_argnums=(3, 4))
def _measure_until_kept(x, weights, guess, axes, axis_group) -> Measured:
    shifted = partial(_shifted, x, weights, axes, axis_group)
    return measured_until_kept(shifted, _first(shifted, guess))


def _first(shifted, guess):
    """Sums from the mean that is guessed: free where the subtraction is fused into the sum.

    On a CPU sums from zero are those that libraries have fastest.
    """
    if guess is None:
        return shifted(None)
    near = partial(shifted, in_units=False)
    return lax.platform_dependent(guess, cpu=lambda _: shifted(None), default=near)


def _shifted(x, weights, axes, axis_group, shift, in_units=True) -> tuple[Measured, jax.Array]:
    """Moments from the sums of c and |c|**2 for c = x - shift, and whether they lost too much to be kept."""
    # The first sums take their chance; done again they are in units of the peak, whose squares cannot overflow.
    unit = None
    if shift is not None and in_units:
        # Tied to what changes from step to step, x is not converted outside of a loop that hardly ever runs.
        x, _ = lax.optimization_barrier((x, shift))
        unit = _peak_unit(x, shift, weights, axes, axis_group)
    count, first, second = _sums(x, shift, unit, weights, axes, axis_group)
    return from_sums(count, first, second, shift, unit)


def _sums(x, shift, unit, weights, axes, axis_group):
    """Count, sum of c = (x - shift) / unit and of |c|**2, the last two [features], over axes and shards, in one go."""
    shift, unit = (None if v is None else axis_group.select_group(v) for v in (shift, unit))
    short = Rows(x.shape, axes)
    long = long_rows(x, axes) if weights is None else short
    sums = partial(_local_sums, weights)
    first, second = on_cpu(partial(sums, long, unfused), partial(sums, short, as_they_are), x, shift, unit)
    if weights is None:
        count = jnp.asarray(size_of(x.shape, axes) * axis_group.size(), second.dtype)
        first, second = axis_group.psum((first, second))
        return count if axis_group.groups is None else jnp.broadcast_to(count, second.shape), first, second
    count = jnp.sum(weights, axes) * size_of(x.shape, [a for a in axes if weights.shape[a] == 1])
    count = jnp.broadcast_to(count, second.shape).astype(second.dtype)
    return axis_group.psum((count, first, second))


def _local_sums(weights, rows, separate, x, shift, unit):
    """Sums of c and |c|**2 over the rows; separate(arrays, number) keeps one sum from sharing them with the other."""

    def deviation(number):
        part, *vectors = separate((rows.lay(x), shift, unit), number)
        return _deviation(part, *(None if v is None else rows.broadcast(v) for v in vectors))

    c, again = deviation(1), squared(deviation(2))
    if weights is None:
        return rows.sum(c), rows.sum(again)
    return weighted_sum(c, weights, rows.axes), weighted_sum(again, weights, rows.axes)


def _deviation(x, shift, unit):
    """(x - shift) / unit."""
    c = at_least_float32(x) if shift is None else at_least_float32(x) - shift
    return c if unit is None else c / unit


def _peak_unit(x, shift, weights, axes, axis_group):
    """Power of two near the largest |c| of each feature; the shards' peaks are summed, which bounds their maximum."""
    c = _deviation(x, jnp.expand_dims(axis_group.select_group(shift), axes), None)
    size = jnp.abs(c) if weights is None else jnp.where(weights == 0, 0, jnp.abs(c))
    return unit_of(axis_group.psum(jnp.max(size, axes, initial=0)))


@measure_groups.defjvp
def _measure_jvp(axes, axis_group, primals, tangents):
    x, weights, guess = primals
    measured = checkpoint_name(measure_groups(x, weights, guess, axes, axis_group), STATISTICS)
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
