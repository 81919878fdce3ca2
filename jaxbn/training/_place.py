"""Batches and states put on the devices of a mesh, or of a pmap."""

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxbn.training._shards import Axis


def shard_batch(batch: Any, mesh: Mesh, axis: Axis = "data", *, scan: bool = False) -> Any:
    """This process's examples as its part of a batch that is sharded over the mesh.

    Args:
      batch: leaves [examples, ...], numpy or jax arrays. With one process that is the whole batch; with several each
        passes its own, equally many, in the order of their devices on the mesh.
      mesh: with an axis of that name.
      axis: name of the mesh axis, or a tuple of them.
      scan: the leaves are [steps, examples, ...], for a step built with scan=True.
    """
    sharding = NamedSharding(automatic(mesh), batch_spec(axis, scan))
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A copy of each leaf on every device of the mesh; with several processes all pass the same values."""
    sharding = NamedSharding(automatic(mesh), P())
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.array(leaf)), tree)


def replicate_for_pmap(tree: Any, devices: list, axis: Hashable = "data") -> Any:
    """Each leaf once per device, along a new first axis, as pmap over `axis` wants it."""
    sharding = NamedSharding(Mesh(np.asarray(devices), (axis,)), P(axis))
    return jax.tree.map(lambda leaf: jax.device_put(jnp.stack([leaf] * len(devices)), sharding), tree)


def unreplicate(tree: Any) -> Any:
    """The first device's copy of each leaf that `replicate_for_pmap` or a step by pmap made, on that device alone."""
    return jax.tree.map(_first_copy, tree)


def _first_copy(leaf):
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
        return leaf[0]
    # Indexing all copies would run a program with collectives on all devices, one for each leaf and all at once, in
    # which the threads of XLA:CPU can wait for each other.
    return leaf.addressable_shards[0].data[0]


def automatic(mesh: Mesh) -> Mesh:
    """The mesh with automatic axes: with explicit ones a loss would have to name the sharding of many results."""
    return Mesh(mesh.devices, mesh.axis_names)


def batch_spec(axis: Axis, scan: bool) -> P:
    """How the leaves of a batch lie on the mesh."""
    return P(None, axis) if scan else P(axis)
