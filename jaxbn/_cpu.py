"""How XLA for CPUs sums an array fastest. Values are those of any other way, up to rounding."""

import math
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._arithmetic import at_least_float32, squared, weighted_sum
from jaxbn._axis_group import whole_axes

# A row of this many numbers keeps the CPU's vector units busy; rows of 6 features take three times as long to sum.
_ROW = 32


_forced: str | None = None


class Rows(NamedTuple):
    """An array as rows of features, `beside` of which lie beside each other in a longer row.

    Attributes:
      shape: of the array.
      axes: its axes that are reduced; the others are the features.
      beside: 1, or a divisor of the positions of an example: then the array is [examples, positions, features], and
        examples are reduced or kept.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    beside: int = 1

    @property
    def features(self) -> tuple[int, ...]:
        """Shape of the features."""
        return tuple(size for axis, size in enumerate(self.shape) if axis not in self.axes)

    @property
    def _outer(self) -> tuple[int, ...]:
        """The number of examples, where each has features of its own."""
        return () if 0 in self.axes else self.shape[:1]

    def lay(self, x: jax.Array) -> jax.Array:
        """The array in rows: [examples, rows of an example, features beside each other]."""
        if self.beside == 1:
            return x
        row = self.beside * math.prod(self.shape[self.axes[-1] + 1 :])
        return x.reshape(self.shape[0], -1).reshape(
            self.shape[0], -1, row
        )  # Meshes of explicit axes allow single steps.

    def back(self, x: jax.Array) -> jax.Array:
        """What `lay` was given."""
        return x if self.beside == 1 else x.reshape(self.shape[0], -1).reshape(self.shape)

    def broadcast(self, v: jax.Array) -> jax.Array:
        """A vector [features] that broadcasts to the rows; transposed, as `sum`."""
        if self.beside == 1:
            return jnp.expand_dims(v, self.axes)
        v = jnp.broadcast_to(v, self.features).reshape(*self._outer, 1, -1)
        beside = jnp.broadcast_to(v, (*self._outer, self.beside, v.shape[-1])).reshape(*self._outer, -1)
        return lax.optimization_barrier(beside).reshape(-1, 1, beside.shape[-1])

    def sum(self, x: jax.Array) -> jax.Array:
        """Sum over the array that lies in rows: [features]. The barrier keeps XLA from making one short sum of two."""
        if self.beside == 1:
            return jnp.sum(x, self.axes)
        rows = lax.optimization_barrier(jnp.sum(x, (1,) if self._outer else (0, 1)))
        beside = rows.reshape(*self._outer, self.beside, *self.shape[self.axes[-1] + 1 :])
        return jnp.sum(beside, len(self._outer))


def long_rows(x: jax.Array, axes: tuple[int, ...]) -> Rows:
    """Rows as long as they have to be; positions of one example only, so that examples can be on several devices.

    Sizes that are symbols (`jax.export`), and positions or features that are sharded, are left as they are.
    """
    shape = x.shape
    last = len(axes) if 0 in axes else len(axes) + 1
    positions, features = math.prod(shape[1:last]), math.prod(shape[last:])
    known = isinstance(positions, int) and isinstance(features, int)
    reduced = tuple(range(last)) if 0 in axes else tuple(range(1, last))
    if not known or features == 0 or axes != reduced or len(whole_axes(x, range(1, x.ndim))) < x.ndim - 1:
        return Rows(shape, axes)
    beside = 1
    while 2 * beside * features <= _ROW and positions % (2 * beside) == 0:
        beside *= 2
    return Rows(shape, axes, beside)


def unfused(tree, number: int):
    """The same arrays, which XLA:CPU takes for others: one number for each sum over them.

    It converts, subtracts and squares inside a sum, tile by tile, unless another operation uses the converted or the
    subtracted array too: then it writes that to memory first. Equal barriers are merged, hence the numbers.
    """
    for _ in range(number):
        tree = jax.tree.map(lax.optimization_barrier, tree)
    return tree


def as_they_are(tree, number: int):
    """What `unfused` is to compilers that fuse better without barriers: nothing."""
    del number
    return tree


def on_cpu(cpu: Callable, default: Callable, *arguments):
    """The one on CPUs, the other elsewhere: two functions of the same value."""
    if _forced is not None:
        return (cpu if _forced == "cpu" else default)(*arguments)
    return lax.platform_dependent(*arguments, cpu=cpu, default=default)


def forced() -> str | None:
    """Whose code `force` has asked for, "cpu" or "default"; None: the platform's. A key for caches of traces."""
    return _forced


@contextmanager
def force(code: str):
    """Trace the code for CPUs or the "default" one on any platform: for tests, which run both on a CPU."""
    global _forced
    before, _forced = _forced, code
    try:
        yield
    finally:
        _forced = before


def cpu_sums(axes, x, weights, shift, per_unit):
    """`_sums` of `_measure`, each of which reads x for itself: XLA:CPU would write what they have in common."""
    rows = long_rows(x, axes) if weights is None else Rows(x.shape, axes)

    def total(number, power):
        part, center = unfused((rows.lay(x), shift), number)
        c = power(at_least_float32(part) - rows.broadcast(center))
        return rows.sum(c) if weights is None else weighted_sum(c, weights, axes)

    return total(1, lambda c: c), total(2, lambda c: squared(c * rows.broadcast(per_unit)))
