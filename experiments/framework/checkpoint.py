"""Checkpoints: the arrays of a training state, written by orbax, with checksums of every file.

`DIRECTORY/40/` holds checkpoint number 40: `state/` is what orbax wrote of the arrays (some checkpoints have none),
`metrics.jsonl` a copy of the rows so far, and `seal.json`, written last, has the size and SHA-256 of every file and a
note on where the run was. Without a seal that fits, a checkpoint is not used and the one before it is. The state is the
same on all devices, so that it can be restored onto any number of them.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from experiments.errors import UserError
from experiments.framework.files import NO_SPACE, inside, write_json, writing

KEPT = 2  # the newest, and the one before in case it is damaged
STATE, ROWS, SEAL = "state", "metrics.jsonl", "seal.json"

# Orbax logs every file that it opens, and each error several times, with stack traces, before it raises it. And when
# one write fails, asyncio logs the failures of all others, which nobody awaits any more.
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)

# Then orbax closes its event loop while tensorstore still ends other writes. Each of these would print a traceback that
# the loop is closed, beside the error that says why.
_report_unraisable = sys.unraisablehook


def _report_but_closed_loops(unraisable: "sys.UnraisableHookArgs") -> None:
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        _report_unraisable(unraisable)


sys.unraisablehook = _report_but_closed_loops


class Found(NamedTuple):
    """A checkpoint on disk.

    Attributes:
      number: of the checkpoint.
      note: what was noted with it.
      damage: what is wrong with it, in words; empty if it can be used.
    """

    number: int
    note: dict
    damage: str


def save_state(directory: Path, number: int, state: Any) -> None:
    """Write the arrays of a checkpoint, the same on all devices, without its seal; every process calls this.

    UserError where the disk is full or cannot be written.
    """
    path = directory / str(number)
    if jax.process_index() == 0:
        _make(path)
    leaves = {str(index): leaf for index, leaf in enumerate(jax.tree.leaves(state))}
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path.absolute() / STATE, leaves, force=True)
    except Exception as error:  # orbax and tensorstore raise kinds of their own
        why = _full(error)
        if not why:
            raise
        raise UserError(
            f"cannot write the checkpoint {path} ({why}): make room and give the same command again; what was saved"
            " before is not lost"
        ) from None


def seal(directory: Path, number: int, note: dict, rows: Path, state: Any = None) -> None:
    """Finish a checkpoint with a copy of the file `rows` and checksums, and remove all but the newest `KEPT`.

    One process calls this, after `save_state` if there is a state. Checkpoints with larger numbers go too: they were
    passed over, and their steps are done again.
    """
    path = directory / str(number)
    if state is None:
        _make(path)
    with writing(path):
        if rows.exists():
            shutil.copyfile(rows, path / ROWS)
    files = {name: _checksum(path / name) for name in _files(path)}
    write_json(path / SEAL, {"note": note, "arrays": _shapes(state), "files": files})
    numbers = _numbers(directory)
    kept = [other for other in numbers if other <= number][:KEPT]
    for other in set(numbers) - set(kept):
        remove(directory, other)


def survey(directory: Path) -> list[Found]:
    """All checkpoints on disk, newest first, whole or not."""
    return [_look_at(directory, number) for number in _numbers(directory)]


def restore(directory: Path, number: int, like: Any) -> Any:
    """The arrays saved as `number`, as a tree like `like`, on the devices of its arrays; every process calls this.

    Arrays of `like` may be shapes without devices: then they go to the first device. UserError if the checkpoint holds
    arrays of other shapes, or cannot be read.
    """
    path = directory / str(number)
    leaves, structure = jax.tree.flatten(like)
    remedy = "it belongs to another state: choose another --out"
    try:
        held = json.loads((path / SEAL).read_text())["arrays"]
    except (OSError, ValueError, KeyError):
        held, remedy = None, "it cannot be read: choose another --out"
    if held != _shapes(like):
        raise UserError(f"the checkpoint {path} does not fit ({remedy})")
    first = SingleDeviceSharding(jax.local_devices()[0])
    wanted = {
        str(index): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or first)
        for index, leaf in enumerate(leaves)
    }
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.restore(path.absolute() / STATE, wanted)
    return jax.tree.unflatten(structure, [stored[str(index)] for index in range(len(leaves))])


def remove(directory: Path, number: int) -> None:
    """Remove a checkpoint: what its seal lists, or what an unfinished one consists of, and nothing else.

    The seal goes first, so that what a crash leaves is seen to be no checkpoint. Links are not followed.
    """
    path = directory / str(number)
    if path.is_symlink() or not path.is_dir():
        return
    files, sealed = _sealed_files(path), (path / SEAL).exists()
    with contextlib.suppress(OSError):
        for name in [SEAL, SEAL + ".new", *files, ROWS]:
            if (path / name).resolve().is_relative_to(path.resolve()):
                (path / name).unlink(missing_ok=True)
        if not (sealed and files):
            for entry in path.glob(f"{STATE}*"):  # orbax names what it has not finished `state.orbax-checkpoint-tmp`
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)
    for folder, _, _ in os.walk(path, topdown=False):
        with contextlib.suppress(OSError):  # something else lies in it
            os.rmdir(folder)


def clear(directory: Path) -> None:
    """Remove every checkpoint, and the directory if nothing else is in it."""
    for number in _numbers(directory):
        remove(directory, number)
    with contextlib.suppress(OSError):
        directory.rmdir()


def _make(path: Path) -> None:
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        inside(path.parent.parent, path.parent)
        inside(path.parent, path)
        remove(path.parent, int(path.name))
        path.mkdir(exist_ok=True)


def _look_at(directory: Path, number: int) -> Found:
    path = directory / str(number)
    try:
        content = json.loads((path / SEAL).read_text())
        note, files = content["note"], content["files"]
        expected = {name: (int(size), str(digest)) for name, (size, digest) in files.items()}
        if not isinstance(note, dict):
            raise TypeError
    except FileNotFoundError:
        return Found(number, {}, "it was not finished: it has no seal")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Found(number, {}, "its seal is not readable")
    return Found(number, note, _damage(path, expected))


def _damage(path: Path, expected: dict[str, tuple[int, str]]) -> str:
    for name, (size, digest) in expected.items():
        file = path / name
        if file.is_symlink() or not file.resolve().is_relative_to(path.resolve()):
            return f"{name} leads out of it"
        if not file.is_file():
            return f"{name} is missing"
        try:
            found = _checksum(file)
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if found[0] != size:
            return f"{name} has {found[0]} bytes, not {size}"
        if found[1] != digest:
            return f"{name} has other contents than were written"
    more = [name for name in _files(path) if name not in expected]
    return f"{more[0]} does not belong to it" if more else ""


def _numbers(directory: Path) -> list[int]:
    """Numbers of what looks like a checkpoint, finished or not, newest first."""
    if directory.is_symlink() or not directory.is_dir():
        return []
    paths = [path for path in directory.iterdir() if path.name.isdecimal() and path.name.isascii()]
    paths = [path for path in paths if path.is_dir() and not path.is_symlink()]
    return sorted(
        (int(path.name) for path in paths if (path / SEAL).exists() or any(path.glob(f"{STATE}*"))), reverse=True
    )


def _sealed_files(path: Path) -> list[str]:
    try:
        return [str(name) for name in json.loads((path / SEAL).read_text())["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _files(path: Path) -> list[str]:
    """Names of the files of a checkpoint but its seal."""
    found = sorted(str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir() or file.is_symlink())
    return [name for name in found if name not in (SEAL, SEAL + ".new")]


def _checksum(file: Path) -> list:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return [file.stat().st_size, digest]


def _shapes(state: Any) -> list[list]:
    return [[str(leaf.dtype), list(leaf.shape)] for leaf in jax.tree.leaves(state)]


def _full(error: BaseException | None) -> str:
    """What the system said if an error comes from a disk that is full or cannot be written; else empty."""
    marks = [os.strerror(number) for number in (*NO_SPACE, errno.EACCES, errno.EROFS, errno.EIO)]
    while error is not None:
        said = [mark for mark in marks if mark in str(error)]
        if said:
            return said[0]
        error = error.__cause__ or error.__context__
    return ""
