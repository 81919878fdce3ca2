"""Batch statistics that record: a normalizer fed them measures its inputs instead of moving its running averages.

A record takes the place of `mean` and `var` in batch_stats, under the same names and so through any module, with one
axis more, at the end:

    mean [features, 3]: running mean, recorded mean, what rounding the recorded mean to one float lost
    var  [features, 3]: running variance, recorded variance, how many values were recorded

A record of shape [features, 3] leaves the normalizer to normalize by its batch; one of shape [features, 1, 3] makes it
normalize by the running statistics even in training mode. The shape says it, not a global, so that caches of compiled
functions stay right. Layers used more than once in a forward pass pool all their uses.
"""

from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn.moments import Measured, canonical_axes, combined_weights, inexact, measure, shared_axes
from jaxbn.normalizer import Normalizer

_ROWS = 3


def start_record(batch_stats: dict[str, jax.Array], *, by_running: bool) -> dict[str, jax.Array]:
    """Batch statistics of one layer, {"mean", "var", ...}, as an empty record.

    Args:
      batch_stats: mean and var of shape [features]; what else there is stays.
      by_running: whether the layer normalizes by these while it records, or by its batch.

    Returns:
      The same with mean and var of shape [features, 3], or [features, 1, 3] with by_running; float32 at least.
    """

    def record(value):
        value = jnp.asarray(value)
        value = value.astype(jnp.promote_types(value.dtype, jnp.float32))
        rows = jnp.stack([value] + [jnp.zeros_like(value)] * (_ROWS - 1), -1)
        return rows[..., None, :] if by_running else rows

    return {**batch_stats, "mean": record(batch_stats["mean"]), "var": record(batch_stats["var"])}


def recordable(
    norm: Normalizer,
    *,
    feature_axis: int | Sequence[int] = -1,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
) -> Normalizer:
    """A normalizer that also takes records, and is otherwise `norm`: for normalizers with running "mean" and "var".

    Fed a record it normalizes as `norm` does, by the batch or by the running statistics as the record says, and adds
    the moments of x to the record if train=True.

    Args:
      norm: its batch_stats hold "mean" and "var" of the features' shape.
      feature_axis: the axis or axes of x that norm keeps.
      axis_name: named axis, or tuple of them, over whose shards moments are pooled: all that see the same data set,
        whatever groups of them norm normalizes by.
    """
    across = shared_axes(axis_name or None, None)
    features = len(feature_axis) if isinstance(feature_axis, Sequence) else 1

    def apply(variables, x, *, train, where=None, weights=None, **arguments):
        batch_stats = variables.get("batch_stats", {})
        batch = dict(where=where, weights=weights, **arguments)
        extra_axes = _extra_axes(batch_stats, features)
        if not extra_axes:
            return norm.apply(variables, x, train=train, **batch)
        running = {**batch_stats, **{name: _rows(batch_stats[name], features)[0] for name in ("mean", "var")}}
        by_batch = train and extra_axes == 1
        y, _ = norm.apply({**variables, "batch_stats": running}, x, train=by_batch, **batch)
        if not train:
            return y, batch_stats
        axes = _reduced(x, feature_axis)
        seen = measure(inexact(x), combined_weights(inexact(x), where, weights), axes, across)
        return y, _recorded(batch_stats, lax.stop_gradient(seen), features)

    return Normalizer(norm.init, apply)


def _extra_axes(batch_stats, features) -> int:
    """0 for plain batch statistics, 1 for a record by the batch, 2 for a record by the running statistics."""
    if not {"mean", "var"} <= set(batch_stats):
        return 0
    tail = jnp.shape(batch_stats["mean"])[features:]
    return len(tail) if tail in ((_ROWS,), (1, _ROWS)) else 0


def _rows(record, features):
    """The three rows of a record, each [features]."""
    rows = jnp.reshape(record, (*record.shape[:features], _ROWS))
    return [rows[..., row] for row in range(_ROWS)]


def _reduced(x, feature_axis):
    kept = canonical_axes(feature_axis, x.ndim, "feature_axis")
    return tuple(axis for axis in range(x.ndim) if axis not in kept)


def _recorded(batch_stats, seen: Measured, features):
    mean, var = batch_stats["mean"], batch_stats["var"]
    (running_mean, high, low), (running_var, spread, count) = _rows(mean, features), _rows(var, features)
    pooled = merge_measured(Measured(count, high, low, spread), seen)
    new_mean = jnp.stack([running_mean, pooled.mean, pooled.remainder], -1)
    new_var = jnp.stack([running_var, pooled.var, pooled.count], -1)
    record = {"mean": new_mean.reshape(mean.shape), "var": new_var.reshape(var.shape)}
    return {**batch_stats, **{name: value.astype(batch_stats[name].dtype) for name, value in record.items()}}


def merge_measured(a: Measured, b: Measured) -> Measured:
    """`merge_moments` for means kept as two floats, [features] each; an empty side leaves the other as it is."""
    b = b._replace(count=jnp.broadcast_to(b.count, a.count.shape))
    count = a.count + b.count
    share = b.count / jnp.where(count == 0, 1, count)
    apart = (b.mean - a.mean) + (b.remainder - a.remainder)
    mean = a.mean + apart * share
    remainder = ((a.mean - mean) + apart * share) + a.remainder
    var = a.var * (1 - share) + b.var * share + jnp.abs(apart) ** 2 * share * (1 - share)
    both = Measured(count, mean, remainder, var)
    first = jax.tree.map(lambda only_b, merged: jnp.where(a.count == 0, only_b, merged), b, both)
    return jax.tree.map(lambda only_a, merged: jnp.where(b.count == 0, only_a, merged), a, first)
