"""Files of data sets: where they are kept, how they are written whole, and what to say where they cannot be read."""

import os
import tempfile
from pathlib import Path

from experiments.errors import UserError


def cache_directory(name: str) -> Path:
    """Where `python -m experiments data` keeps a data set: below `XDG_CACHE_HOME`, else below `~/.cache`."""
    configured = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says that a relative path is to be ignored.
    base = Path(configured) if os.path.isabs(configured) else Path.home() / ".cache"
    return base / "jaxbn" / name


def make_directory(directory: Path) -> None:
    """Make a directory that can be written to; UserError where that is not possible."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {directory} ({error.strerror}): choose another directory with --to") from None


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is either complete or not there; UserError where that is not possible."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another directory with --to") from None
    finally:
        temporary.unlink(missing_ok=True)


def cannot_read(path: Path, error: OSError) -> UserError:
    """What to say of a file that exists and cannot be read."""
    remedy = "check its permissions" if isinstance(error, PermissionError) else "name another directory"
    return UserError(f"cannot read {path} ({error.strerror or error}): {remedy}")
