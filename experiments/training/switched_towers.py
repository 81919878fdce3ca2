"""Towers whose norm, activation and halves that stand still are numbers of a run: one program trains all of a depth.

A run has "kind", the norm's number in `experiments.training.towers`, "number", that of the activation in `ACTIVATIONS`,
"rate", and "lower" and "upper", the steps from which that half of the hidden layers stands still.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import jaxbn
from experiments.training import data, loop, models
from experiments.training.similarity import linear_cka
from experiments.training.towers import BY_BATCH, CONSTANT, statistics, switched
from jaxbn.diagnostics import TappedLoss, gradient_flow
from jaxbn.training import LossOutput

ACTIVATIONS = {"ReLU": jax.nn.relu, "tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid}
NEVER = 1e9  # a step that does not come
KEPT = 512  # training images whose statistics a network keeps that is normalized at the start only


def activated(norm: jaxbn.Normalizer) -> jaxbn.Normalizer:
    """The norm and then one of ACTIVATIONS, by the "number" among its batch_stats."""

    def init(key: Array, x: Array) -> dict:
        variables = norm.init(key, x)
        return {**variables, "batch_stats": {**variables["batch_stats"], "number": jnp.int32(0)}}

    def apply(variables: dict, x: Array, *, train: bool) -> tuple[Array, dict]:
        stats = dict(variables["batch_stats"])
        number = stats.pop("number")
        y, moved = norm.apply({**variables, "batch_stats": stats}, x, train=train)
        return jax.lax.switch(number, list(ACTIVATIONS.values()), y), {**moved, "number": number}

    return jaxbn.Normalizer(init, apply)


NORM = activated(switched(0.9))
HOW = {"use_bias": True, "activation": lambda h: h, "weights": models.glorot_weights()}  # NORM has the activation


@cache
def tower(depth: int, width: int, norm: jaxbn.Normalizer = NORM) -> models.Tower:
    """The network, or one that looks into it."""
    return models.tower(depth, width, norm, **HOW)


def outputs(depth: int, width: int, measure: Callable[[Array], Array]) -> Callable[[dict, Array], Array]:
    """(variables, images) -> what `measure` finds of each hidden layer's output [examples, units]: [depth, ...].

    The statistics are those of these images.
    """
    network = tower(depth, width, models.watched(NORM, lambda x, y: measure(y)))

    def look(variables: dict, images: Array) -> Array:
        _, found = network.apply(variables, data.pixels(images), train=True)
        return jnp.concatenate([found["first"][None], found["rest"]])

    return look


@cache
def task(digits: str, depth: int, width: int) -> loop.Task:
    """The networks of one depth. Metric "dead": the share of units without a positive output on any test image."""
    images = data.load(digits).train_images
    kept = jnp.asarray(images[data.spread(KEPT, len(images))])
    at_start = tower(depth, width, activated(switched(0.0)))  # whose running statistics are those of the images
    greatest = outputs(depth, width, partial(jnp.max, axis=0))

    def init(run: dict, key: Array, x: Array) -> dict:
        variables = tower(depth, width).init(key, x, depth)
        normalized = with_numbers(variables, kind=BY_BATCH, number=run["number"])
        found, usual = statistics(at_start, normalized, kept), normalized["batch_stats"]
        stats = jax.tree.map(partial(jnp.where, run["kind"] == CONSTANT), found, usual)
        return with_numbers({**variables, "batch_stats": stats}, kind=run["kind"])

    def optimizer(run: dict) -> optax.GradientTransformation:
        layer, half = np.arange(depth), depth // 2
        upper = jnp.where(layer >= depth - half, run["upper"], NEVER)
        return optax.chain(optax.sgd(run["rate"]), standing_still(jnp.where(layer < half, run["lower"], upper)))

    def metrics(run: dict, state: dict, arrays: dict) -> dict[str, Array]:
        tops = greatest(state["variables"], arrays["test_images"])
        # Where a network has diverged its units are neither dead nor alive.
        return {"dead": jnp.where(jnp.all(jnp.isfinite(tops)), jnp.mean(tops <= 0), jnp.nan)}

    return loop.Task(init, tower(depth, width).apply, optimizer, metrics=metrics)


def trained(
    digits: str, depth: int, width: int, schedule: loop.Schedule, runs: Sequence[dict]
) -> tuple[dict, list[dict]]:
    """Train networks of one depth; runs: of one seed, always equally many, so that one program serves.

    Returns:
      Their loss and metrics at the end, each [runs]; their variables at the start and after each interval.
    """
    arrays, numbers = loop.on_device(data.load(digits)), loop.stacked(runs, len(runs))
    programs = loop.compile_grid(task(digits, depth, width), schedule, len(runs))
    states = programs.start(numbers, arrays)
    kept = [jax.tree.map(np.array, states["variables"])]  # copies: the next step consumes the states
    for step in range(0, schedule.steps, schedule.interval):
        states, loss = programs.advance(states, numbers, arrays, step)
        kept.append(jax.tree.map(np.array, states["variables"]))
    return jax.device_get({"loss": loss, **programs.evaluate(states, numbers, arrays)}), kept


def with_numbers(variables: dict, **numbers: Array | int) -> dict:
    """The same with these numbers among the batch_stats of every hidden layer."""
    stats = variables["batch_stats"]
    parts = {
        part: {**stats[part], **{name: jnp.full_like(stats[part][name], value) for name, value in numbers.items()}}
        for part in ("first", "rest")
    }
    return {**variables, "batch_stats": {**stats, **parts}}


def standing_still(until: Array) -> optax.GradientTransformation:
    """Sets the updates of a tower's hidden layer i to 0 from step `until[i]` on; until: [depth]."""

    def update(updates: dict, step: Array, params: dict | None = None) -> tuple[dict, Array]:
        moves = jnp.asarray(step < until, jnp.float32)
        first = jax.tree.map(lambda leaf: moves[0] * leaf, updates["first"])
        rest = jax.tree.map(lambda leaf: jnp.expand_dims(moves[1:], range(1, leaf.ndim)) * leaf, updates["rest"])
        return {**updates, "first": first, "rest": rest}, step + 1

    return optax.GradientTransformation(lambda params: jnp.int32(0), update)


@cache
def similarity(depth: int, width: int) -> Callable[[dict, dict, Array], Array]:
    """(variables, others, images) -> linear CKA of each hidden layer's outputs: [runs, depth]; leaves [runs, ...]."""
    look = outputs(depth, width, lambda y: y)

    def of_run(variables: dict, others: dict, images: Array) -> Array:
        return jax.vmap(linear_cka)(look(variables, images), look(others, images))

    return jax.jit(jax.vmap(of_run, (0, 0, None)))


@cache
def tapped(depth: int, width: int) -> TappedLoss:
    """The cross-entropy of the MLP that is such a tower, with each hidden layer's output to be looked at."""

    def loss(variables: dict, batch: dict, rng: Array, tap: Callable) -> LossOutput:
        names = iter(range(1, depth + 1))

        def apply(variables: dict, x: Array, *, train: bool) -> tuple[Array, dict]:
            y, moved = NORM.apply(variables, x, train=train)
            return tap(f"layer {next(names)}", y), moved

        network = models.mlp((width,) * depth, jaxbn.Normalizer(NORM.init, apply), **HOW)
        logits, moved = network.apply(variables, batch["x"], train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return LossOutput(losses.sum(), losses.size, moved)

    return loss


def gradients(depth: int, width: int, variables: dict, batch: dict) -> list[float]:
    """Norm of the loss's gradient by each hidden layer's output, [depth]; leaves have no axis of runs."""
    flow = gradient_flow(tapped(depth, width), unstacked(variables, depth), batch, rate=0.0)
    return [float(flow.layers[f"layer {number}"].gradient_norm) for number in range(1, depth + 1)]


def unstacked(variables: dict, depth: int) -> dict:
    """A tower's variables as those of `models.mlp`."""

    def layers(tree: dict) -> list[dict]:
        rest = [jax.tree.map(lambda leaf, i=i: leaf[i], tree["rest"]) for i in range(depth - 1)]
        return [tree["first"], *rest]

    params, stats = variables["params"], variables["batch_stats"]
    return {"params": [*layers(params), {"layer": params["head"]}], "batch_stats": layers(stats)}
