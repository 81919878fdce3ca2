"""One run at a time in a directory: a lock that ends with the processes that hold it, however they end.

The file `.lock` in the directory is locked with flock(2), so that the system lets go of it when its holder dies; what
stands in the file only says who that is. Several processes that train together hold it in common.
"""

import contextlib
import datetime
import fcntl
import json
import os
import secrets
import shlex
import socket
import sys
from pathlib import Path
from typing import NamedTuple

from experiments.errors import UserError
from experiments.framework.files import writing

NAME = ".lock"
UNSUPPORTED = "the file system cannot lock {}: nothing else may use that directory meanwhile"


class _Lock(NamedTuple):
    file: int  # descriptor
    path: Path
    token: str
    process: int  # the id of the process that opened it: a child made by fork does not hold it


_held: dict[Path, _Lock] = {}


def acquire(directory: Path) -> str:
    """Take `directory` for this process, which may have it already; a token by which others can recognize the lock.

    UserError if another process holds it.
    """
    mine = _mine(directory)
    if mine is not None:
        return mine.token
    path = directory / NAME
    while True:
        with writing(path):
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        if not _try(file, fcntl.LOCK_EX, directory):
            holder = _read(file)
            os.close(file)
            raise UserError(f"{directory} is in use{_in_words(holder)}: wait until that ends, or choose another --out")
        if _still_there(file, path):
            break
        os.close(file)  # the holder before has just removed it
    token = secrets.token_hex(16)
    _held[directory.resolve()] = _Lock(file, path, token, os.getpid())
    command = shlex.join(["python -m experiments", *sys.argv[1:]]) if sys.argv else "python"
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    told = {"pid": os.getpid(), "host": socket.gethostname(), "command": command, "since": since, "token": token}
    with writing(path):
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(told).encode(), 0)
    return token


def share(directory: Path) -> None:
    """Let processes that have the token of this process's lock hold it too."""
    mine = _mine(directory)
    if mine is None or not _try(mine.file, fcntl.LOCK_SH, directory):
        raise UserError(f"{directory} was taken by another process: start again")


def join(directory: Path, token: str) -> None:
    """Hold a lock that another process has shared.

    UserError if `directory` does not have the lock with that token: it is another directory than that process's.
    """
    if _mine(directory) is not None:
        return
    path = directory / NAME
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        file = -1
    if file < 0 or _read(file).get("token") != token or not _try(file, fcntl.LOCK_SH, directory):
        if file >= 0:
            os.close(file)
        raise UserError(
            f"--out {directory} (here {directory.resolve()}) is not the directory that process 0 uses: give all"
            " processes one directory that all can reach, best as an absolute path"
        )
    _held[directory.resolve()] = _Lock(file, path, token, os.getpid())


def release(directory: Path) -> None:
    """Let go of `directory`; the last process that holds the lock removes its file."""
    mine = _mine(directory)
    if mine is None:
        return
    del _held[directory.resolve()]
    with contextlib.suppress(OSError):
        fcntl.flock(mine.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine.path.unlink()
    with contextlib.suppress(OSError):
        os.close(mine.file)


def release_all() -> None:
    """Let go of every directory that this process holds."""
    for directory in list(_held):
        release(directory)


def _mine(directory: Path) -> _Lock | None:
    found = _held.get(directory.resolve())
    return found if found is not None and found.process == os.getpid() else None


def _try(file: int, how: int, directory: Path) -> bool:
    """Whether the lock could be had; where the file system has no locks, it says so and goes on."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        print(f"warning: {UNSUPPORTED.format(directory)}", file=sys.stderr)
    return True


def _still_there(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path, follow_symlinks=False))
    except OSError:
        return False


def _read(file: int) -> dict:
    with contextlib.suppress(OSError, ValueError):
        told = json.loads(os.pread(file, 65536, 0))
        if isinstance(told, dict):
            return told
    return {}


def _in_words(holder: dict) -> str:
    if not holder:  # it has not written yet
        return " by another process"
    return (
        f" by process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')} ({holder.get('command')})"
    )
