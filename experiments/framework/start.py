"""The metrics of a grid's networks before their first step; a run itself measures after steps only."""

from collections.abc import Sequence
from functools import partial

import jax
import xarray as xr

from experiments.framework.experiment import Trained
from experiments.training import loop

START = "start: "  # begins their names


def at_the_start(trained: Trained) -> dict:
    """The metrics of the task for the networks with which the runs began; a `conclude` of a Grid."""
    runs = loop.stacked(list(trained.runs), len(trained.runs))
    states = jax.vmap(partial(loop.init_run, trained.task, trained.arrays["test_images"]))(runs)
    found = jax.jit(jax.vmap(lambda run, state: trained.task.metrics(run, state, trained.arrays)))(runs, states)
    return {f"{START}{name}": ((), values) for name, values in found.items()}


def from_the_start(r: xr.Dataset, names: Sequence[str]) -> xr.Dataset:
    """Some metrics along all steps, step 0 before the others."""
    start = r[[f"{START}{name}" for name in names]].rename({f"{START}{name}": name for name in names})
    return xr.concat([start.expand_dims(step=[0]), r[list(names)]], "step")
