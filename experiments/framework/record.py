"""A run's directory: config.json, append-only metrics.jsonl, summary.json, pictures, and where to continue.

Rows are appended as they are measured. A *commit* makes them certain: it writes a checkpoint, which has a copy of the
rows and perhaps the arrays of a training state, and then replaces `progress.json`, which says how many bytes of
metrics.jsonl are certain (with their SHA-256), which stages are done, and where the run was. After a crash, rows that
were written later are cut off and computed again, so that no row appears twice. What is on disk is first held against
all this: a difference is said, and mended from a checkpoint where that loses no finished stage; else it is refused.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from experiments.errors import UserError
from experiments.framework import checkpoint, lock
from experiments.framework.files import (
    TEMPORARY,
    compact,
    inside,
    read_json,
    reason,
    revive,
    write_json,
    writing,
)
from experiments.framework.resume import Place, choose, not_readable

__all__ = ["Record", "compact", "open_record", "read_json", "revive", "write_json"]

CONFIG, PROGRESS, ROWS, CHECKPOINTS = "config.json", "progress.json", "metrics.jsonl", "checkpoints"


def say_to_user(line: str) -> None:
    """Print a line on standard error."""
    print(line, file=sys.stderr, flush=True)


class Record:
    """An open run directory; made by `open_record`.

    Attributes:
      directory: the run's.
      config: what config.json held when it was opened.
      place: where the run is, as of the last commit.
      saved_at: when that was, by time.monotonic().
    """

    def __init__(self, directory: Path, config: dict, place: Place):
        self.directory = directory
        self.config = config
        self.place = place
        self.saved_at = time.monotonic()
        self._digest = hashlib.sha256(self.metrics_path.read_bytes() if self.metrics_path.exists() else b"")

    @property
    def metrics_path(self) -> Path:
        """Where the rows are."""
        return self.directory / ROWS

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.directory / CHECKPOINTS

    def rows(self) -> list[dict]:
        """Every row appended so far; a number that was not finite comes back as nan."""
        lines = self.metrics_path.read_text().splitlines() if self.metrics_path.exists() else []
        try:
            return [revive(json.loads(line)) for line in lines]
        except ValueError:
            raise UserError(
                f"{self.metrics_path} has a row that is not readable JSON: put a copy of it in its place, or choose"
                " another --out"
            ) from None

    def append(self, rows: Iterable[dict]) -> None:
        """Write rows at the end of metrics.jsonl; certain only after the next `commit` or `finish`."""
        text = "".join(json.dumps(compact(row), allow_nan=False) + "\n" for row in rows).encode()
        with writing(self.metrics_path), self.metrics_path.open("ab") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self._digest.update(text)

    def commit(self, state: Any = None, number: int | None = None, **changes: Any) -> None:
        """Make everything appended so far certain, and note where to continue.

        Args:
          state: a tree of arrays to continue with; None where none are needed. Where several processes train, the
            others call `checkpoint.save_state` with the same number.
          number: of the checkpoint; larger than those before unless steps are done again. None counts on.
          **changes: fields of the Place that change.
        """
        number = self.place.number + 1 if number is None else number
        if state is not None:
            checkpoint.save_state(self.checkpoints, number, state)
        size = self.metrics_path.stat().st_size if self.metrics_path.exists() else 0
        place = self.place._replace(
            number=number, arrays=state is not None, bytes=size, sha256=self._digest.hexdigest(), **changes
        )
        place = place if place.arrays else place.settle()
        checkpoint.seal(self.checkpoints, number, place.to_json(), self.metrics_path, state)
        write_json(self.directory / PROGRESS, place.to_json())
        self.place = place
        self.saved_at = time.monotonic()

    def restore(self, like: Any) -> Any:
        """The state of the last commit, as a tree like `like` (of arrays or shapes); UserError if it does not fit."""
        return checkpoint.restore(self.checkpoints, self.place.number, like)

    def is_done(self, stage: str) -> bool:
        """Whether `stage` was finished, by this process or an earlier one."""
        return stage in self.place.done

    def finish(self, stage: str, rows: Iterable[dict] = ()) -> None:
        """Append the (last) rows of `stage` and mark it done, so that a rerun skips it."""
        self.append(rows)
        self.commit(done=(*self.place.done, stage), position=None)

    @property
    def finished(self) -> bool:
        """Whether the whole run is done."""
        return self.place.finished

    def close(self) -> None:
        """Mark the run finished and remove its checkpoints."""
        self.commit(finished=True, position=None)
        checkpoint.clear(self.checkpoints)


def open_record(directory: Path, config: dict, say: Callable[[str], None] = say_to_user) -> Record:
    """Create `directory` for the run that `config` describes, or continue the same run in it.

    The directory is locked until this process ends or lets go of it (`lock.release`).

    Args:
      directory: the run's.
      config: "experiment", "preset" and "settings" must be those with which the run began, "data" (name and SHA-256)
        too; "claims" may differ only once the run is finished; "provenance" may differ, and then is noted.
      say: is called with each line on what had to be mended.

    Raises:
      UserError: the directory holds another run, something that is no run, or a record whose damage cannot be mended;
        another process uses it; or it cannot be written.
    """
    config = json.loads(json.dumps(config))
    made = _make(directory)
    try:
        lock.acquire(directory)
        for name in (CONFIG, PROGRESS, ROWS, CHECKPOINTS):
            inside(directory, directory / name)
        if (directory / CONFIG).exists():
            return _continue(directory, config, say)
        write_json(directory / CONFIG, config)
        record = Record(directory, config, Place())
        write_json(directory / PROGRESS, record.place.to_json())
        return record
    except BaseException:
        lock.release(directory)
        if made:
            with contextlib.suppress(OSError):
                directory.rmdir()  # unless something is in it
        raise


def _make(directory: Path) -> bool:
    """Whether the directory had to be made; UserError if it is no place for a run."""
    try:
        if not directory.exists():
            directory.mkdir(parents=True)
            return True
        held = {path.name for path in directory.iterdir()} if directory.is_dir() else {directory.name}
    except OSError as error:
        raise UserError(f"cannot use {directory} ({reason(error)}): choose another --out") from None
    ours = {lock.NAME, CONFIG + TEMPORARY}  # a run that could not start, for want of space, leaves no more
    if CONFIG not in held and held - ours:
        raise UserError(f"{directory} exists and holds no run (no config.json in it): choose another --out")
    return False


def _continue(directory: Path, config: dict, say: Callable[[str], None]) -> Record:
    held = read_json(directory / CONFIG)
    difference = _difference(held, config)
    if difference:
        raise UserError(f"{directory} holds another run ({difference}): choose another --out")
    place = _mended(directory, say)
    if place.finished:
        if not place.arrays:
            checkpoint.clear(directory / CHECKPOINTS)  # killed between finishing and this
        return Record(directory, held, place)
    if held.get("claims") != config.get("claims"):
        raise UserError(
            f"{directory} began with other claims (SHA-256 {_short(held.get('claims'))}, now"
            f" {_short(config.get('claims'))}): claims are fixed before a run, so choose another --out"
        )
    if held.get("provenance") != config.get("provenance"):
        held = {**held, "continued": [*held.get("continued", []), config.get("provenance")]}
        write_json(directory / CONFIG, held)
    return Record(directory, held, place)


def _difference(held: dict, asked: dict) -> str:
    """What differs between two configurations, in words; empty if nothing does that would change the result."""
    parts = [
        f"its {key} is {held.get(key)!r}, not {asked.get(key)!r}"
        for key in ("experiment", "preset")
        if held.get(key) != asked.get(key)
    ]
    before, now = held.get("settings", {}), asked.get("settings", {})
    parts += [
        f"its {key} is {before.get(key)!r}, not {now.get(key)!r}"
        for key in dict.fromkeys([*now, *before])
        if before.get(key) != now.get(key)
    ]
    if not parts and "data" in held and held["data"] != asked.get("data"):
        parts.append(
            f"the data have been replaced since it began: their SHA-256 was {_short(held['data'])} and is"
            f" {_short(asked.get('data'))}"
        )
    return "; ".join(parts[:3])


def _short(found: object) -> str:
    found = found.get("sha256", found) if isinstance(found, dict) else found
    return f"{found[:12]}..." if isinstance(found, str) and len(found) > 12 else str(found)


def _mended(directory: Path, say: Callable[[str], None]) -> Place:
    """Where to continue, once metrics.jsonl and progress.json are as they were then."""
    path, rows = directory / PROGRESS, directory / ROWS
    stored = Place.from_json(path)
    found = checkpoint.survey(directory / CHECKPOINTS)
    if stored is None and not found and not (rows.exists() and rows.stat().st_size):
        if (directory / "summary.json").exists():
            raise UserError(f"{not_readable(path)}, and {rows} is empty: put a copy of both in their place")
        if path.exists():
            say(f"{not_readable(path)}, and nothing was measured before: beginning anew")
        stored = Place()
        write_json(path, stored.to_json())
    if stored is not None and stored.finished and not found:
        _check_finished(rows, stored)
        return stored
    chosen = choose(stored, found, rows, directory, say)
    if chosen.source != rows:
        with writing(rows):
            if rows.exists():
                rows.replace(rows.with_name(rows.name + ".damaged"))
            shutil.copyfile(chosen.source, rows)
    if rows.exists() and rows.stat().st_size > chosen.place.bytes:
        if chosen.place.finished:
            say(f"{rows} has more than was written when the run finished: the rest is cut off")
        with writing(rows):
            os.truncate(rows, chosen.place.bytes)
    if chosen.place != stored:
        write_json(path, chosen.place.to_json())
    return chosen.place


def _check_finished(rows: Path, place: Place) -> None:
    """Refuse a finished run whose rows are not those that were written."""
    content = rows.read_bytes() if rows.exists() else b""
    if len(content) != place.bytes or place.sha256 not in ("", hashlib.sha256(content).hexdigest()):
        raise UserError(
            f"{rows} was changed after the run had finished ({len(content)} bytes, {place.bytes} written, or other"
            " contents): put a copy of it in its place, or choose another --out to run anew"
        )
