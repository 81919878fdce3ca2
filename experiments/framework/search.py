"""Choosing a rate (or another number of a run) on validation, by the same search for every arm."""

from collections.abc import Callable, Mapping, Sequence
from itertools import product

import numpy as np
import xarray as xr

from experiments.framework.experiment import Grid, Search
from experiments.framework.results import program_name, programs_of, stage_results

FIRST_SEED = 10_000  # seeds of a search; those of the result count from 0

Train = Callable[[str, dict, list[dict]], Sequence[Mapping]]  # train(stage, program, runs) -> rows of the stage


def choose(grid: Grid, steps: int, train: Train) -> xr.DataArray:
    """What `search` finds; the first value for all where a training of so few `steps` is not to be searched."""
    wanted = grid.search
    if steps >= wanted.least_steps:
        return search(grid, train)
    axes = {**grid.programs, **grid.runs}
    first = np.full([len(values) for values in axes.values()], wanted.values[0])
    return xr.DataArray(first, {name: list(values) for name, values in axes.items()}, name=wanted.axis)


def search(grid: Grid, train: Train) -> xr.DataArray:
    """The value that each program takes in each cell of the runs' axes: [programs' axes, runs' axes].

    A value that was added is tried by all programs in all cells, so that every arm has the same number of trials.
    """
    wanted = grid.search
    tried = wanted.values
    scores = _scores(grid, wanted, tried, 0, train)
    for number in range(1, wanted.extensions + 1):
        best = scores.argmax(wanted.axis)
        more = beyond(tried, bool((best == 0).any()), bool((best == len(tried) - 1).any()))
        if not more:
            break
        scores = xr.concat([scores, _scores(grid, wanted, more, number, train)], wanted.axis).sortby(wanted.axis)
        tried = tuple(scores[wanted.axis].values.tolist())
    return scores.idxmax(wanted.axis).rename(wanted.axis)


def beyond(tried: Sequence[float], below: bool, above: bool) -> tuple[float, ...]:
    """Values at the distance (as a factor) of the last two, at the ends that are asked for."""
    lower = (_rounded(tried[0] * tried[0] / tried[1]),) if below else ()
    return (*lower, *((_rounded(tried[-1] * tried[-1] / tried[-2]),) if above else ()))


def _rounded(value):
    return float(f"{value:.3g}")


def _scores(grid: Grid, wanted: Search, values, number, train) -> xr.DataArray:
    """Mean over seeds of the metric at the end, [programs' axes, runs' axes, tried values]; -inf where one diverged."""
    shared = {axis: _first(grid.runs[axis]) for axis in wanted.shared if axis in grid.runs}
    found = []
    for program in programs_of(grid):
        own = {axis: value for axis, value in program.items() if axis not in wanted.shared}
        if any(program[axis] != grid.programs[axis][0] for axis in program.keys() - own.keys()):
            continue
        for some in [values] if wanted.together else [(value,) for value in values]:
            axes = {**grid.runs, **shared, wanted.axis: some}
            alone = "" if wanted.together else f", {wanted.axis} {some[0]:g}"
            stage = f"search {number}: {program_name(program)}{alone}"
            metrics = stage_results(train(stage, program, runs_of(axes, wanted.seeds, FIRST_SEED)), tuple(axes))
            finite = np.isfinite(metrics["loss"].isel(step=-1))
            score = metrics[wanted.on].isel(step=-1).where(finite, -np.inf).mean("seed")
            score = score.isel(dict.fromkeys(shared, 0), drop=True)
            found.append(score.assign_coords(own).expand_dims(list(own)))
    return xr.combine_by_coords([score.to_dataset(name="score") for score in found])["score"]


def _first(values):
    return dict(list(values.items())[:1]) if isinstance(values, Mapping) else values[:1]


def runs_of(axes: Mapping[str, Sequence | Mapping], seeds: int, first_seed: int = 0) -> list[dict]:
    """Every combination of the axes for every seed, seed after seed; a name of an axis brings its numbers along."""
    cells = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    named = {axis: values for axis, values in axes.items() if isinstance(values, Mapping)}
    cells = [cell | {k: v for axis in named for k, v in named[axis][cell[axis]].items()} for cell in cells]
    return [{"seed": seed, **cell} for seed in range(first_seed, first_seed + seeds) for cell in cells]


def with_chosen(
    runs: list[dict], chosen: xr.DataArray, program: Mapping, given: Callable[[dict], float | None] | None = None
) -> list[dict]:
    """The runs of one program, each with the value that was chosen for its cell, or is given for it."""

    def value(cell: dict) -> float:
        fixed = None if given is None else given(cell)
        return float(chosen.sel({axis: cell[axis] for axis in chosen.dims})) if fixed is None else fixed

    return [{**run, str(chosen.name): value({**program, **run})} for run in runs]
