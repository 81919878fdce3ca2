"""Results as arrays with named axes: what the rows of a record say, put together, and ways to read it."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product

import numpy as np
import xarray as xr

from experiments.framework.experiment import Experiment, Grid

SEARCHED = "search: "  # begins the stages of a search


def results_of(experiment: Experiment, rows: Sequence[Mapping]) -> xr.Dataset:
    """Everything that was measured, as one Dataset.

    Metrics of the grid have the axes of its programs and runs, "seed" and "step"; what stages measured has the axes
    that it was given.
    """
    parts = [xr.Dataset.from_dict(row["dataset"]) for row in rows if "dataset" in row]
    if experiment.grid is not None:
        parts = [*grid_results(experiment.grid, rows), *parts]
    order = axes_of(experiment.grid) if experiment.grid is not None else {}
    merged = xr.merge([_grown(part) for part in parts], join="outer", compat="no_conflicts")
    return merged.reindex({name: list(values) for name, values in order.items() if name in merged.indexes})


def axes_of(grid: Grid) -> dict[str, tuple]:
    """The axes of a grid in the order in which they were written."""
    return {**grid.programs, **grid.runs}


def programs_of(grid: Grid) -> list[dict]:
    """Every combination of the programs' axes."""
    return [dict(zip(grid.programs, values, strict=True)) for values in product(*grid.programs.values())]


def program_name(program: Mapping) -> str:
    """The stage in which a program trains."""
    return ", ".join(map(str, program.values())) or "training"


def grid_results(grid: Grid, rows: Sequence[Mapping]) -> Iterable[xr.Dataset]:
    """One Dataset a program: its metrics [runs' axes, seed, step], and what was concluded from its networks."""
    for program in programs_of(grid):
        own = [row for row in rows if row.get("stage") == program_name(program)]
        if own:
            found = stage_results(own, tuple(grid.runs))
            yield found.assign_coords(program).expand_dims(list(program))


def stage_results(rows: Sequence[Mapping], axes: tuple[str, ...]) -> xr.Dataset:
    """The rows of one stage of training as arrays over the axes of its runs, "seed" and "step".

    What a run holds beyond these axes, such as a rate that was chosen for it, becomes a variable.
    """
    runs = next(row["runs"] for row in rows if "runs" in row)
    measured = [row for row in rows if "step" in row]
    steps = sorted({row["step"] for row in measured})
    names = [name for name in measured[0] if name not in ("stage", "first", "step")]
    variables = {name: (("run", "step"), np.full((len(runs), len(steps)), np.nan)) for name in names}
    for row in measured:
        for name in names:
            values = row[name]
            variables[name][1][row["first"] : row["first"] + len(values), steps.index(row["step"])] = values
    for row in (row for row in rows if "concluded" in row):
        for name, (further, values) in row["concluded"].items():
            values = np.asarray(values, np.float64)
            whole = variables.setdefault(name, (("run", *further), np.full((len(runs), *values.shape[1:]), np.nan)))[1]
            whole[row["first"] : row["first"] + len(values)] = values
    index = [*axes, "seed"]
    variables |= {name: ("run", [run[name] for run in runs]) for name in runs[0] if name not in index}
    coordinates = {name: ("run", [run[name] for run in runs]) for name in index} | {"step": steps}
    return (
        xr.Dataset(variables, coordinates).set_index(run=index).unstack("run")
        if len(index) > 1
        else (xr.Dataset(variables, coordinates).swap_dims(run="seed"))
    )


def _grown(part: xr.Dataset) -> xr.Dataset:
    """Coordinates of one value as axes, so that parts which differ in them fit together."""
    scalars = [name for name, value in part.coords.items() if value.ndim == 0]
    return part.expand_dims(scalars)


def final(array: xr.DataArray) -> xr.DataArray:
    """The values after the last step."""
    return array.isel(step=-1, drop=True)


def difference(array: xr.DataArray, arm: str, minus: str, axis: str = "arm") -> xr.DataArray:
    """One arm minus another; seeds and all other axes stay."""
    return array.sel({axis: arm}, drop=True) - array.sel({axis: minus}, drop=True)


def first_step_with(array: xr.DataArray, at_least: float) -> xr.DataArray:
    """The first measured step with a value of `at_least`; nan where there is none."""
    reached = array >= at_least
    return array.step.where(reached).min("step")


def side_by_side(figures: Mapping[str, xr.DataArray]) -> xr.DataArray:
    """Several arrays over the same axes as one with the axis "figure", whose values are their names: for a table."""
    named = [array.rename("figures").reset_coords(drop=True) for array in figures.values()]
    return xr.concat(named, "figure").assign_coords(figure=list(figures))


def label_cells(array: xr.DataArray, axes: Sequence[str], name: str = "cell") -> xr.DataArray:
    """Several axes as one whose values say what they were: "sigmoid, std 0.05"."""
    stacked = array.stack({name: list(axes)})
    words = [
        ", ".join(v if isinstance(v, str) else f"{axis} {v:g}" for axis, v in zip(axes, values, strict=True))
        for values in stacked[name].values
    ]
    return stacked.drop_vars([name, *axes]).assign_coords({name: words}).transpose(name, ...)
