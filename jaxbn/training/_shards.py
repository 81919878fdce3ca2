"""The shards of a batch, as the loss sees them while it is traced."""

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
from jax import lax

from jaxbn._axis_group import varying_axes

Axis = Hashable | tuple[Hashable, ...]


class Shards(NamedTuple):
    """Whether the loss sees the whole batch or one shard of it.

    Attributes:
      axis: the named axis, or tuple of them, over which the batch is sharded; None where the loss sees all of it.
      varying: whether types tell what differs between shards, as under `shard_map`: JAX then sums gradients of params
        over the shards by itself.
    """

    axis: Axis | None
    varying: bool

    def total(self, tree: Any) -> Any:
        """The sum over shards of each leaf."""
        return tree if self.axis is None else lax.psum(tree, self.axis)

    def number(self) -> int:
        """How many shards there are; 1 where the loss sees the whole batch."""
        return 1 if self.axis is None else lax.axis_size(self.axis)

    def fold(self, rng: jax.Array) -> jax.Array:
        """A key for each shard."""
        return rng if self.axis is None else jax.random.fold_in(rng, lax.axis_index(self.axis))

    def mark_varying(self, tree: Any) -> Any:
        """Mark leaves as differing between shards, so that JAX does not sum their gradients."""
        if not self.varying:
            return tree
        names = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        return jax.tree.map(
            lambda v: lax.pcast(v, tuple(n for n in names if n not in varying_axes(v)), to="varying"), tree
        )
