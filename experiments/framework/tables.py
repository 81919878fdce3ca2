"""Tables as plain data, made from arrays with named axes, shown on a terminal or written as Markdown."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.box
import rich.table
import xarray as xr


class Table(NamedTuple):
    """A small table of strings; the first columns name the row."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""  # what a reader has to know: units, number of seeds, what is not comparable
    names: int = 1  # how many of the first columns name the row


def table_of(
    title: str,
    values: Callable[[xr.Dataset], xr.DataArray],
    *,
    rows: Sequence[str],
    columns: str,
    published: xr.DataArray | None = None,
    form: str | Mapping[str, str] = ".3f",
    note: str = "",
    over: str = "seed",
) -> Callable[[Any, xr.Dataset], Table]:
    """Mean and standard deviation over seeds, a row for each combination of `rows`, a column for each of `columns`.

    Args:
      title: what the figures are, with their unit.
      values: values(results) -> array with the axes `rows`, `columns` and `over`; nan counts as not measured.
      rows: names of axes.
      columns: name of one axis.
      published: the source's figures over the same axes without `over`; each column gets one of theirs beside ours.
      form: how figures are written, as in an f-string: ".3f", ".1%", ".2g"; or {value of `columns`: form}.
      note: under the table, after the number of seeds, the data and the steps.
      over: the axis over which mean and deviation are taken.

    Returns:
      table(settings, results) -> Table, as an Experiment wants it.
    """

    def table(settings: Any, results: xr.Dataset) -> Table:
        array = values(results)
        heads = [_label(value) for value in array[columns].values]
        forms = [form if isinstance(form, str) else form[value] for value in array[columns].values]
        known = [] if published is None else [name for name in (*rows, columns) if name in published.dims]
        theirs = None if published is None else published.reindex({name: array[name].values for name in known})
        lines = []
        for place in np.ndindex(*(array.sizes[name] for name in rows)):
            at = {name: array[name].values[index] for name, index in zip(rows, place, strict=True)}
            ours = array.sel(at).transpose(columns, over).values
            cells = [mean_and_std(some, form) for some, form in zip(ours, forms, strict=True)]
            if theirs is not None:
                figures = theirs.sel({name: value for name, value in at.items() if name in theirs.dims}).values
                cells += ["" if np.isnan(v) else f"{v:{form}}" for v, form in zip(figures, forms, strict=True)]
            lines.append([*map(_label, at.values()), *cells])
        names = [*heads, *(f"published {head}" for head in heads)] if published is not None else heads
        count = array.sizes[over]
        known_of = basis(settings, count) if over == "seed" else _repetitions(count, over)
        return Table(title, [*rows, *names], lines, f"{known_of} {note}".strip(), len(rows))

    return table


def basis(settings: Any, shown: int) -> str:
    """What mean and deviation are of: number of seeds, data, steps. One value of several seeds is the same for all."""
    seeds = f"{settings.seeds} seed{'s' * (settings.seeds != 1)}"
    same = shown == 1 < settings.seeds
    parts = [f"The same for all {seeds}" if same else f"Mean ± standard deviation of {seeds}", settings.data]
    parts += [f"{settings.steps:,} steps"] if settings.steps else []
    return ", ".join(part for part in parts if part) + "."


def _repetitions(count: int, of: str) -> str:
    """Likewise where they are of something else than seeds; of a single value there is nothing to say."""
    return f"Mean ± standard deviation of {count} {of}s." if count > 1 else ""


def mean_and_std(values: np.ndarray, form: str = ".3f") -> str:
    """Mean and standard deviation over seeds, in words; no deviation for one seed. nan is left out, and counted."""
    known = values[~np.isnan(values)]
    if not len(known):
        return "–"
    size = np.abs(known).max() or 1.0  # the square of a number beyond 1e154 would overflow
    words = f"{known.mean():{form}}" + (f" ± {size * (known / size).std(ddof=1):{form}}" if len(known) > 1 else "")
    return words if len(known) == len(values) else f"{words} ({len(known)} of {len(values)})"


def _label(value) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def to_rich(table: Table) -> rich.table.Table:
    """For a terminal."""
    looks = dict(title_justify="left", caption_justify="left", box=rich.box.SIMPLE)
    shown = rich.table.Table(title=table.title, caption=table.note or None, **looks)
    for number, column in enumerate(table.columns):
        shown.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*row)
    return shown


def to_markdown(table: Table) -> str:
    """For a report."""
    head = ["| " + " | ".join(table.columns) + " |", "| --- |" + " ---: |" * (len(table.columns) - 1)]
    body = ["| " + " | ".join(row) + " |" for row in table.rows]
    return "\n".join([f"**{table.title}**", "", *head, *body, *(["", table.note] if table.note else [])])
