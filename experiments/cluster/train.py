"""Data-parallel training of a network over devices and processes, with checkpoints from which it resumes bit for bit.

    python -m experiments train deep_conv --devices 8

trains on 8 devices forced out of one CPU. Two processes that each read half of every batch, one command each:

    python -m experiments train deep_conv --coordinator localhost:9876 --processes 2 --process 0
    python -m experiments train deep_conv --coordinator localhost:9876 --processes 2 --process 1

The directory for the results is shared by all processes. Running the same command again continues where the newest
whole checkpoint is, on as many devices and processes as there are then: bit for bit on the same number, to rounding on
another. SIGTERM or Ctrl-C to any process makes all save and end.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

import jaxbn
from experiments.cluster import processes
from experiments.errors import UserError
from experiments.framework import snapshots
from experiments.framework.record import read_json, write_json
from experiments.training import data, loop, models
from experiments.training.models import Network
from experiments.training.resnet import patch_convolve, small_resnet
from jaxbn import training

BENEFITS_WIDTHS = (100, 100, 100)
DEEP_CONV_DEPTH = 19


class Recipe(NamedTuple):
    """A network and how it is trained."""

    network: Callable[[jaxbn.Normalizer], Network]
    optimizer: optax.GradientTransformation


RECIPES = {
    "benefits": Recipe(
        lambda norm: models.mlp(
            BENEFITS_WIDTHS, norm, use_bias=False, activation=jax.nn.relu, weights=models.normal_weights(0.05)
        ),
        optax.sgd(1.0),
    ),
    "deep_conv": Recipe(lambda norm: models.deep_conv(DEEP_CONV_DEPTH, norm, use_bias=False), optax.adam(0.002)),
    # Steps are scanned, where XLA's convolutions are slow on a CPU.
    "resnet20": Recipe(lambda norm: small_resnet(20, norm, convolve=patch_convolve), optax.sgd(0.1, momentum=0.9)),
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


def train(
    settings: Settings,
    directory: Path,
    cluster: processes.Cluster,
    *,
    devices: int | None = None,
    spread: str = "shard_map",
    save_every: int = 100,
) -> dict:
    """Train, or continue; the summary, with a digest of what this process holds at the end.

    Args:
      settings: what to train.
      directory: for config.json, metrics.jsonl, summary.json and checkpoints/, which all processes can reach.
      cluster: the processes.
      devices: how many CPU devices each process makes; None leaves JAX its default.
      spread: "shard_map" or "jit".
      save_every: steps from one checkpoint to the next, rounded up to whole intervals.

    Raises:
      UserError: what was given cannot be used; in all processes.
      SystemExit: SIGTERM (143) or Ctrl-C (130) was received by one of the processes, and what is done is saved.
    """
    _check(settings, spread, devices, save_every)
    processes.join(cluster, devices)
    where = _Where(directory, directory / "checkpoints")
    with processes.giving_up(cluster, where.checkpoints), processes.Terminator() as terminator:
        return _train(settings, where, spread, save_every, terminator)


class _Where(NamedTuple):
    directory: Path
    checkpoints: Path

    @property
    def metrics(self):
        return self.directory / "metrics.jsonl"


def _train(settings, where, spread, save_every, terminator) -> dict:
    mesh = Mesh(np.asarray(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    dataset = processes.prepare_together(lambda: _open(settings, where), (settings, spread, save_every))
    network, step = network_and_step(settings, mesh, spread)
    state = training.replicate(start(settings, network, dataset), mesh)
    _check_groups(settings, step, state, dataset)
    done = snapshots.newest(where.checkpoints, _say)
    if done:
        state = snapshots.restore(where.checkpoints, done, state)
        _say(f"continuing from step {done}")
    done = saved = done or 0
    _cut_metrics(where, done)
    began, first = time.monotonic(), done
    key = jax.random.key(settings.seed)
    for batch in batches(settings, dataset, done):
        state, metrics = step(state, training.shard_batch(batch, mesh, scan=True), key)
        done += settings.interval
        metrics = jax.device_get(metrics)  # waits, so that a lost process shows here
        rate = (done - first) / (time.monotonic() - began)
        _write_metrics(where, done, metrics)
        _say(f"step {done} of {settings.steps}: loss {metrics['loss'].mean():.4f}, {rate:.1f} steps/s")
        stop = terminator.requested()
        if stop or done >= settings.steps or done - saved >= save_every:
            snapshots.save(where.checkpoints, done, state)
            saved = done
        if stop and done < settings.steps:
            print(f"stopped: saved step {done}; the same command continues from there", flush=True)
            raise SystemExit(128 + stop)
    return _conclude(settings, where, network, dataset, state)


def network_and_step(settings: Settings, mesh: Mesh, spread: str) -> tuple[Network, training.Step]:
    """The network that `settings` names, and a dispatch of its training, over the mesh's axis "data"."""
    recipe = RECIPES[settings.name]
    axis_name = "data" if spread == "shard_map" else None
    norm = jaxbn.batch_norm(decay=0.99, epsilon=1e-3, axis_name=axis_name, group_size=settings.group_size)
    network = recipe.network(norm)

    def loss(variables: dict, batch: dict, rng: jax.Array) -> training.LossOutput:
        del rng
        logits, batch_stats = network.apply(variables, data.pixels(batch["image"]), train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        hits = jnp.argmax(logits, axis=-1) == batch["label"]
        return training.LossOutput(jnp.sum(losses), losses.size, batch_stats, {"accuracy": jnp.sum(hits * 1.0)})

    build = training.shard_map_step if spread == "shard_map" else training.jit_step
    step = build(loss, recipe.optimizer, mesh=mesh, microbatches=settings.microbatches, scan=True)
    return network, step


def start(settings: Settings, network: Network, dataset: data.Dataset) -> training.TrainState:
    """The state before the first step; computed in each process alone, on one device, so that all have the same."""
    images = data.pixels(dataset.train_images[:2].astype(np.float32))
    variables = jax.jit(network.init)(jax.random.key(settings.seed), jnp.asarray(images))
    return training.init_state(variables, RECIPES[settings.name].optimizer)


def batches(settings: Settings, dataset: data.Dataset, done: int) -> Iterator[dict]:
    """This process's part of every dispatch, leaves [interval, examples, ...], from step `done` on.

    It reads no other examples.
    """
    size = settings.batch // jax.process_count()
    own = slice(jax.process_index() * size, (jax.process_index() + 1) * size)
    for first in range(done, settings.steps, settings.interval):
        rows = loop.batch_indices(settings.seed, first, settings.interval, settings.batch, len(dataset.train_labels))
        rows = np.asarray(rows)[:, own]
        yield {"image": dataset.train_images[rows], "label": dataset.train_labels[rows]}


def _conclude(settings, where, network, dataset, state) -> dict:
    variables = jax.tree.map(lambda leaf: np.asarray(leaf.addressable_shards[0].data), state.variables)
    summary = {**settings._asdict(), "sha256": digest(state), "devices": jax.device_count()}
    if jax.process_index() == 0:
        images, labels = (jnp.asarray(v) for v in (dataset.test_images, dataset.test_labels))
        accuracy = jax.jit(lambda *arguments: loop.accuracy(network.apply, *arguments))
        summary["accuracy"] = float(accuracy(variables, images, labels))
        write_json(where.directory / "summary.json", summary)
        print(f"test accuracy {summary['accuracy']:.4f}; results in {where.directory}", flush=True)
    print(
        f"process {jax.process_index()} of {jax.process_count()}: step {settings.steps}, sha256 {summary['sha256']}",
        flush=True,
    )
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("done")  # at exit JAX waits only shortly
    return summary


def digest(state: training.TrainState) -> str:
    """SHA-256 of everything in the state, as the first device of this process holds it."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        found.update(np.asarray(leaf.addressable_shards[0].data).tobytes())
    return found.hexdigest()


def _check(settings, spread, devices, save_every):
    if settings.name not in RECIPES:
        raise UserError(f"there is no network {settings.name!r}; choose one of: {', '.join(RECIPES)}")
    if spread not in ("shard_map", "jit"):
        raise UserError(f"--spread {spread!r}; choose shard_map or jit")
    numbers = {name: getattr(settings, name) for name in ("steps", "interval", "batch", "microbatches", "group_size")}
    for name, value in {**numbers, "devices": devices, "save_every": save_every}.items():
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: give a whole number from 1 on")
    if settings.steps % settings.interval:
        raise UserError(f"{settings.steps} steps are no multiple of the interval of {settings.interval}")


def _open(settings, where) -> data.Dataset:
    """The data; and process 0 takes the directory for this run."""
    dataset = data.load(settings.data)
    shards, examples = jax.device_count() * settings.microbatches, len(dataset.train_labels)
    if settings.batch % shards:
        raise UserError(
            f"a batch of {settings.batch} does not divide into {jax.device_count()} devices with"
            f" {settings.microbatches} microbatches each: pass --batch with a multiple of {shards}"
        )
    if settings.batch > examples:
        raise UserError(f"{settings.data} has {examples} examples to train on: pass a smaller --batch than that")
    if jax.process_index() == 0:
        _claim(where, json.loads(json.dumps(settings._asdict())))
    return dataset


def _claim(where, wanted):
    """Write config.json, or hold it against `wanted`."""
    path = where.directory / "config.json"
    try:
        if path.exists():
            _compare(where.directory, read_json(path), wanted)
        elif where.directory.is_dir() and any(where.directory.iterdir()):
            raise UserError(f"{where.directory} exists and holds no run (no config.json in it): choose another --out")
        where.directory.mkdir(parents=True, exist_ok=True)
        write_json(path, wanted)
        where.checkpoints.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {where.directory} ({error.strerror}): choose another --out") from None


def _compare(directory, held, wanted):
    different = [
        f"its {name} is {held.get(name)!r}, not {wanted.get(name)!r}"
        for name in {**wanted, **held}
        if held.get(name) != wanted.get(name)
    ]
    if different:
        raise UserError(f"{directory} holds another run ({'; '.join(different[:3])}): choose another --out")


def _check_groups(settings, step, state, dataset):
    """The library's own refusal of a group size that does not fit; all processes come to the same."""
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
        raise UserError(f"--group-size {settings.group_size}: {error}") from None


def _write_metrics(where, done, metrics):
    if jax.process_index():
        return
    row = {"step": done, **{name: float(np.mean(values)) for name, values in metrics.items()}}
    with where.metrics.open("a") as file:
        file.write(json.dumps(row) + "\n")


def _cut_metrics(where, done):
    """Drop the rows of steps that are going to be done again."""
    if jax.process_index() or not where.metrics.exists():
        return
    rows = [line for line in where.metrics.read_text().splitlines() if line.endswith("}")]
    kept = [line for line in rows if json.loads(line)["step"] <= done]
    shorter = where.metrics.with_suffix(".new")
    shorter.write_text("".join(line + "\n" for line in kept))
    shorter.replace(where.metrics)


def _say(line):
    if jax.process_index() == 0:
        print(line, flush=True)
