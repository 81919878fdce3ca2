"""Checkpoints of a grid in training, written by orbax, and which of them a rerun continues from.

A checkpoint counts from the moment the record points to it; one that a crash left half written is never looked at.
"""

import logging
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from experiments.errors import UserError
from experiments.framework.record import Record

SECONDS_BETWEEN = 10.0  # what a crash costs at most; writing one takes well under a second

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports every file that it opens


def is_due(record: Record) -> bool:
    """Whether the last checkpoint (or the opening of the record) is long enough ago."""
    return time.monotonic() - record.saved_at >= SECONDS_BETWEEN


def save(record: Record, stage: str, part: int, done: int, states: object) -> None:
    """Write `states`, a tree of arrays, point the record to them, and drop the checkpoint before.

    `part` and `done` say how far the stage is: parts of the grid, and intervals of that part.
    """
    before = record.progress["checkpoint"]
    file = f"checkpoints/{part}-{done}"
    leaves = {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(states))}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((record.directory / file).absolute(), leaves, force=True)
    record.commit(checkpoint={"stage": stage, "part": part, "done": done, "file": file})
    record.saved_at = time.monotonic()
    if before and before["file"]:
        shutil.rmtree(record.directory / before["file"], ignore_errors=True)


def pass_part(record: Record, stage: str, part: int) -> None:
    """Note that `part` starts next and needs no states from before."""
    record.commit(checkpoint={"stage": stage, "part": part, "done": 0, "file": None})
    shutil.rmtree(record.directory / "checkpoints", ignore_errors=True)


def position(record: Record, stage: str) -> tuple[int, int]:
    """Where to continue `stage`: the part, and how many of its intervals are done."""
    pointer = record.progress["checkpoint"]
    return (pointer["part"], pointer["done"]) if pointer and pointer["stage"] == stage else (0, 0)


def restore(record: Record, like: object) -> object:
    """The states that the record points to, as a tree like `like` (of arrays or shapes).

    UserError if they cannot be read or do not fit.
    """
    file = record.directory / record.progress["checkpoint"]["file"]
    shapes, structure = jax.tree.flatten(like)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.restore(file.absolute())
        leaves = [np.asarray(stored[str(number)]) for number in range(len(shapes))]
        if [(leaf.shape, leaf.dtype) for leaf in leaves] != [(leaf.shape, leaf.dtype) for leaf in shapes]:
            raise ValueError("other shapes")
    except Exception:  # orbax, tensorstore and the file system each raise kinds of their own
        raise UserError(
            f"the checkpoint {file} is damaged or missing: remove {record.directory} to start over, or choose"
            " another --out"
        ) from None
    return jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in leaves])
