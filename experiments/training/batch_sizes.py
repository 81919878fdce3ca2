"""A small convolutional network trained at any batch size on equally many examples, with any norm of `pooled_norm`.

A run is a dict of numbers: "seed", "rate" and those of `pooled_norm.kind`. All norms train in one compiled program for
each batch size; runs do not see each other, so that a run is the same whatever trains beside it.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import jaxbn
from experiments.training import data, loop, models, pooled_norm

MEMORY = 1024  # examples over which running statistics average, whatever the batch size
SEEN = 1000  # training images from which exact statistics are taken
THREADS = 2  # parts that train at once: one alone leaves a core idle
SMALL = 32  # below this the runs of a part train under one vmap; else one after the other, which caches thank
AT_ONCE = {True: 10, False: 5}  # runs of a part, by whether the batch is below SMALL


class Measured(NamedTuple):
    """Accuracy of one network by the statistics that normalize: scalars, or [runs].

    Attributes:
      validation: by the running statistics.
      test: by the running statistics.
      train: likewise, on SEEN training images.
      exact: on test, by the statistics of SEEN training images, which are exact layer by layer.
      own: on test, by the statistics of each image alone.
    """

    validation: Array
    test: Array
    train: Array
    exact: Array
    own: Array


def network(channels: tuple[int, ...], norm: jaxbn.Normalizer) -> models.Network:
    """Means of 2 x 2 pixels, 3 x 3 convolutions to maps of 7, 7, 4, 4, ... a side, their mean, a dense layer; ReLU."""
    first, *rest = [
        models.conv3x3(features, stride=2 if number in (0, 2) else 1, use_bias=False)
        for number, features in enumerate(channels)
    ]
    layers = [models.after_pooling(first), *rest]
    head = models.dense(10, use_bias=True)
    over_positions = head._replace(
        kernel_shape=lambda shape: head.kernel_shape((shape[0], shape[-1])),
        apply=lambda weights, x: head.apply(weights, x.mean((1, 2))),
    )
    return models.stack(layers, over_positions, norm, jax.nn.relu, models.glorot_weights())


@cache
def task(channels: tuple[int, ...]) -> loop.Task:
    """The network of a run under plain SGD at its "rate"."""
    any_kind = {**pooled_norm.kind(), "decay": 0.0, "warmup": 0}  # `apply` finds that of the run in its variables

    def init(run: dict, key: Array, x: Array) -> dict:
        return network(channels, pooled_norm.pooled(run)).init(key, x)

    apply = network(channels, pooled_norm.pooled(any_kind)).apply
    return loop.Task(init, apply, lambda run: optax.sgd(run["rate"]))


def train(
    one: loop.Task, dataset: data.Dataset, batch: int, steps: int, runs: Sequence[dict], *, times: int = 1
) -> Measured:
    """Every accuracy of every run, each [runs], after `times` times `steps` steps of `batch` examples.

    Runs train in parts of AT_ONCE, the last one filled up, so that all calls at one batch size share a program.
    """
    size = AT_ONCE[batch < SMALL]
    epoch = len(dataset.train_labels) // batch
    numbers = {"decay": 1 - batch / MEMORY if batch < MEMORY else 0.0, "warmup": epoch}
    arrays = loop.on_device(dataset)
    programs = loop.compile_grid(one, loop.Schedule(steps, steps, batch, mapped=batch >= SMALL))

    def part(members: list[dict]) -> list[Measured]:
        filled = [{**run, **numbers} for run in [*members, *members[-1:] * (size - len(members))]]
        stacked = {name: jnp.asarray([run[name] for run in filled]) for name in filled[0]}
        states = programs.start(stacked, arrays)
        for number in range(times):
            states, _ = programs.advance(states, stacked, arrays, number * steps)
        each = [jax.tree.map(lambda leaf, n=n: leaf[n], states["variables"]) for n in range(len(members))]
        return jax.device_get([_measure(one.apply, variables, arrays) for variables in each])

    first, *rest = [list(runs[n : n + size]) for n in range(0, len(runs), size)]
    parts = [part(first)]  # alone, so that it is compiled once
    with ThreadPoolExecutor(THREADS) as threads:
        parts += threads.map(part, rest)
    return jax.tree.map(lambda *values: np.asarray(values, np.float64), *(found for part in parts for found in part))


@partial(jax.jit, static_argnums=0)
def _measure(apply, variables, arrays) -> Measured:
    spread = data.spread(min(SEEN, len(arrays["train_labels"])), len(arrays["train_labels"]))
    seen, seen_labels = loop.take(arrays, jnp.asarray(spread))
    plain = pooled_norm.with_numbers(variables, group=len(seen), decay=0.0, r_max=1.0, d_max=0.0)
    exact = {**plain, "batch_stats": apply(plain, seen, train=True)[1]}
    own = pooled_norm.with_numbers(variables, running=0.0)
    validation, test = (data.pixels(arrays[f"{part}_images"]) for part in ("validation", "test"))
    labels = jnp.concatenate([arrays["validation_labels"], arrays["test_labels"], seen_labels])
    ends = np.cumsum([len(validation), len(test)])

    def right(some: dict) -> list[Array]:
        """Shares of the parts that are predicted right; each kind of statistics in one program."""
        logits, _ = apply(some, jnp.concatenate([validation, test, seen]), train=False)
        return [jnp.mean(part) for part in jnp.split(jnp.argmax(logits, -1) == labels, ends)]

    several = jax.tree.map(lambda *leaves: jnp.stack(leaves), variables, exact, own)
    of_validation, of_test, of_train = jax.lax.map(right, several)
    return Measured(of_validation[0], of_test[0], of_train[0], of_test[1], of_test[2])
