"""Batch statistics that record: fed them, a normalizer adds the moments of its input to those of earlier batches.

A record takes the place of a layer's batch_stats, under the same names and so through any module, every leaf with one
axis more, at the end:

    mean   [features, 4]: running mean, recorded mean, what rounding the recorded mean to one float lost, count
    var    [features, 2]: running variance, recorded variance
    other  [..., 1]: as they were

It is read as the exact statistics of a data set. One of shape [features, 1, 4], ... makes the layer normalize by its
running statistics, in training mode too. One that pools microbatches has an entry more, the last: what the normalizer's
own rule makes of the running statistics, as they were at the start, and of all the moments recorded since. The shape
says which, not a global, so that caches of compiled functions stay right. Running statistics do not move while they
record, and layers used more than once in a forward pass pool all their uses.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._axis_group import AxisGroup, axis_group_of
from jaxbn._factory import normalizer_factory
from jaxbn._inputs import combined_weights, inexact, reduced_axes
from jaxbn._layers import leaves_by_path, replace_layers
from jaxbn._measure import measure
from jaxbn._moments import Measured, Moments, merge_measured
from jaxbn._normalizer import Normalizer
from jaxbn._running import BatchStats

_RECORDED = {"mean": 3, "var": 1}
_BY_BATCH, _BY_RUNNING, _POOLS = (4,), (1, 4), (5,)


def start_record(batch_stats: BatchStats, *, by_running: bool) -> BatchStats:
    """Batch statistics of one layer, {"mean", "var", ...}, as an empty record.

    Args:
      batch_stats: mean and var of shape [features], and what else there is.
      by_running: whether the layer normalizes by these while it records, or by its batch.

    Returns:
      The same names; mean and var are float32 at least.
    """
    started = {name: _started(name, value) for name, value in batch_stats.items()}
    return {name: rows[..., None, :] if by_running else rows for name, rows in started.items()}


def start_pooling(batch_stats: Any) -> Any:
    """The same tree, every layer that keeps a "mean" ready to pool the moments of microbatches.

    Args:
      batch_stats: any tree of layers; to be passed to the network, as it comes back, with each microbatch.
    """
    layers = {path: stats for path, stats in leaves_by_path(batch_stats).items() if "mean" in stats}
    started = {path: {n: _started(n, v, pools=True) for n, v in stats.items()} for path, stats in layers.items()}
    return replace_layers(batch_stats, started)


def finish_pooling(pooled: Any, batch_stats: Any) -> Any:
    """Running statistics moved once by all that was pooled.

    Args:
      pooled: what came of `start_pooling(batch_stats)`, after the network has been applied to each microbatch.
      batch_stats: the statistics before, whose shapes and dtypes the result has.
    """
    return jax.tree.map(
        lambda rows, v: rows if rows.ndim == v.ndim else rows[..., -1].astype(v.dtype), pooled, batch_stats
    )


def running_normalizer(
    norm: Normalizer,
    update: Callable[[BatchStats, Moments], BatchStats] | None,
    *,
    feature_axis: int | Sequence[int],
    axis_group: AxisGroup,
) -> Normalizer:
    """A normalizer with running statistics that takes records, from one that measures and does not update.

    Args:
      norm: its apply takes plain batch_stats and returns, in place of the moved ones, the batch's `Measured` by which
        they are to be moved, [features]; what it returns with train=False is not used.
      update: update(batch_stats, moments) -> batch_stats; None for one that is fed records of a data set alone.
      feature_axis: the axis or axes of x that norm keeps.
      axis_group: shards over which the moments of x are pooled where norm normalizes by its running statistics.
    """
    features = len(feature_axis) if isinstance(feature_axis, Sequence) else 1

    def apply(variables, x, *, train, where=None, weights=None, **arguments):
        kind = _kind(variables, features)
        by_batch = False if kind == _BY_RUNNING else train
        batch = dict(where=where, weights=weights, **arguments)
        y, measured = norm.apply(_without_record(variables, kind), x, train=by_batch, **batch)
        held = variables["batch_stats"]
        if not train:
            return y, held
        if kind is None:
            return y, update(held, measured.moments)
        if not by_batch:
            measured = _measured(x, where, weights, feature_axis, axis_group)
        new = _added(_rows(held, kind), lax.stop_gradient(measured), update if kind == _POOLS else None)
        return y, {name: new[name].reshape(value.shape).astype(value.dtype) for name, value in held.items()}

    return Normalizer(norm.init, apply)


@normalizer_factory
def recordable(
    norm: Normalizer,
    *,
    feature_axis: int | Sequence[int] = -1,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
) -> Normalizer:
    """A normalizer that also records for `population_statistics`, and is otherwise `norm`: for those not of jaxbn.

    Fed a record it normalizes as `norm` does, by the batch or by the running statistics as the record says, and adds
    the moments of x to the record if train=True. Whether it can pool microbatches is up to `norm`.

    Args:
      norm: its batch_stats hold "mean" and "var" of the features' shape.
      feature_axis: the axis or axes of x that norm keeps.
      axis_name: named axis, or tuple of them, over whose shards moments are pooled: all that see the same data set,
        whatever groups of them norm normalizes by.
    """
    axis_group = axis_group_of(axis_name or None, None)
    features = len(feature_axis) if isinstance(feature_axis, Sequence) else 1

    def measuring(variables, x, *, train, where=None, weights=None, **arguments):
        y, _ = norm.apply(variables, x, train=train, where=where, weights=weights, **arguments)
        return y, _measured(x, where, weights, feature_axis, axis_group) if train else None

    measuring = Normalizer(norm.init, measuring)
    recording = running_normalizer(measuring, None, feature_axis=feature_axis, axis_group=axis_group)

    def apply(variables, x, **arguments):
        records = _kind(variables, features) in (_BY_BATCH, _BY_RUNNING)
        return (recording if records else norm).apply(variables, x, **arguments)

    return Normalizer(norm.init, apply)


def unrecordable(norm: Normalizer, reason: str) -> Normalizer:
    """A normalizer of one feature axis that refuses records in training, with a ValueError that gives the reason."""

    def apply(variables, x, *, train, **arguments):
        kind = _kind(variables, 1)
        if kind is not None and train:
            shape = jnp.shape(variables["batch_stats"]["mean"])
            raise ValueError(f"batch_stats came as a record, its mean of shape {shape}; {reason}")
        y, moved = norm.apply(_without_record(variables, kind), x, train=train, **arguments)
        return y, variables["batch_stats"] if kind else moved

    return Normalizer(norm.init, apply)


def _kind(variables, features) -> tuple[int, ...] | None:
    """The axes that a record's mean has behind those of the features; None for plain batch statistics."""
    batch_stats = variables.get("batch_stats", {})
    tail = jnp.shape(batch_stats["mean"])[features:] if "mean" in batch_stats else ()
    return tail if tail in (_BY_BATCH, _BY_RUNNING, _POOLS) else None


def _without_record(variables, kind):
    """Variables with the running statistics in place of a record."""
    if kind is None:
        return variables
    rows = _rows(variables["batch_stats"], kind)
    return {**variables, "batch_stats": {name: value[..., 0] for name, value in rows.items()}}


def _rows(record, kind):
    """Each leaf with its rows along the last axis, and no other axis that it had not before."""
    return {name: value[..., 0, :] if kind == _BY_RUNNING else value for name, value in record.items()}


def _started(name, value, pools=False):
    value = jnp.asarray(value)
    if name in _RECORDED:
        value = value.astype(jnp.promote_types(value.dtype, jnp.float32))
    return jnp.stack([value] + [jnp.zeros_like(value)] * _RECORDED.get(name, 0) + [value] * pools, -1)


def _measured(x, where, weights, feature_axis, axis_group):
    x = inexact(x)
    return measure(x, combined_weights(x, where, weights), reduced_axes(x.ndim, feature_axis), axis_group)


def _added(rows, measured, update):
    """The rows of a record to which a batch is added, and with an update those that it moves."""
    running = {name: value[..., 0] for name, value in rows.items()}
    _, mean, remainder, count = (rows["mean"][..., row] for row in range(4))
    var = rows["var"][..., 1] if "var" in rows else jnp.zeros_like(mean.real)
    pooled = merge_measured(Measured(count.real, mean, remainder, var), measured)
    recorded = {"mean": (pooled.mean, pooled.remainder, pooled.count), "var": (pooled.var,)}
    moved = {} if update is None else {name: (value,) for name, value in update(running, pooled.moments).items()}
    return {name: jnp.stack([running[name], *recorded.get(name, ()), *moved.get(name, ())], -1) for name in rows}
