"""Statistics by segment: of each graph, each packed sequence, each drawn group of examples; and normalizing by them.

Places lie in any order of their segments. One in no segment is padding: it counts nowhere, and comes out as if it lay
at the mean.
"""

import numbers
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxbn._arithmetic import at_least_float32, inner, safe_divide, squared
from jaxbn._axis_group import AxisGroup
from jaxbn._inputs import size_of
from jaxbn._measure import STATISTICS, pool_shards
from jaxbn._moments import Measured, around, finite_or_zero, unit_near
from jaxbn._padding import silenced

# Sums in so many parts at most, each of fewer values: while the parts take no more than a quarter of the array's room.
_LANES = 256


class Segments(NamedTuple):
    """The static part of sums by segment.

    Attributes:
      number: how many segments there are.
      axes: the axes of the array that are reduced.
      along: those of them, the first, along which the segment of a place is stated; in the others all is of one.
      axis_group: shards over which the segments are spread.
    """

    number: int
    axes: tuple[int, ...]
    along: tuple[int, ...]
    axis_group: AxisGroup

    def total(self, values: jax.Array, ids: jax.Array) -> jax.Array:
        """Sums by segment on this shard: [segments, features]."""
        mesh_axes = jax.typeof(values).sharding.spec
        features = [name for axis, name in enumerate(mesh_axes) if axis not in self.axes]
        return _on_any_mesh(self._total, (None, *features), values, ids)

    def _total(self, values, ids):
        values = jnp.sum(values, self.axes[len(self.along) :])
        values = jnp.moveaxis(values, self.along, range(len(self.along)))
        rows = values.reshape(ids.size, *values.shape[len(self.along) :])
        # Neighbours go to lanes of their own: what is added one after the other loses digits to what came before.
        lanes = max(1, min(_LANES, ids.size // (4 * self.number)))
        lane = jnp.arange(ids.size, dtype=jnp.int32) % lanes
        slots = jnp.where(ids.ravel() < self.number, lane * self.number + ids.ravel(), lanes * self.number)
        sums = jax.ops.segment_sum(rows, slots, lanes * self.number)
        return jnp.sum(sums.reshape(lanes, self.number, *rows.shape[1:]), 0)

    def spread(self, rows: jax.Array, ids: jax.Array, x: jax.Array) -> jax.Array:
        """To each place what its segment has, [segments, features] to what broadcasts to x; 0 to padding."""
        trailing = self.axes[len(self.along) :]
        mesh_axes = jax.typeof(x).sharding.spec
        return _on_any_mesh(
            self._spread, [None if a in trailing else name for a, name in enumerate(mesh_axes)], rows, ids
        )

    def _spread(self, rows, ids):
        values = rows.at[ids].get(mode="fill", fill_value=0)
        values = jnp.moveaxis(values, range(len(self.along)), self.along)
        return jnp.expand_dims(values, self.axes[len(self.along) :])

    def members(self, ids: jax.Array, ndim: int) -> jax.Array:
        """Whether a place is in a segment: boolean, broadcastable to the array, which has `ndim` axes."""
        return jnp.expand_dims(ids < self.number, [axis for axis in range(ndim) if axis not in self.along])


def _on_any_mesh(f, mesh_axes, *arrays):
    """Apply f; on a mesh of explicit axes XLA finds out how its parts meet, as on one of automatic axes.

    Args:
      f: with scatters, gathers and reshapes.
      mesh_axes: of each axis of the result.
      *arrays: its arguments.
    """
    mesh = jax.typeof(arrays[0]).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return f(*arrays)
    return jax.sharding.auto_axes(f, out_sharding=NamedSharding(mesh, P(*mesh_axes)))(*arrays)


def segments_of(
    x: jax.Array, axes: tuple[int, ...], segment_ids, num_segments, axis_group: AxisGroup
) -> tuple[jax.Array, Segments]:
    """What users pass, checked: ids with those out of range moved to `num_segments`, and the static part.

    Raises:
      TypeError: ids that are not integers, or a number of segments that is none.
      ValueError: one of the two without the other, fewer than 1 segment, or ids of another shape than x's.
    """
    if segment_ids is None or num_segments is None:
        missing, given = ("segment_ids", "num_segments") if segment_ids is None else ("num_segments", "segment_ids")
        raise ValueError(f"{given} came without {missing}; pass both, the ids as array, their number as int.")
    if not isinstance(num_segments, numbers.Integral):
        raise TypeError(f"num_segments={num_segments!r}; expected an int, known at trace time: it is a shape.")
    if num_segments < 1:
        raise ValueError(f"num_segments={num_segments}; expected at least 1.")
    ids, number = jnp.asarray(segment_ids), int(num_segments)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"segment_ids has dtype {ids.dtype}; expected integers from 0 to {num_segments - 1}.")
    along = axes[: ids.ndim]
    if ids.ndim == 0 or ids.shape != tuple(x.shape[axis] for axis in along):
        raise ValueError(
            f"segment_ids has shape {ids.shape}; x of shape {x.shape} reduced over axes {axes} wants one id for each"
            f" place along the first of them: shape {tuple(x.shape[a] for a in axes[:1])}, or more of"
            f" {tuple(x.shape[axis] for axis in axes)}."
        )
    ids = ids.astype(jnp.int32)  # Before `number` meets them: narrower integers may not hold it.
    ids = jnp.where((ids >= 0) & (ids < number), ids, number)
    return ids, Segments(number, axes, along, axis_group)


def segment_weights(x: jax.Array, weights: jax.Array | None, ids: jax.Array, segments: Segments) -> jax.Array:
    """How much each place counts: weights as `combined_weights` makes them, and 0 for what is in no segment."""
    members = segments.members(ids, x.ndim).astype(at_least_float32(x).real.dtype)
    return members if weights is None else members * weights


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def measure_segments(x: jax.Array, weights: jax.Array, ids: jax.Array, segments: Segments) -> Measured:
    """Moments of each segment, [segments, features], with groups of shards [groups, segments, features].

    Sums around the mean of each segment, as `_measure.measure_groups`; a segment that saw nothing has zeros.

    Args:
      x: floating or complex.
      weights: as `segment_weights` makes them.
      ids: as `segments_of` makes them.
      segments: as well.
    """
    wide, total = at_least_float32(x), partial(_weighted_total, segments=segments, weights=weights, ids=ids)
    features = tuple(size for axis, size in enumerate(x.shape) if axis not in segments.axes)
    count = jnp.broadcast_to(_count(x, weights, ids, segments), (segments.number, *features))
    # Two steps to the mean: of many values far from zero a single sum ends dozens of standard deviations off.
    rough = finite_or_zero(safe_divide(total(wide), count))
    shift = finite_or_zero(rough + safe_divide(total(wide - segments.spread(rough, ids, x)), count))
    unit = unit_near(shift)
    c = wide - segments.spread(shift, ids, x)
    first, second = total(c), total(squared(segments.spread(unit, ids, x) * c))
    offset, square = safe_divide(first, count), safe_divide(second, count) / unit / unit
    return pool_shards(around(shift, count, offset, square), segments.axis_group)


# Layers of one shape are then traced and lowered once, here and below.
measure_segments_jit = jax.jit(measure_segments, static_argnums=(3,))


@measure_segments.defjvp
def _measure_segments_jvp(segments, primals, tangents):
    x, weights, ids = primals
    measured = checkpoint_name(measure_segments(x, weights, ids, segments), STATISTICS)
    dmean, half_dvar = _mean_tangents(x, weights, ids, measured, tangents[0], segments)
    zero_count, zero_remainder = jnp.zeros_like(measured.count), jnp.zeros_like(measured.remainder)
    return measured, Measured(zero_count, dmean, zero_remainder, 2 * half_dvar)


@partial(jax.checkpoint, prevent_cse=False, static_argnums=(5,))
def _mean_tangents(x, weights, ids, measured, dx, segments):
    c = _centered(x, weights, ids, segments.axis_group.select_group(measured), segments)
    return _means(segments, weights, ids, measured.count, at_least_float32(dx), inner(c, at_least_float32(dx)))


def normalize_segments(
    x: jax.Array,
    mean_scale: jax.Array | None,
    weights: jax.Array,
    ids: jax.Array,
    segments: Segments,
    epsilon: float,
) -> tuple[jax.Array, Measured]:
    """(x - mean_scale * mean) / sqrt(mean(|x - mean_scale * mean|**2) + epsilon) of each segment, and its moments.

    With a mean_scale of 1, or None, that is (x - mean) / sqrt(var + epsilon); gradients flow through all of it. The
    mean square is var + |(1 - mean_scale) * mean|**2, so that one measuring will do.

    Args:
      x: floating, or complex without a mean_scale.
      mean_scale: [features]; None is 1.
      weights: as `segment_weights` makes them.
      ids: as `segments_of` makes them.
      segments: as well; without groups of shards.
      epsilon: added to the mean square.

    Returns:
      y of x's shape, float32 at least, 0 where there is no segment; and Measured, [segments, features].
    """
    return _standardize_jit(x, mean_scale, weights, ids, None, (segments, epsilon))


@partial(jax.custom_jvp, nondiff_argnums=(5,))
def _standardize(x, mean_scale, weights, ids, known, spec):
    segments, epsilon = spec
    measured = measure_segments(x, weights, ids, segments) if known is None else known
    return _output(x, mean_scale, weights, ids, measured, segments, epsilon), measured


_standardize_jit = jax.jit(_standardize, static_argnums=(5,))


def _output(x, mean_scale, weights, ids, measured, segments, epsilon):
    inverse, kept = _inverse_and_kept(mean_scale, measured, epsilon)
    c = _centered(x, weights, ids, measured, segments)
    return (c + segments.spread(kept, ids, x)) * segments.spread(inverse, ids, x)


def _inverse_and_kept(mean_scale, measured, epsilon):
    """1 / sqrt(mean square + epsilon), and what of the mean is not subtracted: [segments, features] each."""
    kept = jnp.zeros_like(measured.mean) if mean_scale is None else (1 - mean_scale)[None] * measured.mean
    return lax.rsqrt(measured.var + squared(kept) + epsilon), kept


@_standardize.defjvp
def _standardize_jvp(spec, primals, tangents):
    segments, epsilon = spec
    x, mean_scale, weights, ids, known = primals
    if known is None:
        # Constants, by a name by which checkpoints save them: the tangents are those of the formula below.
        known = checkpoint_name(measure_segments(lax.stop_gradient(x), weights, ids, segments), STATISTICS)
    y, measured = _standardize(x, mean_scale, weights, ids, known, spec)
    dy, dmean, dvar = _tangent(x, mean_scale, weights, ids, measured, *tangents[:2], segments, epsilon)
    zeros = jnp.zeros_like(measured.count), jnp.zeros_like(measured.remainder)
    return (y, measured), (dy, Measured(zeros[0], dmean, zeros[1], dvar))


# y = (x - a mean) inverse, inverse = 1 / sqrt(var + |(1 - a) mean|**2 + epsilon), a the mean_scale; means by segment.
# With xhat = (x - mean) inverse and ybar = (1 - a) mean inverse, the mean of y,
#
#   du = inverse dx                                                               [places, features]
#   r  = (1 - a) mean(du) - da mean inverse                                       [segments, features], as all means
#   dy = du - mean(du) - ybar mean(xhat du) + (1 - ybar**2) r - xhat (mean(xhat du) + ybar r)
#
# where 1 - ybar**2 is (var + epsilon) inverse**2, which does not cancel. In units of the output, since products of the
# variance itself leave the range of float32. One collective.
@partial(jax.checkpoint, prevent_cse=False, static_argnums=(7, 8))
def _tangent(x, mean_scale, weights, ids, measured, dx, dmean_scale, segments, epsilon):
    inverse, kept = _inverse_and_kept(mean_scale, measured, epsilon)
    xhat = _centered(x, weights, ids, measured, segments) * segments.spread(inverse, ids, x)
    du = at_least_float32(dx) * segments.spread(inverse, ids, x)
    mean_du, mean_xhat_du = _means(segments, weights, ids, measured.count, du, inner(xhat, du))
    shift, slope = mean_du, mean_xhat_du
    if mean_scale is not None:
        ybar = kept * inverse
        r = (1 - mean_scale)[None] * mean_du - dmean_scale[None] * measured.mean * inverse
        shift = shift + ybar * mean_xhat_du - (measured.var + epsilon) * inverse * inverse * r
        slope = slope + ybar * r
    dy = du - segments.spread(shift, ids, x) - xhat * segments.spread(slope, ids, x)
    return dy, mean_du / inverse, 2 * mean_xhat_du / inverse / inverse


def _means(segments, weights, ids, count, *values):
    """Weighted means by segment of each of the values, over all shards, in one collective."""
    totals = tuple(_weighted_total(v, segments=segments, weights=weights, ids=ids) for v in values)
    share = safe_divide(jnp.ones_like(count), count)
    return tuple(v * share for v in segments.axis_group.psum(totals))


def _weighted_total(values, *, segments, weights, ids):
    return segments.total(jnp.where(weights == 0, 0, weights * values), ids)


def _count(x, weights, ids, segments):
    """The sum of the weights by segment, with ones for features along which the weights do not differ."""
    alike = [axis for axis in segments.axes if weights.shape[axis] == 1]
    return segments.total(weights, ids) * size_of(x.shape, alike)


def _centered(x, weights, ids, measured, segments):
    """X minus the exact mean of its segment; 0 where x does not count and is not finite, or is in no segment."""
    c = at_least_float32(x) - segments.spread(measured.mean, ids, x) - segments.spread(measured.remainder, ids, x)
    return jnp.where(segments.members(ids, x.ndim), silenced(c, weights), 0)
