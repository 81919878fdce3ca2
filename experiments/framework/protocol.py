"""What a fair comparison needs to be told of a run: sizes, trials of the search, chosen values, validation accuracy."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from experiments.framework.experiment import Experiment, Grid, Settings
from experiments.framework.results import axes_of, final, program_name, programs_of
from experiments.framework.search import runs_of
from experiments.framework.tables import Table, mean_and_std
from experiments.training import data
from experiments.training.loop import numbers_of

MOST_ROWS = 60  # of the table of validation beside test


def protocol_of(
    experiment: Experiment, settings: Settings, rows: Sequence[Mapping], results: xr.Dataset
) -> dict[str, Any]:
    """What the report says of a grid's training, JSON-able; empty without a grid.

    Args:
      experiment: which was run.
      settings: with which.
      rows: of its record.
      results: as `experiments.framework.results.results_of` has them.

    Returns:
      "batch_size", "programs" and "runs" (values by axis), "search" (None, or what was tried), "chosen" and
      "parameters" (lists of {"where": {axis: value}, "value": number}), "validation" (None or a table).
    """
    grid = experiment.grid
    if grid is None:
        return {}
    validation = validation_beside_test(grid, results)
    return {
        "batch_size": grid.batch_size,
        "programs": {name: list(values) for name, values in grid.programs.items()},
        "runs": {name: list(values) for name, values in grid.runs.items()},
        "search": None if grid.search is None else searched(grid, rows),
        "chosen": [] if grid.search is None else chosen(grid, rows),
        "parameters": parameter_counts(grid, settings),
        "validation": validation._asdict() if validation else None,
    }


def searched(grid: Grid, rows: Sequence[Mapping]) -> dict[str, Any]:
    """What the search tried: "axis", "values", "seeds" of each, by which metric ("on")."""
    wanted = grid.search
    assert wanted is not None
    stages = [row for row in rows if str(row.get("stage", "")).startswith("search ") and "runs" in row]
    tried = sorted({run[wanted.axis] for row in stages for run in row["runs"]})
    return {"axis": wanted.axis, "values": tried, "seeds": wanted.seeds, "on": wanted.on}


def chosen(grid: Grid, rows: Sequence[Mapping]) -> list[dict[str, Any]]:
    """The value that the search chose for each program in each cell of its runs."""
    assert grid.search is not None
    found = []
    for program in programs_of(grid):
        own: list[dict] = next(
            (row["runs"] for row in rows if row.get("stage") == program_name(program) and "runs" in row), []
        )
        cells = {tuple(run[axis] for axis in grid.runs): run[grid.search.axis] for run in own}
        for place, value in cells.items():
            found.append({"where": {**program, **dict(zip(grid.runs, place, strict=True))}, "value": value})
    return found


def parameter_counts(grid: Grid, settings: Settings) -> list[dict[str, Any]]:
    """The number of trained parameters of each program, over the axes on which it depends; nothing is computed."""
    shape = data.load(settings.data).train_images.shape[1:]
    run = numbers_of(runs_of(grid.runs, 1)[0])
    run |= {grid.search.axis: grid.search.values[0]} if grid.search else {}
    counts = {}
    for program in programs_of(grid):
        task = grid.task(settings, **program)
        images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
        variables = jax.eval_shape(lambda run, x, task=task: task.init(run, jax.random.key(0), x), run, images)
        sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"])]
        counts[tuple(program.values())] = sum(sizes)
    axes = list(grid.programs)
    places = np.array([list(map(str, place)) for place in counts], dtype=object).reshape(len(counts), len(axes))
    needed = [number for number in range(len(axes)) if _matters(number, places, list(counts.values()))]
    short = {tuple(place[number] for number in needed): count for place, count in counts.items()}
    names = [axes[number] for number in needed]
    return [{"where": dict(zip(names, place, strict=True)), "value": count} for place, count in short.items()]


def _matters(number: int, places: np.ndarray, counts: Sequence[int]) -> bool:
    """Whether the count differs between two programs that differ in this axis alone."""
    others = np.delete(places, number, axis=1)
    by_rest: dict[tuple, set[int]] = {}
    for rest, count in zip(map(tuple, others), counts, strict=True):
        by_rest.setdefault(rest, set()).add(count)
    return any(len(different) > 1 for different in by_rest.values())


def validation_beside_test(grid: Grid, results: xr.Dataset) -> Table | None:
    """Final validation and test accuracy of every cell.

    None where they were not measured, are too many to read, or the validation part was trained on.
    """
    if not {"validation_accuracy", "test_accuracy"} <= set(results.data_vars):
        return None
    if grid.search is not None and grid.search.then_on_all:
        return None
    both = [final(results[name]) for name in ("validation_accuracy", "test_accuracy")]
    axes = [name for name in axes_of(grid) if name in both[0].dims]
    if math.prod(both[0].sizes[name] for name in axes) > MOST_ROWS:
        return None
    rows = []
    for place in np.ndindex(*(both[0].sizes[name] for name in axes)):
        at = {name: both[0][name].values[index] for name, index in zip(axes, place, strict=True)}
        values = [mean_and_std(one.sel(at).values.ravel()) for one in both]
        rows.append([*(v if isinstance(v, str) else f"{v:g}" for v in at.values()), *values])
    return Table("Final validation beside test accuracy", [*axes, "validation", "test"], rows, names=len(axes))
