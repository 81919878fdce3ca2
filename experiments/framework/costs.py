"""What a training step of each arm costs, measured in turns in one process."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import numpy as np
import xarray as xr

from experiments.framework.experiment import Grid, Settings, Stage
from experiments.framework.search import runs_of
from experiments.framework.timing import interleaved
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
    """A call is one interval of steps of every network of the grid."""
    schedule = loop.Schedule(settings.steps, settings.interval, grid.batch_size)
    searched = {grid.search.axis: grid.search.values[:1]} if grid.search else {}  # no value costs more than another
    runs = runs_of({**grid.runs, **searched}, settings.seeds, settings.first_seed)
    stacked, arrays = loop.stacked(runs, len(runs)), loop.on_device(data.load(settings.data))

    def interval_of(arm: str) -> Callable[[], object]:
        programs = loop.compile_grid(grid.task(settings, **{axis: arm}, **program), schedule, loop.runs_per_seed(runs))
        held = {"states": programs.start(stacked, arrays)}

        def interval() -> None:
            held["states"], _ = jax.block_until_ready(programs.advance(held["states"], stacked, arrays, 0))

        return interval

    found = interleaved({arm: interval_of(arm) for arm in arms}, ROUNDS, round_seconds=0)
    seconds = np.stack([found[arm] for arm in arms], axis=1) / settings.interval / len(runs)
    return xr.Dataset({"seconds": (("round", axis), seconds)}, {axis: list(arms)})
