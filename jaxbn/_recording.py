"""Normalizers that record: fed a record, they add the moments of their input to those of earlier batches.

With records in the place of batch_stats microbatches pool their statistics exactly, and the statistics of a data set
are measured in the network as it is. Running statistics do not move while they record. Layers that are used more than
once in a forward pass pool all their uses.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from jaxbn._axis_group import AxisGroup, axis_group_of
from jaxbn._factory import normalizer_factory
from jaxbn._inputs import combined_weights, inexact, reduced_axes
from jaxbn._layers import leaves_by_path, replace_layers
from jaxbn._measure import measure
from jaxbn._moments import Measured, merge_measured
from jaxbn._normalizer import Normalizer, Variables, check_mode
from jaxbn._padding import silenced
from jaxbn._record import BatchStats, Mode, Recorded, empty_record, is_recorded, mode_of, running_part


class MeasuringNormalizer(NamedTuple):
    """A normalization that measures its batch and does not move its statistics, which are plain, never a record.

    Attributes:
      init: as of a `Normalizer`.
      train: train(variables, x, *, where, weights, ...) -> (y, measured): x normalized by the batch, and the moments
        that the running statistics are to be moved by, [features]. Further arguments are those of `Normalizer.apply`.
      evaluate: evaluate(variables, x, *, where, weights, ...) -> y: x normalized by the running statistics.
    """

    init: Callable[..., Variables]
    train: Callable[..., tuple[jax.Array, Measured]]
    evaluate: Callable[..., jax.Array]


def start_record(batch_stats: Mapping[str, Any], *, by_running: bool) -> BatchStats:
    """Batch statistics of one layer, {"mean", "var", ...}, as an empty record.

    Args:
      batch_stats: arrays under their names.
      by_running: whether the layer normalizes by these while it records, or by its batch.
    """
    return empty_record(batch_stats, Mode.BY_RUNNING if by_running else Mode.BY_BATCH)


def recorded_moments(before: Mapping[str, Any], after: Mapping[str, Any]) -> Measured | None:
    """What a layer recorded, [features]; None where it did not take part.

    Args:
      before: the record that went in.
      after: the batch_stats that came back.
    """
    old, new = before["mean"], after.get("mean")
    if not isinstance(new, Recorded) or new.running.shape != old.running.shape:
        return None
    same = np.array_equal(np.asarray(new.running), np.asarray(old.running), equal_nan=True)
    return new.measured if same else None


def start_pooling(batch_stats: Any) -> Any:
    """Statistics that collect the moments of microbatches and do not move, for gradient accumulation in your own loop.

    Pass them to the network in training in the place of batch_stats, and what it returns to the next microbatch; then
    `finish_pooling` moves the running statistics once, by the moments of all microbatches pooled by count: by exactly
    those of the batch that they make up, however unequal they are. Each microbatch is normalized by itself. In
    `jaxbn.training` a step with `microbatches=` does all this.

    The result is a tree of arrays, of the same structure whatever has been collected: a carry of `lax.scan`, an
    argument of a jitted step. Evaluation reads the running statistics in it.

    Args:
      batch_stats: of a network, any tree of layers, of jaxbn's normalizers and modules, or made `recordable`. Those of
        other layers stay as they are.

    Raises:
      ValueError: from the network in training, layers that have no moments to pool: `whitening_norm`,
        `virtual_batch_norm`.
      TypeError: batch_stats pool already.
    """
    if any(map(is_recorded, jax.tree.leaves(batch_stats, is_leaf=is_recorded))):
        raise TypeError("batch_stats pool moments already; go on with them, or end that with finish_pooling first.")
    layers = {path: stats for path, stats in leaves_by_path(batch_stats).items() if "mean" in stats}
    return replace_layers(batch_stats, {path: empty_record(stats, Mode.POOL) for path, stats in layers.items()})


def finish_pooling(pooled: Any, batch_stats: Any) -> Any:
    """Running statistics moved once by all that was pooled; as they were where that is nothing.

    Args:
      pooled: what came of `start_pooling(batch_stats)`, after the network has been applied to each microbatch.
      batch_stats: the statistics before, whose shapes and dtypes the result has.

    Returns:
      batch_stats of the same structure.

    Raises:
      ValueError: pooled has another structure, as plain batch_stats have.
    """

    def finished(leaf, before):
        return leaf.moved.astype(before.dtype) if is_recorded(leaf) else leaf

    found, expected = (str(jax.tree.structure(v)) for v in (pooled, jax.eval_shape(start_pooling, batch_stats)))
    if found != expected:
        raise ValueError(
            f"pooled has the structure {found}; expected what the network made of start_pooling(batch_stats),"
            f" {expected}."
        )
    return jax.tree.map(finished, pooled, batch_stats, is_leaf=is_recorded)


def running_normalizer(
    norm: MeasuringNormalizer,
    update: Callable[[BatchStats, Measured], BatchStats],
    *,
    feature_axis: int | Sequence[int],
    axis_group: AxisGroup,
) -> Normalizer:
    """A normalizer with running statistics that takes records, from one that measures and does not update.

    Args:
      norm: the normalization.
      update: update(batch_stats, measured) -> batch_stats.
      feature_axis: the axis or axes of x that norm keeps.
      axis_group: shards over which the moments of x are pooled where norm normalizes by its running statistics.
    """

    def apply(variables, x, *, train, where=None, weights=None, **arguments):
        check_mode(train)
        held = variables.get("batch_stats", {})
        mode = mode_of(held)
        plain = variables if mode is None else {**variables, "batch_stats": running_part(held)}
        batch = dict(where=where, weights=weights, **_without_padding(x, where, weights, arguments))
        if not train:
            return norm.evaluate(plain, x, **batch), held
        if mode is Mode.BY_RUNNING:
            y, measured = norm.evaluate(plain, x, **batch), _measured(x, where, weights, feature_axis, axis_group)
        else:
            y, measured = norm.train(plain, x, **batch)
        if mode is None:
            return y, update(held, measured)
        return y, _added(held, lax.stop_gradient(measured), update if mode is Mode.POOL else None)

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

    def train(variables, x, *, where, weights, **arguments):
        y, _ = norm.apply(variables, x, train=True, where=where, weights=weights, **arguments)
        return y, _measured(x, where, weights, feature_axis, axis_group)

    def evaluate(variables, x, **arguments):
        return norm.apply(variables, x, train=False, **arguments)[0]

    measuring = MeasuringNormalizer(norm.init, train, evaluate)
    recording = running_normalizer(measuring, _unmoved, feature_axis=feature_axis, axis_group=axis_group)

    def apply(variables, x, **arguments):
        records = mode_of(variables.get("batch_stats", {})) in (Mode.BY_BATCH, Mode.BY_RUNNING)
        return (recording if records else norm).apply(variables, x, **arguments)

    return type(norm)(norm.init, apply)


def unrecordable(norm: Normalizer, reason: str) -> Normalizer:
    """A normalizer that refuses records in training, with a ValueError that gives the reason."""

    def apply(variables, x, *, train, where=None, weights=None, **arguments):
        check_mode(train)
        held = variables.get("batch_stats", {})
        mode = mode_of(held)
        if mode is not None and train:
            raise ValueError(f"batch_stats came as a record, to {mode.value}; {reason}")
        plain = variables if mode is None else {**variables, "batch_stats": running_part(held)}
        batch = dict(where=where, weights=weights, **_without_padding(x, where, weights, arguments))
        y, moved = norm.apply(plain, x, train=train, **batch)
        return y, moved if mode is None else held

    return Normalizer(norm.init, apply)


def _unmoved(batch_stats, measured):
    del measured
    return batch_stats


def _without_padding(x, where, weights, arguments):
    """The further arguments; of a residual, which is added to y, what nothing counts of is silenced."""
    if arguments.get("residual") is None:
        return arguments
    return arguments | {"residual": silenced(arguments["residual"], combined_weights(inexact(x), where, weights))}


def _measured(x, where, weights, feature_axis, axis_group):
    x = inexact(x)
    return measure(x, combined_weights(x, where, weights), reduced_axes(x.ndim, feature_axis), axis_group)


def _added(record, measured, update):
    """The record with a batch added; with an update, the statistics moved by all that is now in it."""
    pooled = merge_measured(record["mean"].measured, measured)
    moved = {} if update is None else update(running_part(record), pooled)

    def leaf(name, old: Recorded) -> Recorded:
        new = moved.get(name, old.moved).astype(old.moved.dtype)
        return dataclasses.replace(old, moved=new, measured=pooled if name == "mean" else None)

    return {name: leaf(name, old) for name, old in record.items()}
