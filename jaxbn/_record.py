"""A record: what stands in the place of a layer's running statistics while moments of its input are recorded.

Every leaf of the layer's batch_stats becomes a `Recorded`, under the same name, so that a record passes through any
module, `jit`, `scan`, `shard_map` or `pmap` as batch_stats do. How it is used is part of its type, not a global: a
function compiled for one mode is not taken for another.
"""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._moments import Measured

BatchStats = dict[str, Any]


class Mode(enum.Enum):
    """What a layer does in training mode when it finds a record in the place of its batch_stats."""

    BY_BATCH = "normalize by the batch, and record its moments"
    BY_RUNNING = "normalize by the running statistics, and record the batch's moments"
    POOL = "normalize by the batch, record its moments, and say where all that was recorded moves the statistics"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recorded:
    """One leaf of a record.

    Attributes:
      mode: what the layer does; static.
      running: the leaf of batch_stats, which stays as it is.
      moved: of the same shape; what becomes of the leaf. In mode POOL the running statistics moved once by all that was
        recorded; otherwise only what the layer counts besides its moments.
      measured: in the leaf "mean" the moments of all that was recorded, of its shape; None in the others.
    """

    mode: Mode = dataclasses.field(metadata={"static": True})
    running: jax.Array
    moved: jax.Array
    measured: Measured | None = None

    @property
    def dtype(self) -> jnp.dtype:
        """Of the running statistics."""
        return self.running.dtype

    def astype(self, dtype: jax.typing.DTypeLike) -> "Recorded":
        """The leaf in another dtype; counts and variances stay real."""
        real = jnp.zeros((), dtype).real.dtype
        measured = self.measured
        if measured is not None:
            count, mean, remainder, var = measured
            measured = Measured(count.astype(real), mean.astype(dtype), remainder.astype(dtype), var.astype(real))
        return Recorded(self.mode, self.running.astype(dtype), self.moved.astype(dtype), measured)


def is_recorded(node: object) -> bool:
    """Whether a node of a tree is a leaf of a record."""
    return isinstance(node, Recorded)


def mode_of(batch_stats: Mapping[str, Any]) -> Mode | None:
    """The mode of a layer's record, or None for plain batch_stats."""
    return next((leaf.mode for leaf in batch_stats.values() if is_recorded(leaf)), None)


def running_part(batch_stats: Any) -> Any:
    """The running statistics of a record; any other tree is returned as it came."""
    return jax.tree.map(lambda leaf: leaf.running if is_recorded(leaf) else leaf, batch_stats, is_leaf=is_recorded)


def empty_record(batch_stats: Mapping[str, Any], mode: Mode) -> BatchStats:
    """Batch statistics of one layer as a record of nothing; "mean" and "var" become float32 at least."""
    return {name: _empty(name, jnp.asarray(value), mode) for name, value in batch_stats.items()}


def _empty(name, value, mode):
    if name in ("mean", "var"):
        value = value.astype(jnp.promote_types(value.dtype, jnp.float32))
    if name != "mean":
        return Recorded(mode, value, value)
    zero = jnp.zeros_like(value)
    return Recorded(mode, value, value, Measured(zero.real, zero, zero, zero.real))
