"""One trained network, evaluated by other statistics: running averages of several decays, exact ones, the batch's.

A network here is built with `batch_norm(decay=0)`: what it returns in training mode are then the statistics of that
batch, [features], from which all others are made.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from experiments.training import loop
from experiments.training.dataset import pixels
from experiments.training.models import Network


def with_decays(network: Network, decays: Sequence[float]) -> Network:
    """The network with a running average for each decay: batch_stats are [decays, features].

    None of them has an effect on training. Evaluation is by the first.
    """

    def init(key: Array, x: Array) -> dict:
        variables = network.init(key, x)
        stats = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(decays)), variables["batch_stats"])
        return {**variables, "batch_stats": stats}

    def moved(old: Array, batch: Array) -> Array:
        decay = jnp.asarray(decays).reshape(-1, *[1] * batch.ndim)
        return decay * old + (1 - decay) * batch[None]

    def apply(variables: dict, x: Array, *, train: bool) -> tuple[Array, Any]:
        stats = variables["batch_stats"]
        first = {**variables, "batch_stats": jax.tree.map(lambda leaf: leaf[0], stats)}
        logits, batch = network.apply(first, x, train=train)
        return logits, jax.tree.map(moved, stats, batch) if train else stats

    return Network(init, apply)


def random_batches(images: Array, labels: Array, batch_size: int) -> tuple[Array, Array]:
    """A data set cut into batches, [batches, batch_size, ...]; it may lie sorted, what fills no batch is left out."""
    batches = len(labels) // batch_size
    shuffled = jax.random.permutation(jax.random.key(0), len(labels))[: batches * batch_size]
    return tuple(part[shuffled].reshape(batches, batch_size, *part.shape[1:]) for part in (images, labels))


def by_batch(apply: Callable, params: Any, stats: Any, images: Array, labels: Array) -> tuple[Any, Array]:
    """The statistics of every batch, and the accuracy with which it is classified by them.

    Args:
      apply: of a network built with `batch_norm(decay=0)`.
      params: of the network.
      stats: batch_stats of the right shapes; their values are not used.
      images: uint8 [batches, batch_size, height, width, channels].
      labels: int [batches, batch_size].

    Returns:
      batch_stats with leaves [batches, features], and accuracies [batches].
    """

    def one(batch: tuple[Array, Array]) -> tuple[Any, Array]:
        images, labels = batch
        logits, found = apply({"params": params, "batch_stats": stats}, pixels(images), train=True)
        return found, jnp.mean(jnp.argmax(logits, -1) == labels, dtype=jnp.float32)

    return jax.lax.map(one, (images, labels))


def pooled(stats: Any) -> Any:
    """The statistics of equally large batches together; leaves [batches, features] to [features]."""

    def pool(layer: dict) -> dict:
        return {"mean": layer["mean"].mean(0), "var": layer["var"].mean(0) + layer["mean"].var(0)}

    return jax.tree.map(pool, stats, is_leaf=lambda node: isinstance(node, dict) and "mean" in node)


def averaged(stats: Any, decay: float, start: Any) -> Any:
    """The running average after these batches, from `start` [features]; leaves [batches, features] to [features]."""

    def average(batches: Array, start: Array) -> Array:
        weights = (1 - decay) * decay ** jnp.arange(len(batches) - 1, -1, -1, dtype=jnp.float32)
        return decay ** len(batches) * start + jnp.tensordot(weights, batches, 1, precision="highest")

    return jax.tree.map(average, stats, start)


def accuracies(apply: Callable, params: Any, stats: Any, images: Array, labels: Array) -> Array:
    """Accuracy at test time by each of several statistics: leaves [kinds, features], result [kinds]."""

    def one(stats: Any) -> Array:
        return loop.accuracy(apply, {"params": params, "batch_stats": stats}, images, labels)

    return jax.lax.map(one, stats)
