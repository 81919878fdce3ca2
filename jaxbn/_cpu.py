"""How XLA for CPUs sums an array fastest. Values are those of any other way, up to rounding."""

import math
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._affine import before_activation
from jaxbn._arithmetic import at_least_float32, safe_divide, squared, weighted_sum
from jaxbn._axis_group import whole_axes
from jaxbn._moments import Sums, finite_or_zero, unit_near
from jaxbn._padding import silenced

# The largest |mean| / std at which sums around zero are kept: squaring loses (1 + ratio**2) roundings of the variance.
_MAX_RATIO = 2.0
# A row of this many numbers keeps the CPU's vector units busy; rows of 6 features take three times as long to sum.
_ROW = 96

_forced: str | None = None


class Rows(NamedTuple):
    """An array as rows of features, `beside` of which lie beside each other in a longer row.

    Attributes:
      shape: of the array.
      axes: its axes that are reduced; the others are the features.
      beside: 1, or a divisor of the positions of an example: then the features are the last axes.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    beside: int = 1

    @property
    def features(self) -> tuple[int, ...]:
        """Shape of the features."""
        return tuple(size for axis, size in enumerate(self.shape) if axis not in self.axes)

    def lay(self, x: jax.Array) -> jax.Array:
        """The array in rows: [examples, rows of an example, features beside each other]."""
        if self.beside == 1:
            return x
        # In two steps: on a mesh of explicit axes a reshape may merge axes or part one, but not both at once.
        return x.reshape(self.shape[0], -1).reshape(self.shape[0], -1, self.beside * math.prod(self.features))

    def back(self, x: jax.Array) -> jax.Array:
        """What `lay` was given."""
        return x if self.beside == 1 else x.reshape(self.shape[0], -1).reshape(self.shape)

    def broadcast(self, v: jax.Array) -> jax.Array:
        """A vector [features] that broadcasts to the rows; transposed, as `sum`."""
        if self.beside == 1:
            return jnp.expand_dims(v, self.axes)
        beside = jnp.tile(jnp.broadcast_to(v, self.features).ravel(), self.beside)
        return lax.optimization_barrier(beside)[None, None]

    def sum(self, x: jax.Array) -> jax.Array:
        """Sum over the array that lies in rows: [features]. The barrier keeps XLA from making one short sum of two."""
        if self.beside == 1:
            return jnp.sum(x, self.axes)
        return jnp.sum(lax.optimization_barrier(jnp.sum(x, (0, 1))).reshape(self.beside, *self.features), 0)


def long_rows(x: jax.Array, axes: tuple[int, ...]) -> Rows:
    """Rows as long as they have to be; positions of one example only, so that examples can be on several devices.

    Sizes that are symbols (`jax.export`), and positions or features that a mesh of explicit axes shards, are left as
    they are.
    """
    shape = x.shape
    positions, features = math.prod(shape[1 : len(axes)]), math.prod(shape[len(axes) :])
    known = isinstance(positions, int) and isinstance(features, int)
    sharded = len(whole_axes(x, range(1, x.ndim))) < x.ndim - 1
    if not known or sharded or features == 0 or axes != tuple(range(len(axes))):
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


def sums_on_cpu(axes: tuple[int, ...], x: jax.Array, weights: jax.Array | None, count: jax.Array) -> Sums:
    """Sums around zero, and again around the mean where |mean| is so large that squares around zero lost digits.

    XLA:CPU leaves sums of x and of its square to a library, which takes half the time of sums around any other number;
    a loop costs nothing where it does not run. Features that are not last may be on several devices (ghost groups), and
    would have to agree on the loop: for them, sums around the mean at once.
    """
    rows = long_rows(x, axes) if weights is None else Rows(x.shape, axes)

    def total(number, power, *shift):
        part, *center = unfused((rows.lay(x), *shift), number)
        c = at_least_float32(part)
        c = power(c - rows.broadcast(center[0]) if center else c)
        return rows.sum(c) if weights is None else weighted_sum(c, weights, axes)

    def around_mean(first):
        mean = finite_or_zero(safe_divide(first, count))
        unit = unit_near(mean)
        return Sums(unit, mean, total(3, itself, mean), total(4, lambda c: squared(rows.broadcast(unit) * c), mean))

    def again(state):
        wrong, sums = state
        return jnp.zeros_like(wrong), around_mean(sums.first)

    first, second = total(1, itself), total(2, squared)
    if 0 not in axes:
        return around_mean(first)
    sums = Sums(jnp.ones_like(second), jnp.zeros_like(first), first, second)
    return lax.while_loop(lambda state: state[0], again, (_lost(sums, count), sums))[1]


def itself(c):
    return c


def _lost(sums, count):
    """Whether squares of any feature lost more than (1 + _MAX_RATIO**2) roundings of its variance, or overflowed."""
    offset, square = safe_divide(sums.first, count), safe_divide(sums.second, count)
    return jnp.any((square > (1 + _MAX_RATIO**2) * (square - squared(offset))) | jnp.isinf(square))


def output_tangent_on_cpu(spec, x, residual, weights, vectors, dx, dresidual):
    """activation'(y) (gain dx + dresidual + shift + slope (x - mean)), as `_output_tangent` of `_normalize`.

    The terms are kept separate, so that what they transpose to are sums in which XLA:CPU reads cotangent and x as they
    are. Without an activation each is rounded by itself, and sums take long rows, half the time where features are few.
    With one the cotangent, times its derivative, has to be written first, and long rows gain nothing.
    """
    mean, gain_of_y, offset_of_y, gain, shift, slope = vectors
    alone = spec.activation is None
    rows = long_rows(x, spec.axes) if alone and weights is None else Rows(x.shape, spec.axes)
    first = rows.broadcast(gain) * at_least_float32(rows.lay(dx))
    first = first if dresidual is None else first + at_least_float32(rows.lay(dresidual))
    second = jnp.broadcast_to(rows.broadcast(shift), first.shape)
    x_again, mean_again, slope = unfused((rows.lay(x), mean, slope), 4)
    third = at_least_float32(x_again) - rows.broadcast(mean_again)
    third = rows.broadcast(slope) * silenced(third, weights)
    terms = [v.astype(spec.dtype) if alone else v for v in (first, second, third)]
    first, second, third = (unfused(v, number) for number, v in enumerate(terms))
    dy = rows.back(first + second + third)
    if not alone:
        y = before_activation(unfused(x, 5), mean, gain_of_y, offset_of_y, residual, weights, spec.axes)
        dy = jax.jvp(spec.activation, (y,), (dy,))[1]
    return dy.astype(spec.dtype)
