"""Networks of every normalizer of `switched_norm`, at a rate of their own or the same for all."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

import jaxbn
from experiments.training import loop, models
from experiments.training.switched_norm import switched


def task(build: Callable[[jaxbn.Normalizer], models.Network], optimizer: Callable) -> loop.Task:
    """The training of a network with the normalizer and the optimizer of each run, a `loop.Task`.

    Args:
      build: build(norm) -> the network.
      optimizer: optimizer(run) -> its optimizer.
    """

    def init(run: dict, key: Array, x: Array) -> dict:
        return build(switched(run)).init(key, x)

    return loop.Task(init, build(switched({})).apply, optimizer)


def vgg_task(blocks: tuple[tuple[int, ...], ...], units: int, optimizer: Callable) -> loop.Task:
    """`task` of `models.vgg` with these blocks and units."""
    return task(lambda norm: models.vgg(blocks, norm, units=units), optimizer)


def rate_of(run: dict, same: float) -> Array:
    """The run's "rate", or `same` where the run is one of those that have the "same" rate."""
    return jnp.where(run["same"] > 0, same, run["rate"])
