"""Training a grid stage by stage into a record: its rows, its checkpoints, and where an earlier process stopped."""

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from experiments.framework import stopping
from experiments.framework.display import Track
from experiments.framework.record import Record
from experiments.training import data
from experiments.training.loop import (
    Schedule,
    Task,
    check_data,
    compile_grid,
    on_device,
    parts_of,
    runs_per_seed,
    stacked,
)

SECONDS_BETWEEN = 10.0  # what a crash costs at most; writing a checkpoint takes well under a second


def train_grid(
    record: Record,
    stage: str,
    task: Task,
    schedule: Schedule,
    runs: list[dict],
    dataset: data.Dataset,
    track: Track,
    conclude: Callable[[list[dict], dict, dict], list[dict]] = lambda runs, variables, arrays: [],
) -> None:
    """Train every run of a grid and append its rows to the record, or continue where an earlier process stopped.

    Rows are {"stage", "runs": the list} once, then {"stage", "first", "step", "loss": [...], ...} per interval, with a
    list for each metric of `loop.evaluate`, where `first` is the number in the grid of the first run of the lists.
    `conclude(runs, variables, arrays)` sees the trained networks of each part (leaves [runs, ...]) and returns further
    rows.
    """
    if record.is_done(stage):
        return
    check_data(task, schedule, runs[0], dataset)
    arrays, parts = on_device(dataset), parts_of(runs, schedule.runs_at_once)
    programs = compile_grid(task, schedule, runs_per_seed(runs))
    first_part, done = _position(record, stage)
    if (first_part, done) == (0, 0):
        record.append([{"stage": stage, "runs": runs}])
    with stopping.Terminator() as terminator:
        for number in range(first_part, len(parts)):
            members = parts[number]
            part = _Part(number, len(parts), members, stacked(members, len(parts[0])))
            states = _train_part(record, stage, programs, schedule, part, arrays, track, done, terminator)
            trained = jax.tree.map(partial(_first, len(members)), states["variables"])
            record.append(conclude(members, trained, arrays))
            if number + 1 < len(parts):
                record.commit(position={"stage": stage, "part": number + 1, "interval": 0})
                _stop_if_asked(terminator, f"{stage} is saved after part {number + 1} of {len(parts)}")
            done = 0
        record.finish(stage)
        _stop_if_asked(terminator, f"{stage} is done")


def _position(record: Record, stage: str) -> tuple[int, int]:
    """Where to continue `stage`: the part, and how many of its intervals are done."""
    position = record.place.position
    return (position["part"], position["interval"]) if position and position["stage"] == stage else (0, 0)


def _stop_if_asked(terminator: stopping.Terminator, words: str) -> None:
    if terminator.received:
        raise stopping.Stopped(terminator.received, words)


def _first(count: int, leaf: Array) -> Array:
    return leaf[:count]


class _Part(NamedTuple):
    number: int
    of: int
    runs: list[dict]
    stacked: dict[str, Array]


def _train_part(record, stage, programs, schedule, part, arrays, track, done, terminator) -> dict:
    """Train one part from its start, or from the record's checkpoint if `done` intervals are done; final states.

    Raises Stopped, after saving, once the terminator has noted a request.
    """
    intervals, size = schedule.steps // schedule.interval, len(part.stacked["seed"])
    if done:
        states = record.restore(jax.eval_shape(programs.start, part.stacked, arrays))
    else:
        states = programs.start(part.stacked, arrays)
    for number in range(done, intervals):
        track(stage, part.number * schedule.steps + number * schedule.interval, part.of * schedule.steps)
        states, loss = programs.advance(states, part.stacked, arrays, number * schedule.interval)
        metrics = {"loss": loss, **programs.evaluate(states, part.stacked, arrays)}
        row = {"stage": stage, "first": part.number * size, "step": (number + 1) * schedule.interval}
        record.append([row | {name: np.asarray(values)[: len(part.runs)] for name, values in metrics.items()}])
        if number + 1 == intervals:
            break  # the part is committed as a whole
        if terminator.received or time.monotonic() - record.saved_at >= SECONDS_BETWEEN:
            record.commit(states, position={"stage": stage, "part": part.number, "interval": number + 1})
        _stop_if_asked(terminator, f"{stage} is saved at step {row['step']}")
    track(stage, (part.number + 1) * schedule.steps, part.of * schedule.steps)
    return states


class Curves(NamedTuple):
    """What `train_grid` recorded of a stage."""

    runs: list[dict]
    steps: np.ndarray  # [points] int
    metrics: dict[str, np.ndarray]  # by name, each [runs, points]; nan where it was not finite

    @property
    def loss(self) -> np.ndarray:
        """The mean training loss of each interval, [runs, points]."""
        return self.metrics["loss"]

    @property
    def accuracy(self) -> np.ndarray:
        """The test accuracy after each interval, [runs, points], from 0 to 1."""
        return self.metrics["test_accuracy"]


def curves(rows: list[dict], stage: str) -> Curves:
    """Put the rows of one stage together again, with every metric that they hold."""
    own = [row for row in rows if row.get("stage") == stage]
    runs = next(row["runs"] for row in own if "runs" in row)
    measured = [row for row in own if "step" in row]
    steps = sorted({row["step"] for row in measured})
    names = dict.fromkeys(name for row in measured for name in row if name not in ("stage", "first", "step"))
    joined = {name: np.full((len(runs), len(steps)), np.nan) for name in names}
    for row in measured:
        first, column = row["first"], steps.index(row["step"])
        for name in joined.keys() & row.keys():
            joined[name][first : first + len(row[name]), column] = row[name]
    return Curves(runs, np.asarray(steps), joined)
