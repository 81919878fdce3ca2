"""What was counted of programs for accelerators: printed line by line, kept as JSON, shown as tables."""

from pathlib import Path
from typing import Any, NamedTuple

from experiments.aot.cost import Cost
from experiments.bench.record import as_json, from_json
from experiments.errors import UserError
from experiments.framework.record import read_json, write_json
from experiments.framework.tables import Table, to_markdown

GIB, KIB = 2**30, 2**10


class Counted(NamedTuple):
    """One program.

    Attributes:
      norm: what normalizes.
      cost: of one device.
    """

    norm: str
    cost: Cost


class Entry(NamedTuple):
    """One kind of program, compiled for one topology with several norms.

    Attributes:
      topology: such as "v5e:16x16".
      program: its name on the command line.
      title: what it is, in words.
      devices: how many.
      unit: bytes of one activation T; None where bytes are shown in GiB.
      provenance: commit and versions.
      counted: one for each norm.
    """

    topology: str
    program: str
    title: str
    devices: int
    unit: int | None
    provenance: dict[str, Any]
    counted: list[Counted]


def open_record(path: Path) -> list[Entry]:
    """What the record holds already; its directory is made. UserError if it is no record."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--json {path} cannot be written ({error.strerror}): choose another file") from None
    return read(path) if path.exists() else []


def read(path: Path) -> list[Entry]:
    """The entries of a record; UserError if it is none."""
    held = read_json(path)
    try:
        return [from_json(Entry, entry) for entry in held["entries"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no record of programs ({error!r}): choose another file with --json") from None


def write(path: Path, entries: list[Entry]) -> None:
    """Write a record."""
    write_json(path, {"entries": as_json(entries)})


def added(entries: list[Entry], entry: Entry) -> list[Entry]:
    """The entries with one more, in place of what was counted of the same program and topology."""
    others = [one for one in entries if (one.topology, one.program) != (entry.topology, entry.program)]
    return [*others, entry]


def columns(entry: Entry) -> list[str]:
    """What the figures of a line are."""
    label = "T" if entry.unit else "GiB"
    return [
        "collectives",
        "rare",
        "branches",
        "KiB sent",
        f"moved {label}",
        f"rare {label}",
        f"on chip {label}",
        f"kept {label}",
    ]


def figures(entry: Entry, counted: Counted) -> list[str]:
    """One line, as text."""
    cost, size = counted.cost, entry.unit or GIB
    volumes = (cost.moved, cost.moved_rarely, cost.on_chip, cost.temporary)
    return [
        str(cost.collectives),
        str(cost.rare),
        str(cost.branches),
        f"{cost.payload / KIB:.1f}",
        *(f"{volume / size:.3f}" for volume in volumes),
    ]


def heading(entry: Entry) -> str:
    """What is printed above the lines."""
    title = f"{entry.title}, on each of {entry.devices} devices ({entry.topology})"
    return f"{title}\n{'norm':44}" + "".join(f"{column:>12}" for column in columns(entry))


def line(entry: Entry, counted: Counted) -> str:
    """What is printed of one program."""
    return f"{counted.norm:44}" + "".join(f"{figure:>12}" for figure in figures(entry, counted))


def in_markdown(entry: Entry) -> list[str]:
    """A table, and where it comes from."""
    title = f"{entry.title}, each of {entry.devices} devices ({entry.topology})"
    body = [[one.norm, *figures(entry, one)] for one in entry.counted]
    command = f"`python -m experiments bench --aot {entry.topology} --program {entry.program}`"
    origin = f"jax {entry.provenance['versions']['jax']}; commit {entry.provenance['commit'][:12]}; {command}."
    return [to_markdown(Table(title, ["norm", *columns(entry)], body)), origin]
