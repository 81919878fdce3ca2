"""The record of the benchmarks: rows as JSON and back, so that tables and pages are made again without measuring."""

import math
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NamedTuple, get_args, get_origin

from experiments.errors import UserError
from experiments.framework import registry
from experiments.framework.provenance import NOT_INSTALLED, installed_version, provenance
from experiments.framework.record import read_json, write_json
from experiments.framework.tables import to_markdown

PEER_PACKAGES = ("dm-haiku", "equinox", "torch")


class Measured(NamedTuple):
    """What one benchmark found.

    Attributes:
      provenance: commit, versions and hardware.
      rows: of the benchmark's own type `Row`.
    """

    provenance: dict[str, Any]
    rows: list


def read(path: Path) -> dict[str, Measured]:
    """What was measured, by benchmark; UserError if the file is no record."""
    held = read_json(path)
    try:
        return {
            name: Measured(
                value["provenance"], [from_json(registry.load_benchmark(name).Row, row) for row in value["rows"]]
            )
            for name, value in held.items()
        }
    except (AttributeError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no record of benchmarks ({error!r}): choose another file with --json") from None


def write(path: Path, record: dict[str, Measured]) -> None:
    """Write a record, and its tables in Markdown beside it."""
    write_json(path, as_json(record))
    path.with_suffix(".md").write_text(in_markdown(record))


def in_markdown(record: dict[str, Measured]) -> str:
    """Every table of every benchmark, each with where it comes from."""
    parts = []
    for name, measured in record.items():
        tables = registry.load_benchmark(name).tabulate(measured.rows)
        parts += [f"## {name}", *map(to_markdown, tables), origin(measured.provenance, name)]
    return "\n\n".join(parts) + "\n"


def provenance_with_peers() -> dict[str, Any]:
    """Commit, versions and hardware, the versions of the peers among them."""
    found = provenance()
    peers = {package: installed_version(package) for package in PEER_PACKAGES}
    return {**found, "versions": {**found["versions"], **peers}}


def origin(provenance: Mapping[str, Any], name: str) -> str:
    """Where figures come from: hardware, versions, commit and command."""
    versions = provenance["versions"]
    shown = [
        f"{package} {versions[package]}" for package in ("jax", "flax", *PEER_PACKAGES) if is_here(package, versions)
    ]
    commit = provenance["commit"][:12]
    return f"{provenance['hardware']}; {', '.join(shown)}; commit {commit}; `python -m experiments bench {name}`."


def is_here(package: str, versions: Mapping[str, str]) -> bool:
    """Whether a package was installed where the versions were taken."""
    return versions.get(package, NOT_INSTALLED) != NOT_INSTALLED


def as_json(value: Any) -> Any:
    """NamedTuples as objects, other tuples as lists, a float that is not finite by its name, for JSON has none."""
    if hasattr(value, "_asdict"):
        return as_json(value._asdict())
    if isinstance(value, Mapping):
        return {key: as_json(v) for key, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [as_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def from_json(kind: Any, value: Any) -> Any:
    """The value of type `kind` of which `as_json` made `value`; kinds are those that rows are made of."""
    if hasattr(kind, "_fields"):
        hints = typing.get_type_hints(kind)
        return kind(**{name: from_json(hints[name], v) for name, v in value.items()})
    origin, of = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return None if value is None else from_json(next(one for one in of if one is not NoneType), value)
    if origin is tuple:
        kinds = [of[0]] * len(value) if of[-1] is Ellipsis else of
        return tuple(from_json(one, v) for one, v in zip(kinds, value, strict=True))
    if origin is list:
        return [from_json(of[0], v) for v in value]
    if origin is dict:
        return {key: from_json(of[1], v) for key, v in value.items()}
    return float(value) if kind is float else value
