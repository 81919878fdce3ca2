"""Data-parallel training of a network over devices and processes, with checkpoints from which it resumes bit for bit.

    python -m experiments train deep_conv --devices 8

trains on 8 devices forced out of one CPU. Two processes that each read half of every batch, one command each:

    python -m experiments train deep_conv --coordinator localhost:9876 --processes 2 --process 0
    python -m experiments train deep_conv --coordinator localhost:9876 --processes 2 --process 1

The directory for the results is shared by all processes. Running the same command again continues where the newest
whole checkpoint is, on as many devices and processes as there are then: bit for bit on the same number, to rounding on
another. A signal to any process makes all save and end; README.md has a table of faults.
"""

import hashlib
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

from experiments.cluster import processes, recipes
from experiments.cluster.recipes import RECIPES, Settings
from experiments.cluster.refusals import Refusals, together
from experiments.errors import GaveUpError
from experiments.framework import checkpoint, lock
from experiments.framework.provenance import provenance
from experiments.framework.record import CHECKPOINTS, Record, compact, open_record, write_json
from experiments.framework.stopping import Stopped, Terminator, say
from experiments.training import data, loop
from experiments.training.models import Network
from jaxbn import training


class Options(NamedTuple):
    """How a run is made, which does not determine its result.

    Attributes:
      parallel: "shard_map" or "jit".
      save_every: steps from one checkpoint to the next, rounded up to whole intervals.
      give_up_after: so many refused steps in a row end the run.
      devices: how many CPU devices each process makes; None leaves JAX its default.
    """

    parallel: str = "shard_map"
    save_every: int = 100
    give_up_after: int = 100
    devices: int | None = None


def train(settings: Settings, directory: Path, cluster: processes.Cluster, options: Options) -> dict:
    """Train, or continue; the summary, with a digest of what this process holds at the end.

    Args:
      settings: what to train.
      directory: for config.json, metrics.jsonl, summary.json and checkpoints/, which all processes can reach.
      cluster: the processes.
      options: how.

    Raises:
      UserError: what was given cannot be used; in all processes.
      GaveUpError: too many steps in a row were refused; in all processes, and what is done is saved.
      Stopped: a signal was received by one of the processes; in all, and what is done is saved.
    """
    numbers = {name: getattr(options, name) for name in ("save_every", "give_up_after", "devices")}
    recipes.check(settings, options.parallel, numbers)
    processes.join(cluster, options.devices)
    with processes.giving_up(cluster, str(directory / CHECKPOINTS)), Terminator() as terminator:
        try:
            summary = _train(settings, directory, options, terminator)
        except (processes.AgreedError, GaveUpError, Stopped):  # raised in all processes
            processes.part_in_peace(cluster)
            raise
        processes.part_in_peace(cluster)
        return summary


class _Run:
    """A run's directory, as each process sees it: process 0 has the record, the others what they need of it."""

    def __init__(self, directory: Path, record: Record | None):
        self.directory, self.record = directory, record
        told = None if record is None else [record.place.number, record.place.arrays, record.place.position]
        number, arrays, position = json.loads(processes.tell_all(json.dumps(told)))
        self.number = number if arrays else None
        self.done = position["step"] if arrays else 0

    def restore(self, like: training.TrainState) -> training.TrainState:
        """The state with which the run continues."""
        if self.number is None:
            return like
        _say(f"continuing from step {self.done}")
        return checkpoint.restore(self.directory / CHECKPOINTS, self.number, like)

    def append(self, row: dict) -> None:
        """Write a row."""
        if self.record is not None:
            self.record.append([row])

    def save(self, state: training.TrainState, done: int, finished: bool) -> None:
        """Write a checkpoint; every process calls this."""
        if self.record is not None:
            self.record.commit(state, done, position={"step": done}, finished=finished)
        else:
            checkpoint.save_state(self.directory / CHECKPOINTS, done, state)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("saved")


def _train(settings: Settings, directory: Path, options: Options, terminator: Terminator) -> dict:
    processes.check_devices()
    mesh = Mesh(np.asarray(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    dataset = processes.prepare_together(lambda: _load(settings))
    agreed = {**settings._asdict(), **options._asdict(), "devices": jax.local_device_count()}
    origin = provenance()
    processes.agree(
        {**agreed, "data": dataset.fingerprint, "code": recipes.code(), "set of versions": origin["versions"]}
    )
    run = _open(settings, directory, dataset, origin)
    network, step = recipes.network_and_step(settings, mesh, options.parallel)
    state = training.replicate(recipes.start(settings, network, dataset), mesh)
    processes.prepare_together(lambda: recipes.check_groups(settings, step, state, dataset))
    state, done = run.restore(state), run.done
    saved, began, refused = done, None, Refusals()
    key = jax.random.key(settings.seed)
    for batch in recipes.batches(settings, dataset, done):
        state, metrics = step(state, training.shard_batch(batch, mesh, scan=True), key)
        metrics = jax.device_get(metrics)  # waits, so that a lost process shows here
        of_interval = Refusals().after(done, metrics["skipped"], metrics["nonfinite"])
        refused = refused.after(done, metrics["skipped"], metrics["nonfinite"])
        done += settings.interval
        row = _row(done, metrics, of_interval)
        run.append(row)
        rate = "" if began is None else f", {(done - began[0]) / (time.monotonic() - began[1]):.1f} steps/s"
        began = began or (done, time.monotonic())  # after the first dispatch, which compiles
        _say(
            f"step {done} of {settings.steps}: loss {row['loss']:.4f}{rate}"
            + (f"; {of_interval}" if of_interval.number else "")
        )
        stop, hopeless = processes.stop_requested(terminator), refused.in_a_row >= options.give_up_after
        if stop or hopeless or done >= settings.steps or done - saved >= options.save_every:
            run.save(state, done, done >= settings.steps)
            saved = done
        if hopeless:
            raise GaveUpError(
                f"gave up at step {done}: the last {refused.in_a_row} steps were refused. In all, {refused}. Look at"
                f" the learning rate, the data and the loss. Saved in {directory}"
            )
        if stop and done < settings.steps:
            raise Stopped(stop, f"saved step {done}")
    return _conclude(settings, run, network, dataset, state)


def _load(settings: Settings) -> data.Dataset:
    dataset = data.load(settings.data)
    recipes.check_data(settings, dataset)
    return dataset


def _open(settings: Settings, directory: Path, dataset: data.Dataset, origin: dict) -> _Run:
    """The run's directory, taken by process 0 for all; an error in all processes if that fails in one."""
    first = jax.process_index() == 0
    record = processes.prepare_together(lambda: _record(settings, directory, dataset, origin) if first else None)
    token = processes.tell_all(lock.acquire(directory) if record is not None else "")
    if jax.process_count() > 1:
        processes.prepare_together(lambda: lock.share(directory) if first else None)
        processes.prepare_together(lambda: None if first else lock.join(directory, token))
    return _Run(directory, record)


def _record(settings: Settings, directory: Path, dataset: data.Dataset, origin: dict) -> Record:
    config: dict[str, Any] = {
        "experiment": f"train {settings.name}",
        "preset": None,
        "settings": {**settings._asdict(), **RECIPES[settings.name].described()},
        "data": {"name": settings.data, "sha256": dataset.fingerprint},
        "code": recipes.code(),
        "devices": jax.device_count(),
        "provenance": origin,
    }
    record = open_record(directory, config)
    held = record.config
    if held.get("code") != config["code"]:
        say("note: the code has changed since this run began; it goes on with the new one")
    then, now = held["provenance"]["versions"], config["provenance"]["versions"]
    changed = [f"{name} {then.get(name)} to {now[name]}" for name in now if then.get(name) != now[name]]
    if changed:
        say(f"note: versions have changed since this run began: {', '.join(changed)}")
    if held.get("devices") != config["devices"]:
        say(f"note: this run began on {held.get('devices')} devices and goes on with {config['devices']}, to rounding")
    return record


def _row(done: int, metrics: dict, refused: Refusals) -> dict:
    """A row of metrics.jsonl: means over the steps that were taken, and what is to be said of those refused."""
    taken = metrics["skipped"] == 0
    means = {name: np.mean(metrics[name][taken]) if taken.any() else np.nan for name in ("loss", "accuracy")}
    return {"step": done, **means, **({"refused": refused.to_json()} if refused.number else {})}


def _conclude(
    settings: Settings, run: _Run, network: Network, dataset: data.Dataset, state: training.TrainState
) -> dict:
    variables = jax.tree.map(lambda leaf: np.asarray(leaf.addressable_shards[0].data), state.variables)
    summary = {**settings._asdict(), "sha256": digest(state), "devices": jax.device_count()}
    if run.record is not None:
        images, labels = (jnp.asarray(v) for v in (dataset.test_images, dataset.test_labels))
        accuracy = jax.jit(lambda *arguments: loop.accuracy(network.apply, *arguments))
        refused = together(run.record.rows())
        summary |= {"accuracy": float(accuracy(variables, images, labels)), "refused": refused.to_json()}
        write_json(run.directory / "summary.json", compact(summary))
        also = f"; {refused}" if refused.number else ""
        say(f"test accuracy {summary['accuracy']:.4f}{also}; results in {run.directory}")
    say(f"process {jax.process_index()} of {jax.process_count()}: step {settings.steps}, sha256 {summary['sha256']}")
    return summary


def digest(state: training.TrainState) -> str:
    """SHA-256 of everything in the state, as the first device of this process holds it."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        found.update(np.asarray(leaf.addressable_shards[0].data).tobytes())
    return found.hexdigest()


def _say(line: str) -> None:
    if jax.process_index() == 0:
        say(line)
