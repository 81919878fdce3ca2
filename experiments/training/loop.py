"""Training a grid: every run (seed, rate, initialization, ...) of one architecture, together, in one compiled program.

A *run* is a dict of numbers, with at least `"seed"`; a grid is a list of them, seed after seed, with equally many runs
of each. The runs of a seed see the same batches: they train under a `vmap` inside a `lax.scan` over steps, and the
seeds under a `vmap` around it or, where a few networks already fill the machine and its caches, a `lax.map`. The
data set lies on the device once and all runs draw from it; metrics come back once per interval; the state is donated.
Memory is bounded by training a long grid in parts of equal size, one after the other.

Everything random follows from a run's seed and the step's number alone, so that a run is the same in any grid, and a
grid that continues from a checkpoint goes on as if it had never stopped.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from experiments.errors import UserError
from experiments.training.dataset import Dataset, pixels
from jaxbn.training import LossOutput

EVALUATION_BATCH = 1000  # images at a time: what a forward pass over the test set keeps in memory
USUAL_SHAPE = (28, 28, 1)  # of images, as in MNIST


def softmax_loss(logits: Array, labels: Array) -> Array:
    """Cross-entropy of the softmax, mean over the batch; logits: [batch, classes], labels: int [batch]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def sigmoid_loss(logits: Array, labels: Array) -> Array:
    """Cross-entropy of a sigmoid per class against one-hot labels, mean over the batch *and the classes*."""
    return optax.sigmoid_binary_cross_entropy(logits, jax.nn.one_hot(labels, logits.shape[-1])).mean()


def loss_of(apply: Callable, train: bool = True) -> Callable:
    """The mean cross-entropy of a network as `jaxbn.diagnostics` wants it: loss(variables, (images, labels), rng)."""

    def loss(variables: dict, batch: tuple[Array, Array], rng: Array) -> LossOutput:
        logits, batch_stats = apply(variables, batch[0], train=train)
        return LossOutput(softmax_loss(logits, batch[1]), 1.0, batch_stats)

    return loss


class Task(NamedTuple):
    """What the runs of a grid have in common, as functions of the run (a dict of scalars, traced)."""

    init: Callable | None  # init(run, key, x) -> {"params", "batch_stats"}; x: one batch of float32 images
    apply: Callable  # apply(variables, x, *, train) -> (logits, batch_stats)
    optimizer: Callable  # optimizer(run) -> optax.GradientTransformation
    loss: Callable = softmax_loss  # loss(logits, labels) -> scalar
    # metrics(run, state, arrays) -> {name: scalar}, measured with the accuracies; state: {"variables", "optimizer"} of
    # one run, arrays: of `on_device`
    metrics: Callable | None = None
    after: Callable | None = None  # after(variables, images) -> variables: changes them once the optimizer has stepped


class Schedule(NamedTuple):
    """How long and in what portions: `steps` of `batch_size` examples, measured every `interval` steps."""

    steps: int
    interval: int
    batch_size: int
    runs_at_once: int = 64  # runs in memory together; at least those of one seed
    mapped: bool | None = None  # seed after seed (lax.map) or all at once (vmap); None: mapped on a CPU


def on_device(dataset: Dataset) -> dict[str, Array]:
    """The data set as device arrays by name.

    Training images are flattened to [n, pixels]: XLA gathers rows of bytes ten times faster than images.
    """
    flat = dataset.train_images.reshape(len(dataset.train_images), -1)
    return jax.tree.map(jnp.asarray, {**dataset._asdict(), "train_images": flat})


def check_data(task: Task, schedule: Schedule, run: dict, dataset: Dataset) -> None:
    """Raise a UserError where there are fewer training examples than a batch, or the network takes no such images.

    Networks here are made for images of 28 x 28; only others are tried, without computing anything.
    """
    examples, shape = len(dataset.train_labels), dataset.train_images.shape[1:]
    if examples < schedule.batch_size:
        raise UserError(
            f"the data set has {examples} training images, where a batch takes {schedule.batch_size}: choose another"
            " --data"
        )
    if shape == USUAL_SHAPE:
        return
    images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    try:
        variables = jax.eval_shape(lambda run: task.init(run, jax.random.key(0), images), numbers_of(run))
        jax.eval_shape(partial(task.apply, train=True), variables, images)
    except (TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        in_words = " x ".join(map(str, shape))
        raise UserError(f"the network takes no images of {in_words} ({reason}): choose another --data") from error


@partial(jax.jit, static_argnums=(2, 3, 4))
def draw(seeds: Array, start: Array, steps: int, batch_size: int, examples: int) -> Array:
    """`batch_indices` of every seed: int32 [seeds, steps, batch_size]. Its own program: all architectures share it."""
    return jax.vmap(lambda seed: batch_indices(seed, start, steps, batch_size, examples))(seeds)


def batch_indices(seed: Array, start: Array, steps: int, batch_size: int, examples: int) -> Array:
    """Which examples make the batches of steps `start ... start + steps - 1`: int32 [steps, batch_size].

    Every epoch is a fresh permutation, keyed by the seed and the epoch's number; the examples that do not fill a last
    batch sit that epoch out.
    """
    per_epoch = examples // batch_size
    if not per_epoch:
        raise ValueError(f"a batch of {batch_size} cannot be drawn from {examples} examples")
    touched = (steps + per_epoch - 2) // per_epoch + 1  # epochs that `steps` steps can touch at most
    epochs = start // per_epoch + jnp.arange(touched)
    key = jax.random.fold_in(jax.random.key(seed), 1)
    shuffled = jax.vmap(lambda epoch: jax.random.permutation(jax.random.fold_in(key, epoch), examples))(epochs)
    batches = shuffled[:, : per_epoch * batch_size].reshape(touched * per_epoch, batch_size)
    return jax.lax.dynamic_slice_in_dim(batches, start % per_epoch, steps)


def take(arrays: dict, index: Array) -> tuple[Array, Array]:
    """The training images (float32, image-shaped) and labels numbered by `index` [batch]."""
    flat = arrays["train_images"].at[index].get(mode="promise_in_bounds")
    images = pixels(flat).reshape(len(index), *arrays["test_images"].shape[1:])
    return images, arrays["train_labels"].at[index].get(mode="promise_in_bounds")


def init_run(task: Task, images: Array, run: dict) -> dict:
    """The state of one run before its first step: variables and the optimizer's state."""
    key = jax.random.fold_in(jax.random.key(run["seed"]), 0)
    variables = task.init(run, key, pixels(images[:2]))
    return {"variables": variables, "optimizer": task.optimizer(run).init(variables["params"])}


def train_step(task: Task, run: dict, state: dict, images: Array, labels: Array) -> tuple[dict, Array]:
    """One gradient step of one run on the loss; returns the new state and the loss before the step."""

    def loss_of(params: dict) -> tuple[Array, dict]:
        logits, batch_stats = task.apply({**state["variables"], "params": params}, images, train=True)
        return task.loss(logits, labels), batch_stats

    params = state["variables"]["params"]
    (loss, batch_stats), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
    updates, optimizer = task.optimizer(run).update(gradient, state["optimizer"], params)
    variables = {"params": optax.apply_updates(params, updates), "batch_stats": batch_stats}
    variables = variables if task.after is None else task.after(variables, images)
    return {"variables": variables, "optimizer": optimizer}, loss


def is_right(apply: Callable, variables: dict, images: Array, labels: Array) -> Array:
    """Whether the label of each image is predicted at test time: bool [n]; batch by batch, to save memory."""
    batches = -(-len(labels) // EVALUATION_BATCH)
    padding = -len(labels) % batches
    images = jnp.pad(images, [(0, padding), *[(0, 0)] * (images.ndim - 1)])

    def predict(batch: Array) -> Array:
        logits, _ = apply(variables, pixels(batch), train=False)
        return jnp.argmax(logits, axis=-1)

    predicted = jax.lax.map(predict, images.reshape(batches, -1, *images.shape[1:]))
    return predicted.reshape(-1)[: len(labels)] == labels


def accuracy(apply: Callable, variables: dict, images: Array, labels: Array) -> Array:
    """The share of images whose label is predicted at test time; float32 scalar."""
    return jnp.mean(is_right(apply, variables, images, labels), dtype=jnp.float32)


def evaluate(task: Task, run: dict, state: dict, arrays: dict) -> dict[str, Array]:
    """What is measured of one network: "validation_accuracy", "test_accuracy" and the metrics of the task."""
    # Both parts at once, so that the network is compiled once.
    images, labels = (
        jnp.concatenate([arrays[f"validation_{kind}"], arrays[f"test_{kind}"]]) for kind in ("images", "labels")
    )
    right = is_right(task.apply, state["variables"], images, labels)
    validation, test = jnp.split(right, [len(arrays["validation_labels"])])
    found = {
        "validation_accuracy": jnp.mean(validation, dtype=jnp.float32),
        "test_accuracy": jnp.mean(test, dtype=jnp.float32),
    }
    return found | ({} if task.metrics is None else task.metrics(run, state, arrays))


class Programs(NamedTuple):
    """A grid's programs. Every leaf of `states`, and every entry of `runs`, has a leading axis [runs]."""

    start: Callable  # start(runs, arrays) -> states before the first step
    advance: Callable  # advance(states, runs, arrays, step) -> (states, loss [runs]); consumes the states
    evaluate: Callable  # evaluate(states, runs, arrays) -> {name of a metric: [runs]}; see `evaluate`


@functools.lru_cache(maxsize=8)
def compile_grid(task: Task, schedule: Schedule, per_seed: int = 1) -> Programs:
    """The programs for grids of `task` with `per_seed` runs of each seed; asked again, the same compiled ones.

    `advance` trains every run for one interval from step number `step` on and returns the mean loss of the interval.
    Tasks that differ in `init` alone share both `advance` and `evaluate`.
    """

    def start(runs: dict, arrays: dict) -> dict:
        # Not compiled as a whole: random draws are slow to compile, and taken one by one they are compiled once for
        # all architectures that have the same shapes.
        return jax.vmap(partial(init_run, task, arrays["test_images"]))(runs)

    return Programs(start, *_compile_training(task._replace(init=None), schedule, per_seed))


@functools.lru_cache(maxsize=8)
def _compile_training(task: Task, schedule: Schedule, per_seed: int) -> tuple[Callable, Callable]:
    """`advance` and `evaluate` of `compile_grid`; the task has no `init`."""
    mapped = jax.default_backend() == "cpu" if schedule.mapped is None else schedule.mapped
    over_seeds = jax.lax.map if mapped else lambda f, xs: jax.vmap(f)(xs)

    @partial(jax.jit, donate_argnums=0)
    def train_interval(states: dict, runs: dict, arrays: dict, indices: Array) -> tuple[dict, Array]:
        def train_seed(of_seed: tuple[dict, dict, Array]) -> tuple[dict, Array]:
            states, runs, indices = of_seed

            def body(states: dict, index: Array) -> tuple[dict, Array]:
                batch = take(arrays, index)
                return jax.vmap(lambda state, run: train_step(task, run, state, *batch))(states, runs)

            states, losses = jax.lax.scan(body, states, indices)
            return states, losses.mean(axis=0)

        return join(over_seeds(train_seed, (*split((states, runs), per_seed), indices)))

    @jax.jit
    def evaluate_grid(states: dict, runs: dict, arrays: dict) -> dict[str, Array]:
        def evaluate_seed(of_seed: tuple[dict, dict]) -> dict[str, Array]:
            return jax.vmap(lambda run, state: evaluate(task, run, state, arrays))(*of_seed)

        return join(over_seeds(evaluate_seed, split((runs, states), per_seed)))

    def advance(states: dict, runs: dict, arrays: dict, step: int) -> tuple[dict, Array]:
        examples = len(arrays["train_labels"])
        drawn = draw(runs["seed"][::per_seed], step, schedule.interval, schedule.batch_size, examples)
        return train_interval(states, runs, arrays, drawn)

    return advance, evaluate_grid


def split(tree: Any, per_seed: int) -> Any:
    """Leaves [runs, ...] to [seeds, per_seed, ...]."""
    return jax.tree.map(lambda leaf: leaf.reshape(len(leaf) // per_seed, per_seed, *leaf.shape[1:]), tree)


def join(tree: Any) -> Any:
    """Leaves [seeds, per_seed, ...] to [runs, ...]."""
    return jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]), tree)


def runs_per_seed(runs: list[dict]) -> int:
    """How many runs each seed has; ValueError unless they come seed after seed, equally many of each."""
    per_seed = sum(run["seed"] == runs[0]["seed"] for run in runs)
    groups = [{run["seed"] for run in runs[first : first + per_seed]} for first in range(0, len(runs), per_seed)]
    if len(runs) % per_seed or any(len(seeds) > 1 for seeds in groups):
        raise ValueError(f"runs must come seed after seed, equally many of each; got {[r['seed'] for r in runs]}")
    return per_seed


def parts_of(runs: list[dict], at_once: int) -> list[list[dict]]:
    """Split a grid, between seeds, into as few parts of at most `at_once` runs as will do, of nearly equal sizes."""
    per_seed = runs_per_seed(runs)
    seeds = len(runs) // per_seed
    count = -(-seeds // max(1, at_once // per_seed))
    size = -(-seeds // count) * per_seed
    return [runs[first : first + size] for first in range(0, len(runs), size)]


def stacked(runs: list[dict], size: int) -> dict[str, Array]:
    """Runs as a dict of arrays [size]; the last seed fills up a part that is too short, so that nothing retraces."""
    per_seed = runs_per_seed(runs)
    filled = [*runs, *runs[-per_seed:] * ((size - len(runs)) // per_seed)]
    return {
        name: jnp.asarray([run[name] for run in filled], jnp.int32 if name == "seed" else jnp.float32)
        for name in numbers_of(runs[0])
    }


def numbers_of(run: dict) -> dict:
    """A run without the words in it, which are names for the numbers beside them."""
    return {name: value for name, value in run.items() if not isinstance(value, str)}
