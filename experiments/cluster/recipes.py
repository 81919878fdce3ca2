"""The networks that can be trained over devices and processes, their steps and the batches of each process."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

import jaxbn
from experiments import training as experiments_training
from experiments.errors import UserError
from experiments.training import data, loop, models
from experiments.training.models import Network
from experiments.training.resnet import patch_convolve, small_resnet
from jaxbn import training

BENEFITS_WIDTHS = (100, 100, 100)
DEEP_CONV_DEPTH = 19
DECAY, EPSILON = 0.99, 1e-3  # of batch norm
PARALLEL = ("shard_map", "jit")


class Recipe(NamedTuple):
    """A network and how it is trained.

    Attributes:
      network: network(norm) is the network.
      optimizer: a function of optax.
      arguments: what it is called with.
    """

    network: Callable[[jaxbn.Normalizer], Network]
    optimizer: Callable[..., optax.GradientTransformation]
    arguments: dict[str, float]

    def described(self) -> dict:
        """The hyperparameters, as config.json has them: a run continues only with the same."""
        return {
            "optimizer": {"name": self.optimizer.__name__, **self.arguments},
            "norm": {"decay": DECAY, "epsilon": EPSILON},
        }


RECIPES = {
    "benefits": Recipe(
        lambda norm: models.mlp(
            BENEFITS_WIDTHS, norm, use_bias=False, activation=jax.nn.relu, weights=models.normal_weights(0.05)
        ),
        optax.sgd,
        {"learning_rate": 1.0},
    ),
    "deep_conv": Recipe(
        lambda norm: models.deep_conv(DEEP_CONV_DEPTH, norm, use_bias=False), optax.adam, {"learning_rate": 0.002}
    ),
    # Steps are scanned, where XLA's convolutions are slow on a CPU.
    "resnet20": Recipe(
        lambda norm: small_resnet(20, norm, convolve=patch_convolve),
        optax.sgd,
        {"learning_rate": 0.1, "momentum": 0.9},
    ),
}


class Settings(NamedTuple):
    """What determines the result; a run is continued only with the same."""

    name: str
    data: str = "mnist5k"
    seed: int = 0
    steps: int = 800
    interval: int = 20  # steps a dispatch, after which metrics are written
    batch: int = 64  # examples a step, all processes together
    microbatches: int = 1
    group_size: int | None = None  # examples that share statistics; None is the whole batch


def optimizer_of(settings: Settings) -> optax.GradientTransformation:
    """The optimizer of the settings' recipe."""
    recipe = RECIPES[settings.name]
    return recipe.optimizer(**recipe.arguments)


def network_and_step(settings: Settings, mesh: Mesh, parallel: str) -> tuple[Network, training.Step]:
    """The network that `settings` names, and a dispatch of its training, over the mesh's axis "data"."""
    axis_name = "data" if parallel == "shard_map" else None
    norm = jaxbn.batch_norm(decay=DECAY, epsilon=EPSILON, axis_name=axis_name, group_size=settings.group_size)
    network = RECIPES[settings.name].network(norm)

    def loss(variables: dict, batch: dict, rng: jax.Array) -> training.LossOutput:
        del rng
        logits, batch_stats = network.apply(variables, data.pixels(batch["image"]), train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        hits = jnp.argmax(logits, axis=-1) == batch["label"]
        return training.LossOutput(jnp.sum(losses), losses.size, batch_stats, {"accuracy": jnp.sum(hits * 1.0)})

    build = training.shard_map_step if parallel == "shard_map" else training.jit_step
    step = build(loss, optimizer_of(settings), mesh=mesh, microbatches=settings.microbatches, scan=True)
    return network, step


def start(settings: Settings, network: Network, dataset: data.Dataset) -> training.TrainState:
    """The state before the first step; computed in each process alone, on one device, so that all have the same."""
    images = data.pixels(jnp.asarray(dataset.train_images[:2]))
    variables = jax.jit(network.init)(jax.random.key(settings.seed), images)
    return training.init_state(variables, optimizer_of(settings))


def batches(settings: Settings, dataset: data.Dataset, done: int) -> Iterator[dict]:
    """This process's part of every dispatch, leaves [interval, examples, ...], from step `done` on.

    It reads no other examples.
    """
    size = settings.batch // jax.process_count()
    own = slice(jax.process_index() * size, (jax.process_index() + 1) * size)
    seed, examples = jnp.int32(settings.seed), len(dataset.train_labels)
    for first in range(done, settings.steps, settings.interval):
        drawn = loop.batch_indices(seed, jnp.int32(first), settings.interval, settings.batch, examples)
        rows = np.asarray(drawn)[:, own]
        yield {"image": dataset.train_images[rows], "label": dataset.train_labels[rows]}


def check(settings: Settings, parallel: str, numbers: dict[str, int | None]) -> None:
    """Raise a UserError where settings or options, further numbers by their names, cannot be used."""
    if settings.name not in RECIPES:
        raise UserError(f"there is no network {settings.name!r}; choose one of: {', '.join(RECIPES)}")
    if parallel not in PARALLEL:
        raise UserError(f"--parallel {parallel!r}; choose shard_map or jit")
    given = {name: getattr(settings, name) for name in ("steps", "interval", "batch", "microbatches", "group_size")}
    for name, value in {**given, **numbers}.items():
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: give a whole number from 1 on")
    if settings.steps % settings.interval:
        raise UserError(f"{settings.steps} steps are no multiple of the interval of {settings.interval}")


def check_data(settings: Settings, dataset: data.Dataset) -> None:
    """Raise a UserError where the data do not fit the settings, the devices or the network's classes."""
    shards, examples = jax.device_count() * settings.microbatches, len(dataset.train_labels)
    if settings.batch % shards:
        raise UserError(
            f"a batch of {settings.batch} does not divide into {jax.device_count()} devices with"
            f" {settings.microbatches} microbatches each: pass --batch with a multiple of {shards}"
        )
    if settings.batch > examples:
        raise UserError(f"{settings.data} has {examples} examples to train on: pass a smaller --batch than that")
    network = RECIPES[settings.name].network(jaxbn.batch_norm(decay=DECAY, epsilon=EPSILON))
    images = jax.ShapeDtypeStruct((2, *dataset.train_images.shape[1:]), jnp.float32)
    try:
        variables = jax.eval_shape(network.init, jax.random.key(0), images)
        logits, _ = jax.eval_shape(lambda v, x: network.apply(v, x, train=True), variables, images)
    except (TypeError, ValueError) as error:
        shape = " x ".join(map(str, images.shape[1:]))
        raise UserError(
            f"{settings.name} takes no images of {shape} ({_first_line(error)}): choose another --data"
        ) from None
    for part, labels in (("training", dataset.train_labels), ("test", dataset.test_labels)):
        wrong = np.flatnonzero((labels < 0) | (labels >= logits.shape[-1]))
        if wrong.size:
            raise UserError(
                f"{settings.data} has the label {labels[wrong[0]]} at {part} image {wrong[0]}, where {settings.name}"
                f" has the classes 0 to {logits.shape[-1] - 1}: choose another --data"
            )


def check_groups(settings: Settings, step: training.Step, state: training.TrainState, dataset: data.Dataset) -> None:
    """The library's own refusal of a group size that does not fit, as a UserError; all processes come to the same."""
    if settings.group_size is None:
        return
    leading = (settings.interval, settings.batch)
    batch = {
        "image": jax.ShapeDtypeStruct(leading + dataset.train_images.shape[1:], dataset.train_images.dtype),
        "label": jax.ShapeDtypeStruct(leading, dataset.train_labels.dtype),
    }
    try:
        jax.eval_shape(step, state, batch, jax.random.key(settings.seed))
    except ValueError as error:
        raise UserError(f"--group-size {settings.group_size}: {_first_line(error)}") from None


def code() -> str:
    """SHA-256 of the source on which the result depends: the library, the experiments' training, and this file."""
    found = hashlib.sha256()
    roots = [Path(jaxbn.__file__).parent, Path(experiments_training.__file__).parent]
    files = [file for root in roots for file in sorted(root.rglob("*.py"))]
    for file in [*files, Path(__file__)]:
        found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
