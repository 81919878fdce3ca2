"""What users measure: count, mean and variance of an array, over its axes, over shards, and by segment."""

from collections.abc import Hashable, Sequence

import jax

from jaxbn._axis_group import axis_group_of
from jaxbn._inputs import canonical_axes, combined_weights, inexact
from jaxbn._measure import measure
from jaxbn._moments import Moments
from jaxbn._segments import measure_segments_jit, segment_weights, segments_of


def moments(
    x: jax.Array,
    axis: int | Sequence[int] | None = None,
    *,
    where: jax.Array | None = None,
    weights: jax.Array | None = None,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    segment_ids: jax.Array | None = None,
    num_segments: int | None = None,
) -> Moments:
    """Count, mean and biased variance of x over `axis`, exact however far the mean lies from zero.

    Distances from a number near the mean are summed, and their squares, so that neither cancellation nor overflow costs
    digits (Chan, Golub and LeVeque 1983, section 3).

    With segments, those of each by itself: of the graphs of a batch, or of sequences packed into one row. The values of
    a segment are added one after the other, in up to 256 parts where there are few segments for many places. Rounding
    of the variance grows as the root of a part: 1e-6 for a hundred thousand values in parts, 1e-5 without.

    Args:
      x: floating or complex array of any shape.
      axis: the axes to reduce, as in `jnp.mean`; None reduces all. The remaining axes are the features.
      where: boolean, broadcastable to x: True counts. What it leaves out may be anything, NaN included.
      weights: real, broadcastable to x: a weight of 2 counts as the same value twice. No gradient flows to them.
      axis_name: named axis, or tuple of them, over whose shards the values are pooled.
      axis_index_groups: groups of equal size of indices on `axis_name`; shards pool within their group.
      segment_ids: integers, in any order: the segment of each place along the first of the reduced axes, [examples],
        or [examples, positions], and so on. One below 0 or not below num_segments marks padding, which may be anything.
        On shards the same id is the same segment.
      num_segments: how many segments there are, those without any place included; an int, known at trace time.

    Returns:
      Moments of shape [features], with segments [num_segments, features]; float32 at least. What saw nothing has count,
      mean and var 0.

    Raises:
      TypeError: x is not floating or complex, `where` is not boolean, or segment_ids are not integers.
      ValueError: an axis out of range or named twice, `where` or `weights` that do not broadcast, segment_ids of
        another shape or without num_segments, an axis name that is not bound.
    """
    x = inexact(x)
    axes, weights = canonical_axes(axis, x.ndim), combined_weights(x, where, weights)
    axis_group = axis_group_of(axis_name, axis_index_groups)
    if segment_ids is None and num_segments is None:
        return measure(x, weights, axes, axis_group).moments
    ids, segments = segments_of(x, axes, segment_ids, num_segments, axis_group)
    measured = measure_segments_jit(x, segment_weights(x, weights, ids, segments), ids, segments)
    return axis_group.select_group(measured).moments
