"""VGG-style networks of every normalizer of `switched_norm`, at a rate of their own or the same for all."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array

from experiments.training import loop, models
from experiments.training.switched_norm import switched


def task(blocks: Sequence[Sequence[int]], units: int, optimizer: Callable) -> loop.Task:
    """The training of `models.vgg` with the normalizer and the optimizer of each run, a `loop.Task`.

    Args:
      blocks: filters of each convolution, by block.
      units: of the dense layer.
      optimizer: optimizer(run) -> its optimizer.
    """

    def network(run: dict) -> models.Network:
        return models.vgg(blocks, switched(run), units=units)

    def init(run: dict, key: Array, x: Array) -> dict:
        return network(run).init(key, x)

    return loop.Task(init, network({}).apply, optimizer)


def rate_of(run: dict, same: float) -> Array:
    """The run's "rate", or `same` where the run is one of those that have the "same" rate."""
    return jnp.where(run["same"] > 0, same, run["rate"])
