"""Tables as plain data, shown on a terminal or written as Markdown."""

from typing import NamedTuple

import numpy as np
import rich.box
import rich.table


class Table(NamedTuple):
    """A small table of strings; the first column names the row."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""  # what a reader has to know: units, number of seeds, what is not comparable


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


def spread(values: np.ndarray) -> str:
    """Mean and standard deviation over seeds, in words; no deviation for one seed."""
    return f"{values.mean():.3f}" + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else "")
