"""For a network that is fine in training and bad in evaluation: is it the running statistics, and in which layer?"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxbn._layers import find_layers
from jaxbn._moments import Moments
from jaxbn._population import population_statistics
from jaxbn._running import running_moments
from jaxbn.diagnostics._network import Loss, Variables, checked_output, checked_variables, key_of
from jaxbn.diagnostics._running import LayerSummary, running_stats_summary, running_stats_table


class Performance(NamedTuple):
    """How a network does on a data set.

    Attributes:
      loss: the mean loss.
      metrics: {name: mean}, of the loss's metric_sums.
    """

    loss: float
    metrics: dict[str, float]


class TrainEvalGap(NamedTuple):
    """One network on one data set, normalized in three ways.

    Attributes:
      by_batch: in training mode, every batch by its own statistics.
      by_running: in evaluation mode, by the running statistics as they are.
      by_population: in evaluation mode, by exact statistics of a data set.
      layers: one row a layer; drift is that of the running from the exact statistics.
      batch_stats: the exact statistics, to be put in the place of the running ones.
    """

    by_batch: Performance
    by_running: Performance
    by_population: Performance
    layers: list[LayerSummary]
    batch_stats: Any


def train_eval_gap(
    train_loss: Loss,
    eval_loss: Loss,
    variables: Variables,
    batches: Iterable,
    *,
    statistics_batches: Iterable | None = None,
    layer_by_layer: bool = True,
    epsilon: float = 1e-5,
    debias: bool = False,
    rng: Array | None = None,
) -> TrainEvalGap:
    """Loss and metrics of a trained network under batch, running and exact statistics, and the drift of each layer.

    How to read it:

    - by_batch good, by_running bad, by_population good: the running statistics are off, and `layers` tells where. Go on
      with `batch_stats`. They lag where decay is high for the number of steps taken, where params moved fast at the
      end, or where training saw other data or padding.
    - by_batch good, by_population bad: the network relies on who shares its batch. Batches are too small, sorted by
      class, or of one source each; population statistics cannot mend that.
    - all three alike: the gap does not come from normalization. Look at the data, at overfitting and at dropout.

    Every layer that keeps running statistics has to be jaxbn's, or made `jaxbn.recordable`. `jaxbn.linen.BatchNorm` and
    `jaxbn.nnx.BatchNorm` take the variables of Flax's own layers, so that a network of those is measured by exchanging
    the class.

    Args:
      train_loss: loss(variables, batch, rng) -> LossOutput in training mode; see `jaxbn.diagnostics`. The batch_stats
        that it returns are those its network moved.
      eval_loss: the same in evaluation mode, normalizing by variables["batch_stats"].
      variables: {"params", "batch_stats", ...}, as trained.
      batches: what the losses take, one after the other; can be iterated several times. Take batches of training, of
        the size of training, to find out about normalization, and others to find out about generalization.
      statistics_batches: where the exact statistics are measured, normally training data; None is `batches`.
      layer_by_layer: as in `population_statistics`: whether each layer is measured on what it gets in evaluation, which
        takes a pass for each layer, or all in one pass on what they get in training.
      epsilon: of the layers, for the drift.
      debias: of the layers, for the drift.
      rng: random key for the losses; None is a fixed one.

    Raises:
      TypeError: variables without params, a loss that does not return a LossOutput, a layer that does not record.
      ValueError: no batches, or batches that can be read only once; train_loss not in training mode.
    """
    variables, rng = checked_variables(variables), key_of(rng)
    statistics_batches = batches if statistics_batches is None else statistics_batches
    for name, given in (("batches", batches), ("statistics_batches", statistics_batches)):
        if iter(given) is given:
            raise ValueError(f"{name} is an iterator, which ends after one pass; pass a list, or what starts anew.")
    exact = _population(train_loss, variables, statistics_batches, layer_by_layer, rng)
    corrected = {**variables, "batch_stats": exact} if "batch_stats" in variables else variables
    by_batch, by_running, by_population = (
        _performance(loss, with_statistics, batches, rng)
        for loss, with_statistics in ((train_loss, variables), (eval_loss, variables), (eval_loss, corrected))
    )
    layers = running_stats_summary(variables, _moments(exact, debias), epsilon=epsilon, debias=debias)
    return TrainEvalGap(by_batch, by_running, by_population, layers, exact)


def train_eval_gap_table(gap: TrainEvalGap) -> str:
    """The three performances as text, and below them the layers; without trailing newline."""
    kinds = {"batch": gap.by_batch, "running": gap.by_running, "population": gap.by_population}
    rows = [["statistics", "loss", *gap.by_batch.metrics]]
    rows += [[kind, *(f"{v:.4g}" for v in (p.loss, *p.metrics.values()))] for kind, p in kinds.items()]
    text = _aligned(rows)
    return f"{text}\n\n{running_stats_table(gap.layers)}" if gap.layers else text


@partial(jax.jit, static_argnames="loss")
def _output(loss, variables, batch, rng):
    return checked_output(loss(variables, batch, rng))


@partial(jax.jit, static_argnames="loss")
def _moved(loss, variables, batch, rng):
    return checked_output(loss(variables, batch, rng)).batch_stats


def _population(loss, variables, batches, layer_by_layer, rng) -> Any:
    def apply(variables, batch):
        return _moved(loss, variables, batch, rng)

    try:
        return population_statistics(apply, variables, batches, layer_by_layer=layer_by_layer)
    except TypeError as error:
        error.add_note(
            "train_eval_gap measures exact statistics by the batch_stats that train_loss returns. Exchange Flax's"
            " BatchNorm for jaxbn.linen.BatchNorm or jaxbn.nnx.BatchNorm, which take the same variables."
        )
        raise


def _performance(loss, variables, batches, rng) -> Performance:
    total, weight, metrics = 0.0, 0.0, dict[str, float]()
    for batch in batches:
        output = jax.device_get(_output(loss, variables, batch, rng))
        total, weight = total + float(output.loss_sum), weight + float(output.weight_sum)
        metrics = {name: metrics.get(name, 0.0) + float(value) for name, value in output.metric_sums.items()}
    if weight == 0:
        raise ValueError("batches is empty, or all its examples have a weight of 0; pass at least one batch.")
    return Performance(total / weight, {name: value / weight for name, value in metrics.items()})


def _moments(batch_stats, debias) -> dict[str, Moments]:
    """The statistics of each layer as moments of a set that showed every feature."""
    layers = {
        path: running_moments(jax.tree.map(np.asarray, stats), debias=debias)
        for path, stats in find_layers(batch_stats).items()
    }
    return {path: Moments(jnp.ones(()), mean, var) for path, (mean, var) in layers.items()}


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
