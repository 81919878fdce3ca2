"""What a training step of each arm costs, measured in turns in one process."""

import time
from collections.abc import Mapping, Sequence
from functools import partial

import jax
import numpy as np
import xarray as xr

from experiments.framework.experiment import Grid, Settings, Stage
from experiments.framework.search import runs_of
from experiments.training import data, loop

ROUNDS = 8


def step_costs(grid: Grid, settings: Settings, arms: Sequence[str], axis: str = "arm", **program: str) -> Stage:
    """A stage that measures `seconds` [axis, round] of one network and step, for each arm of one program.

    Args:
      grid: whose networks are trained.
      settings: of the experiment.
      arms: values of the programs' axis `axis`.
      axis: its name.
      **program: values of the programs' other axes.
    """
    return Stage("cost", partial(_measured, grid, settings, arms, axis, program))


def _measured(grid: Grid, settings: Settings, arms: Sequence[str], axis: str, program: Mapping) -> xr.Dataset:
    """A round is one interval of steps of every network of the grid; the first, which may compile, is left out."""
    schedule, runs = (
        loop.Schedule(settings.steps, settings.interval, grid.batch_size),
        runs_of(grid.runs, settings.seeds),
    )
    stacked, arrays = loop.stacked(runs, len(runs)), loop.on_device(data.load(settings.data))
    tasks = [grid.task(settings, **{axis: arm}, **program) for arm in arms]
    programs = [loop.compile_grid(task, schedule, loop.runs_per_seed(runs)) for task in tasks]
    states = [one.start(stacked, arrays) for one in programs]
    seconds = np.empty((ROUNDS + 1, len(arms)))
    for turn, arm in np.ndindex(seconds.shape):
        began = time.perf_counter()
        states[arm], _ = jax.block_until_ready(programs[arm].advance(states[arm], stacked, arrays, 0))
        seconds[turn, arm] = (time.perf_counter() - began) / settings.interval / len(runs)
    return xr.Dataset({"seconds": (("round", axis), seconds[1:])}, {axis: list(arms)})
