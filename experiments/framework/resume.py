"""Where a run continues, from what is left of it on disk."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from experiments.errors import UserError
from experiments.framework.checkpoint import ROWS, Found


class Place(NamedTuple):
    """Where a run is; progress.json and the seal of each checkpoint hold one.

    Attributes:
      bytes: how much of metrics.jsonl is certain.
      sha256: of that much; empty in runs of earlier versions, which did not note it.
      done: the stages that are finished.
      finished: whether the whole run is.
      number: of the newest checkpoint; 0 before the first.
      arrays: whether that checkpoint holds the arrays with which the run continues.
      position: where in a stage the run is, as whoever trains it notes; None at the start of a stage.
      settled: bytes, sha256 and position of the last place that needed no arrays. No finished stage lies after it.
    """

    bytes: int = 0
    sha256: str = hashlib.sha256(b"").hexdigest()
    done: tuple[str, ...] = ()
    finished: bool = False
    number: int = 0
    arrays: bool = False
    position: dict | None = None
    settled: tuple[int, str, dict | None] = (0, hashlib.sha256(b"").hexdigest(), None)

    def settle(self) -> "Place":
        """The same place, noted as one that needs no arrays."""
        return self._replace(settled=(self.bytes, self.sha256, self.position))

    def without_arrays(self) -> "Place":
        """The last place that needed no arrays."""
        size, digest, position = self.settled
        finished = self.finished and not self.arrays
        return self._replace(bytes=size, sha256=digest, position=position, arrays=False, finished=finished)

    def to_json(self) -> dict:
        """As progress.json has it."""
        return self._asdict()

    @classmethod
    def from_json(cls, path: Path) -> "Place | None":
        """The place that a file holds, or None if there is no such file or it holds none."""
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except (OSError, ValueError):
            return None

    @classmethod
    def from_dict(cls, held: object) -> "Place | None":
        """The place that a JSON object describes, or None if it describes none."""
        if not isinstance(held, dict):
            return None
        if held.get("finished") is True and "settled" not in held:  # an earlier version's
            held = {"sha256": "", **{key: held.get(key) for key in ("bytes", "done", "finished")}}
        elif held.keys() != set(cls._fields):
            return None
        place = cls(**held)
        if not isinstance(place.done, list) or not isinstance(place.settled, list | tuple):
            return None
        place = place._replace(done=tuple(place.done), settled=tuple(place.settled))
        types = (int, str, tuple, bool, int, bool)  # of the fields up to `arrays`
        right = all(isinstance(value, kind) for value, kind in zip(place, types, strict=False))
        right = right and len(place.settled) == 3 and isinstance(place.settled[0], int)
        return place if right and isinstance(place.position, dict | None) else None


class Choice(NamedTuple):
    """Where a run continues, and the file that has its rows: at least `place.bytes` bytes, the first of them right."""

    place: Place
    source: Path


def choose(stored: Place | None, found: list[Found], rows: Path, directory: Path, say: Callable[[str], None]) -> Choice:
    """The latest place for which everything is there and which loses no finished stage.

    Args:
      stored: what progress.json holds; None if it is not readable.
      found: the checkpoints on disk, newest first.
      rows: metrics.jsonl.
      directory: the run's.
      say: is called with each difference.

    Raises:
      UserError: there is no such place.
    """
    whole: list[tuple[int, Place]] = []
    for each in found:
        place, path = Place.from_dict(each.note), directory / "checkpoints" / str(each.number)
        if each.damage or place is None:
            say(f"checkpoint {path} is damaged ({each.damage or 'its note is not readable'}): it is not used")
        else:
            whole.append((each.number, place))
    if stored is None:
        if not whole:
            raise UserError(
                f"{not_readable(directory / 'progress.json')} and no checkpoint is whole, so that it is not known what"
                f" of {rows} is done: put a copy of it in its place, or choose another --out"
            )
        stored = whole[0][1]
        say(f"{not_readable(directory / 'progress.json')}: its contents are taken from checkpoint {whole[0][0]}")
    numbers = [number for number, _ in whole]
    places = [stored] + [place for _, place in whole if place.done == stored.done and place.number < stored.number]
    places = [place for place in places if not place.arrays or place.number in numbers]
    places = sorted([*places, stored.without_arrays()], key=lambda place: -place.bytes)
    copies = [directory / "checkpoints" / str(number) / ROWS for number in numbers]
    for place in places:
        source = next((path for path in (rows, *copies) if _holds(path, place)), None)
        if source is None:
            continue
        if place != stored:
            say(f"continuing from {_in_words(place)}, not from {_in_words(stored)}")
        if source != rows:
            say(f"{rows} does not hold what was written: its rows are taken from {source.parent}")
        return Choice(place, source)
    size = rows.stat().st_size if rows.exists() else 0
    raise UserError(
        f"{rows} is damaged ({size} bytes, {stored.bytes} were written, or other contents) and no checkpoint has its"
        " rows: put a copy of it in its place, or choose another --out"
    )


def _holds(path: Path, place: Place) -> bool:
    if place.bytes == 0:
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        content = file.read(place.bytes)
    return len(content) == place.bytes and place.sha256 in ("", hashlib.sha256(content).hexdigest())


def _in_words(place: Place) -> str:
    if place.position is None:
        return "the start of a stage" if place.done else "the start"
    return ", ".join(f"{name} {value}" for name, value in place.position.items())


def not_readable(path: Path) -> str:
    """That a file is missing or damaged, in words."""
    return f"{path} is {'damaged' if path.exists() else 'missing'}"
