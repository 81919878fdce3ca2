"""Files of a run's directory: written whole or not at all, and read only where they lie inside the directory."""

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.errors import UserError

SIGNIFICANT_DIGITS = 6  # of a float in metrics.jsonl: what float32 always carries
TEMPORARY = ".new"  # the ending of a file that is being written
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError inside into a UserError of one line that names `path` and says what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path} ({reason(error)}): {_remedy(error)}") from None


def reason(error: OSError) -> str:
    """What the operating system says of an error, in words."""
    return error.strerror or str(error) or type(error).__name__


def _remedy(error: OSError) -> str:
    if error.errno in NO_SPACE:
        return "make room and give the same command again; what was saved before is not lost"
    return "choose another --out, or make it a directory that can be written"


def inside(directory: Path, path: Path) -> Path:
    """`path`, once it is sure that it lies in `directory`, symbolic links resolved; else UserError."""
    if path.resolve().is_relative_to(directory.resolve()):
        return path
    raise UserError(f"{path} leads out of {directory}, to {path.resolve()}: a run uses only what lies in its directory")


def write_json(path: Path, value: object) -> None:
    """Replace `path` atomically by JSON; see `write_text`."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace `path` atomically: a reader sees the old file or the new one. UserError where that is not possible."""
    temporary = path.with_name(path.name + TEMPORARY)
    with writing(path):
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def read_json(path: Path) -> dict:
    """Read a JSON object; UserError if it is not one."""
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path} ({reason(error)}): make it readable, or choose another --out") from None
    except ValueError:
        value = None
    if isinstance(value, dict):
        return value
    raise UserError(f"{path} is not readable JSON: put a copy of it in its place, or choose another --out")


def compact(value: Any) -> Any:
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


def revive(value: Any) -> Any:
    """The inverse of `compact`: null is a number that was not finite."""
    if isinstance(value, dict):
        return {key: revive(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [revive(entry) for entry in value]
    return math.nan if value is None else value
