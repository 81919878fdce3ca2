"""Microbatches: the moments of several batches pooled exactly, the running statistics moved once.

Between `start_pooling` and `finish_pooling` each leaf of a layer's batch_stats has one axis more, at the end, under its
old name and so through any module:

    mean [features, 4]: running, moved, pooled mean, what rounding the pooled mean to one float lost
    var  [features, 4]: running, moved, pooled variance, how many values were pooled
    other [features, 2]: running, moved

"moved" is what the normalizer's own rule makes of the running statistics as they were at the start and of all the
moments pooled so far; the running ones stay as they were, so that every microbatch sees the same. The shape says it,
not a global, so that caches of compiled functions stay right. `batch_norm` and the shells on it pool; the statistics
of normalizers that know nothing of this must not be given the axis.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn.layers import find_layers, replace_layers
from jaxbn.moments import Measured, Moments
from jaxbn.recording import merge_measured

_ROWS = 4


def start_pooling(batch_stats: Any) -> Any:
    """The same tree, every layer with "mean" and "var" ready to pool the moments of batches.

    Args:
      batch_stats: any tree of layers whose leaves are [features].

    Returns:
      The tree with leaves [features, 4] or [features, 2], to be passed to the network in place of the old one.
    """
    layers = find_layers(batch_stats)
    return replace_layers(batch_stats, {path: _started(stats) for path, stats in layers.items()})


def finish_pooling(batch_stats: Any) -> Any:
    """Running statistics moved once by all that was pooled: leaves [features] again.

    Args:
      batch_stats: what `start_pooling` made, after the network has been applied to each microbatch.
    """
    layers = find_layers(batch_stats)
    return replace_layers(batch_stats, {path: {n: v[..., 1] for n, v in s.items()} for path, s in layers.items()})


def running_part(batch_stats: dict[str, jax.Array], shape: tuple[int, ...]) -> dict[str, jax.Array]:
    """One layer's running statistics, for features of `shape`, whether it pools or not."""
    if not _pools(batch_stats, shape):
        return batch_stats
    return {name: value[..., 0] for name, value in batch_stats.items()}


def move(
    batch_stats: dict[str, jax.Array], measured: Measured, update: Callable[[dict, Moments], dict]
) -> dict[str, jax.Array]:
    """update(running statistics, moments); with pooling, the moments of all batches since the start.

    Args:
      batch_stats: of one layer.
      measured: of this batch, [features].
      update: the normalizer's rule.
    """
    if not _pools(batch_stats, measured.mean.shape):
        return update(batch_stats, measured.moments)
    mean, var = batch_stats["mean"], batch_stats["var"]
    before = Measured(var[..., 3], mean[..., 2], mean[..., 3], var[..., 2])
    pooled = merge_measured(before, jax.lax.stop_gradient(measured))
    running = running_part(batch_stats, measured.mean.shape)
    moved = update(running, pooled.moments)
    rows = {name: [running[name], moved[name]] for name in batch_stats}
    rows["mean"] += [pooled.mean, pooled.remainder]
    rows["var"] += [pooled.var, pooled.count]
    return {name: jnp.stack(rows[name], -1).astype(value.dtype) for name, value in batch_stats.items()}


def _started(stats):
    nothing = {"mean": 2, "var": 2}
    return {n: jnp.stack([v, v] + [jnp.zeros_like(v)] * nothing.get(n, 0), -1) for n, v in stats.items()}


def _pools(batch_stats, shape):
    return "mean" in batch_stats and jnp.shape(batch_stats["mean"]) == (*shape, _ROWS)
