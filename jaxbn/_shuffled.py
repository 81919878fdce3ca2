"""Ghost batches drawn at random: which examples share statistics no longer depends on where they stand.

Examples stay where they are, on whichever device; only the statistics of the groups travel.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._affine import Activation, scale_shift
from jaxbn._axis_group import AxisGroup
from jaxbn._checks import check_residual, check_several
from jaxbn._inputs import combined_weights
from jaxbn._moments import Measured
from jaxbn._segments import normalize_segments, segment_weights, segments_of


def normalize_shuffled(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    axes: tuple[int, ...],
    group_size: int,
    axis_group: AxisGroup,
    rng: jax.Array | None,
    where: jax.Array | None,
    weights: jax.Array | None,
    residual: jax.Array | None,
    epsilon: float,
    activation: Activation | None,
    dtype: jax.typing.DTypeLike | None,
) -> tuple[jax.Array, Measured]:
    """Normalize each of the drawn groups by itself; y in the order of x, and moments of the groups, [groups, features].

    Args:
      x: the batch, or this shard's part of it; examples along the first of `axes`.
      scale: [features], or None for 1.
      bias: [features], or None for 0.
      axes: reduced.
      group_size: examples a group.
      axis_group: the shards from whose examples groups are drawn.
      rng: random key; of several shards that of the first counts.
      where: boolean mask.
      weights: real.
      residual: of x's shape, or None.
      epsilon: added to the variance.
      activation: elementwise, or None.
      dtype: of the output; None is x's.

    Raises:
      ValueError: no rng, a group_size that does not divide the examples of all shards, or one value a group.
    """
    if rng is None:
        raise ValueError("shuffle=True draws groups in training; pass rng=jax.random.key(...), new at each step.")
    check_residual(residual, x)
    check_several(x, axes, AxisGroup(), "Take larger groups.", group_size)
    ids, groups = _drawn(rng, x.shape, axes, group_size, axis_group)
    ids, segments = segments_of(x, axes, ids, groups, axis_group)
    counted = segment_weights(x, combined_weights(x, where, weights), ids, segments)
    xhat, measured = normalize_segments(x, None, counted, ids, segments, epsilon)
    scale, bias = (None if v is None else jnp.expand_dims(v, axes) for v in (scale, bias))
    return scale_shift(xhat, scale, bias, residual, activation, jnp.dtype(dtype or x.dtype)), measured


def _drawn(rng, shape, axes, group_size, axis_group) -> tuple[jax.Array, int]:
    """The group of each example of this shard, and how many groups there are on all of them."""
    batch = shape[axes[0]] if axes else 1
    examples = batch * axis_group.size()
    if examples % group_size:
        raise ValueError(
            f"group_size={group_size} does not divide the {examples} examples, {batch} on each of {axis_group.size()}"
            f" shards (x has shape {shape}); choose another, or pad the batch and mask the padding with where=."
        )
    ranks = jax.random.permutation(_of_first_shard(rng, axis_group), examples)
    if axis_group.axis_name is not None:
        ranks = lax.dynamic_slice_in_dim(ranks, lax.axis_index(axis_group.axis_name) * batch, batch)
    return ranks // group_size, examples // group_size


def _of_first_shard(rng, axis_group) -> jax.Array:
    """One key for all shards, which must agree on the groups."""
    if axis_group.axis_name is None:
        return rng
    mine = jnp.where(lax.axis_index(axis_group.axis_name) == 0, jax.random.key_data(rng), 0)
    return jax.random.wrap_key_data(lax.psum(mine, axis_group.axis_name), impl=jax.random.key_impl(rng))
