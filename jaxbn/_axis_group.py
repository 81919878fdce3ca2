"""The shards that share statistics: a named axis, or groups of indices on it."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree


class AxisGroup(NamedTuple):
    """The named axes whose shards share statistics; hashable, so that it can stand among static arguments.

    With groups, `psum` returns [groups, ...], equal on every shard: one collective that works under shard_map's
    varying-axis check, pmap and vmap alike, and from which running statistics are pooled without another.

    Attributes:
      axis_name: named axis or tuple of them; None is none.
      groups: of indices on it, all of one size; None is one group of all.
    """

    axis_name: Hashable | tuple[Hashable, ...] | None = None
    groups: tuple[tuple[int, ...], ...] | None = None

    def size(self) -> int:
        """Number of shards that share statistics; ValueError where the axis name is not bound."""
        if self.axis_name is None:
            return 1
        try:
            size = lax.axis_size(self.axis_name)
        except NameError as error:
            raise ValueError(
                f"axis_name={self.axis_name!r} is not bound here{_bound()}. Call inside shard_map, pmap or vmap over a"
                " named axis of that name; under plain jit with sharded inputs leave axis_name=None: there they are"
                " global."
            ) from error
        if self.groups is None:
            return size
        if sorted(index for group in self.groups for index in group) != list(range(size)):
            raise ValueError(
                f"axis_index_groups={self.groups} on axis {self.axis_name!r} of {size} shards; expected each index from"
                f" 0 to {size - 1} once."
            )
        return len(self.groups[0])

    def psum(self, tree):
        """Sum of each leaf over the shards, [groups, ...] with groups; all leaves in one collective."""
        if self.axis_name is None:
            return tree
        flat, unravel = ravel_pytree(tree)
        if self.groups is None:
            return unravel(lax.psum(flat, self.axis_name))
        mine = jnp.arange(len(self.groups)) == self._group()
        return jax.vmap(unravel)(lax.psum(jnp.where(mine[:, None], flat[None], 0), self.axis_name))

    def gather(self, tree):
        """Each leaf of every shard: [shards, ...], with groups [groups, shards, ...]; all in one collective."""
        flat, unravel = ravel_pytree(tree)
        names = self.axis_name if isinstance(self.axis_name, tuple) else (self.axis_name,)
        manual = jax.sharding.get_abstract_mesh().manual_axes
        equal = tuple(name for name in names if name in manual and name not in varying_axes(flat))
        rows = lax.pcast(flat, equal, to="varying") if equal else flat
        # What vmap names is no axis of a mesh, for which alone the type of an array says that it is the same on all.
        together = set(names) <= set(manual)
        for name in [names] if together else reversed(names):
            rows = lax.all_gather(rows, name, to="invarying" if together or name in manual else "varying")
        rows = rows.reshape(-1, flat.size)
        if self.groups is None:
            return jax.vmap(unravel)(rows)
        return jax.vmap(jax.vmap(unravel))(rows[jnp.asarray(self.groups)])

    @property
    def shard_axis(self) -> int:
        """The axis of what `gather` returns that holds the shards of one group."""
        return 0 if self.groups is None else 1

    def select_group(self, tree):
        """This shard's group's entry of what `psum` returned."""
        if self.groups is None:
            return tree
        return jax.tree.map(lambda rows: lax.dynamic_index_in_dim(rows, self._group(), keepdims=False), tree)

    def add_group_axis(self, v: jax.Array) -> jax.Array:
        """A vector that all groups share, shaped to meet what `psum` returns."""
        return v if self.groups is None else jnp.expand_dims(v, 0)

    def _group(self):
        group_of = {index: number for number, group in enumerate(self.groups or ()) for index in group}
        return jnp.asarray([group_of[index] for index in sorted(group_of)])[lax.axis_index(self.axis_name)]


def _bound():
    names = sorted(map(repr, jax.sharding.get_abstract_mesh().manual_axes))
    return f" ({', '.join(names)} is)" if names else ""


def axis_group_of(axis_name, axis_index_groups) -> AxisGroup:
    """AxisGroup, from what users pass; ValueError for groups without an axis or of unequal size."""
    if axis_index_groups is None:
        return AxisGroup(tuple(axis_name) if isinstance(axis_name, list) else axis_name)
    groups = tuple(tuple(int(i) for i in group) for group in axis_index_groups)
    if axis_name is None:
        raise ValueError(f"axis_index_groups={groups} came without axis_name; pass the axis whose indices they are.")
    if not groups or len({len(group) for group in groups}) != 1 or not groups[0]:
        raise ValueError(f"axis_index_groups={groups} has groups of unequal size; expected groups of one size.")
    return AxisGroup(axis_name, groups)


def varying_axes(x: jax.Array) -> frozenset:
    """Names of the mesh axes over which x differs inside shard_map; the attribute was called vma up to jax 0.10.1."""
    aval = jax.typeof(x)
    return aval.manual_axis_type.varying if hasattr(aval, "manual_axis_type") else aval.vma


def whole_axes(x: jax.Array, axes: Sequence[int]) -> tuple[int, ...]:
    """Those of the axes along which no mesh of explicit axes shards x."""
    return tuple(axis for axis in axes if jax.typeof(x).sharding.spec[axis] is None)
