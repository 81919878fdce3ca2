"""Checkpoints of one training state that many processes share: written by orbax, sealed with checksums.

`DIRECTORY/step-40/` is what orbax wrote, `DIRECTORY/step-40.json` the seal: size and SHA-256 of every file in it,
written last. Without a seal that fits, a checkpoint is not used, and the one before it is. The state is the same on all
devices, so that it can be restored onto any number of them.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from experiments.framework.record import write_json

KEPT = 2  # the newest, and the one before in case it is damaged
TEMPORARY = ".orbax-checkpoint-tmp"  # in the name of a directory that orbax has not finished

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports every file that it opens


def save(directory: Path, step: int, state: Any) -> None:
    """Write `state`, a tree of arrays that are the same on all devices; every process calls this."""
    path = _path(directory, step)
    leaves = {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(state))}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, leaves, force=True)
    if jax.process_index() == 0:
        write_json(_seal(directory, step), {"files": _checksums(path)})
        _drop_others(directory, step)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("saved")


def newest(directory: Path, report: Callable[[str], None]) -> int | None:
    """The step of the newest checkpoint that is whole, or None; the same answer in all processes.

    Process 0 looks, and reports each checkpoint that it has to pass over.
    """
    found = -1
    if jax.process_index() == 0:
        for step in _steps(directory):
            damage = _damage(directory, step)
            if not damage:
                found = step
                break
            report(f"checkpoint {_path(directory, step)} is damaged ({damage}): looking for the one before it")
        if found < 0 and _steps(directory):
            report("no checkpoint is whole: starting over")
    if jax.process_count() > 1:
        found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
    return None if found < 0 else found


def restore(directory: Path, step: int, like: Any) -> Any:
    """The state saved at `step`, on the devices on which the arrays of `like` are; every process calls this."""
    leaves, structure = jax.tree.flatten(like)
    wanted = {
        str(number): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for number, leaf in enumerate(leaves)
    }
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.restore(_path(directory, step), wanted)
    return jax.tree.unflatten(structure, [stored[str(number)] for number in range(len(leaves))])


def _drop_others(directory, step):
    """Keep the newest, and none of later steps: they were passed over, and are done again."""
    steps = _steps(directory)
    kept = [found for found in steps if found <= step][:KEPT]
    for old in set(steps) - set(kept):
        _seal(directory, old).unlink(missing_ok=True)
        shutil.rmtree(_path(directory, old), ignore_errors=True)
    for unfinished in directory.glob(f"step-*{TEMPORARY}*"):
        shutil.rmtree(unfinished, ignore_errors=True)


def _path(directory, step):
    return directory.absolute() / f"step-{step}"


def _seal(directory, step):
    return directory / f"step-{step}.json"


def _steps(directory):
    """Steps of which there is a directory, sealed or not, newest first; orbax names unfinished ones differently."""
    names = [path.name.removeprefix("step-") for path in directory.glob("step-*") if path.is_dir()]
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def _damage(directory, step) -> str:
    """What is wrong with a checkpoint, in words; empty if nothing is."""
    try:
        files = json.loads(_seal(directory, step).read_text())["files"]
        expected = [(name, size, digest) for name, (size, digest) in files.items()]
    except FileNotFoundError:
        return "it was not finished: it has no seal"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        expected = []
    if not expected:
        return "its seal is not readable"
    found = _checksums(_path(directory, step))
    for name, size, digest in expected:
        if name not in found:
            return f"{name} is missing"
        if found[name][0] != size:
            return f"{name} has {found[name][0]} bytes, not {size}"
        if found[name][1] != digest:
            return f"{name} has other contents than were written"
    return ""


def _checksums(path):
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {
        str(file.relative_to(path)): [file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()]
        for file in files
    }
