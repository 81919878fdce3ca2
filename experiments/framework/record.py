"""A run's directory: config.json, append-only metrics.jsonl, summary.json, pictures, and where to continue.

Rows are appended as they are measured; `progress.json`, replaced atomically, says how many bytes of
metrics.jsonl are certain, which stages are done, and which checkpoint goes with them. After a crash whatever was
written later is cut off and computed again, so that no row appears twice.
"""

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from experiments.errors import UserError

SIGNIFICANT_DIGITS = 6  # of a float in metrics.jsonl: what float32 always carries


class Record:
    """An open run directory; made by `open_record`."""

    def __init__(self, directory: Path, progress: dict):
        self.directory = directory
        self.progress = progress
        self.saved_at = time.monotonic()  # when work was last made certain

    @property
    def metrics_path(self) -> Path:
        """Where the rows are."""
        return self.directory / "metrics.jsonl"

    def rows(self) -> list[dict]:
        """Every row appended so far; a number that was not finite comes back as nan."""
        lines = self.metrics_path.read_text().splitlines() if self.metrics_path.exists() else []
        return [revive(json.loads(line)) for line in lines]

    def append(self, rows: Iterable[dict]) -> None:
        """Write rows at the end of metrics.jsonl; certain only after the next `commit` or `finish`."""
        with self.metrics_path.open("a") as file:
            file.writelines(json.dumps(compact(row), allow_nan=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())

    def commit(self, **progress: object) -> None:
        """Make everything appended so far certain and note where to continue."""
        size = self.metrics_path.stat().st_size if self.metrics_path.exists() else 0
        self.progress = {**self.progress, **progress, "bytes": size}
        write_json(self.directory / "progress.json", self.progress)

    def is_done(self, stage: str) -> bool:
        """Whether `stage` was finished, by this process or an earlier one."""
        return stage in self.progress["done"]

    def finish(self, stage: str, rows: Iterable[dict] = ()) -> None:
        """Append the (last) rows of `stage` and mark it done, so that a rerun skips it."""
        self.append(rows)
        self.commit(done=[*self.progress["done"], stage], checkpoint=None)

    @property
    def finished(self) -> bool:
        """Whether the whole run is done."""
        return self.progress["finished"]

    def close(self) -> None:
        """Mark the run finished and drop its checkpoints."""
        self.commit(finished=True, checkpoint=None)
        shutil.rmtree(self.directory / "checkpoints", ignore_errors=True)


def open_record(directory: Path, config: dict) -> Record:
    """Create `directory` for the run that `config` describes, or continue the same run in it.

    UserError if the directory holds another configuration, something that is no run, or a damaged record.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        return _continue(directory, config)
    _make(directory)
    write_json(directory / "config.json", config)
    record = Record(directory, {"bytes": 0, "done": [], "checkpoint": None, "finished": False})
    record.commit()
    return record


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {directory} ({error.strerror}): choose another --out") from None


def _continue(directory: Path, config: dict) -> Record:
    if not (directory / "config.json").exists():
        raise UserError(f"{directory} exists and holds no run (no config.json in it): choose another --out")
    held = read_json(directory / "config.json")
    difference = _difference(held, config)
    if difference:
        raise UserError(f"{directory} holds another run ({difference}): choose another --out, or remove that directory")
    if not (directory / "progress.json").exists():  # killed between the first two writes: nothing is lost
        write_json(directory / "progress.json", {"bytes": 0, "done": [], "checkpoint": None, "finished": False})
    record = Record(directory, read_json(directory / "progress.json"))
    _cut_back(record)
    if held.get("provenance") != config.get("provenance") and not record.finished:
        continued = [*held.get("continued", []), config["provenance"]]
        write_json(directory / "config.json", {**held, "continued": continued})
    return record


def _difference(held: dict, asked: dict) -> str:
    """What differs between two configurations, their provenance apart, in words; empty if nothing does."""
    parts = [
        f"its {key} is {held.get(key)!r}, not {asked[key]!r}"
        for key in ("experiment", "preset")
        if held.get(key) != asked[key]
    ]
    before, now = held.get("settings", {}), json.loads(json.dumps(asked["settings"]))
    parts += [
        f"its {key} is {before.get(key)!r}, not {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    return "; ".join(parts[:3])


def _cut_back(record: Record) -> None:
    """Drop rows that a crash left after the last certain one."""
    certain = record.progress.get("bytes", 0)
    size = record.metrics_path.stat().st_size if record.metrics_path.exists() else 0
    if size < certain:
        raise UserError(
            f"{record.metrics_path} is damaged ({size} bytes, {certain} expected): remove {record.directory}"
            " to start over, or choose another --out"
        )
    if size > certain:
        os.truncate(record.metrics_path, certain)


def compact(value: object) -> object:
    """A JSON-able copy: floats to 6 significant digits, numbers that are not finite as null."""
    if isinstance(value, dict):
        return {key: compact(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [compact(entry) for entry in value]
    if hasattr(value, "tolist"):  # numpy and jax arrays and scalars
        return compact(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if math.isfinite(value) else None
    return value


def revive(value: object) -> object:
    """The inverse of `compact`: null is a number that was not finite."""
    if isinstance(value, dict):
        return {key: revive(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [revive(entry) for entry in value]
    return math.nan if value is None else value


def write_json(path: Path, value: object) -> None:
    """Replace `path` atomically: a reader sees the old file or the new one."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: Path) -> dict:
    """Read a JSON object; UserError if it is not one."""
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(path.read_text())
        if isinstance(value, dict):
            return value
    raise UserError(f"{path} is not readable JSON: remove {path.parent} to start over, or choose another --out")
