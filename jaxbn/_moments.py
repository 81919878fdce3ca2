"""Mean and variance of an array over some of its axes, over its shards, and of two data sets put together."""

from collections.abc import Hashable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._axis_group import AxisGroup, axis_group_of
from jaxbn._cpu import Rows, long_rows, on_cpu, shared, unshared

# The largest |mean - shift| / std at which one pass of sums is kept: squaring loses (1 + ratio**2) roundings of var.
_MAX_RATIO = 2.0
# Each new shift leaves at most the rounding error of a sum, so the second is exact and the third only a reserve.
_MAX_SHIFTS = 3


class Moments(NamedTuple):
    """What one set of values says of each feature.

    Attributes:
      count: how many values each feature saw, or the sum of their weights: float32 at least, [] or [features].
      mean: [features], float32 at least; complex for complex values.
      var: the biased variance, mean(|x - mean|**2): [features], real, float32 at least.
    """

    count: jax.Array
    mean: jax.Array
    var: jax.Array


class Measured(NamedTuple):
    """Moments whose mean is kept as two floats: the exact mean is `mean + remainder`."""

    count: jax.Array
    mean: jax.Array
    remainder: jax.Array
    var: jax.Array

    @property
    def moments(self) -> Moments:
        """The same with the mean rounded to one float."""
        return Moments(self.count, self.mean, self.var)


def moments(
    x: jax.Array,
    axis: int | Sequence[int] | None = None,
    *,
    where: jax.Array | None = None,
    weights: jax.Array | None = None,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Moments:
    """Count, mean and biased variance of x over `axis`, exact however far the mean lies from zero.

    One pass over x where |mean| is at most 2 standard deviations or so; otherwise x is measured again from a shift
    near its mean, so that neither cancellation nor overflow of the squares costs digits (Chan, Golub and LeVeque 1983,
    section 3).

    Args:
      x: floating or complex array of any shape.
      axis: the axes to reduce, as in `jnp.mean`; None reduces all. The remaining axes are the features.
      where: boolean, broadcastable to x: True counts. What it leaves out may be anything, NaN included.
      weights: real, broadcastable to x: a weight of 2 counts as the same value twice. No gradient flows to them.
      axis_name: named axis, or tuple of them, over whose shards the values are pooled.
      axis_index_groups: groups of equal size of indices on `axis_name`; shards pool within their group.

    Returns:
      Moments of shape [features], float32 at least. A feature that saw nothing has count, mean and var 0.

    Raises:
      TypeError: x is not floating or complex, or `where` is not boolean.
      ValueError: an axis out of range or named twice, `where` or `weights` that do not broadcast, an axis name that
        is not bound.
    """
    x = inexact(x)
    axis_group = axis_group_of(axis_name, axis_index_groups)
    return measure(x, combined_weights(x, where, weights), canonical_axes(axis, x.ndim), axis_group).moments


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Moments of the values behind `a` and the values behind `b` put together, exactly.

    mean = mean_a + (mean_b - mean_a) n_b / n; var = (n_a var_a + n_b var_b) / n + |mean_b - mean_a|**2 n_a n_b / n**2
    (Chan, Golub and LeVeque 1983, equation 2.1). Zero count is the neutral element; two of them give zeros.

    Args:
      a: Moments of any shape.
      b: Moments of the same or a broadcastable shape.
    """
    count = a.count + b.count
    share_a, share_b = safe_divide(a.count, count), safe_divide(b.count, count)
    apart = b.mean - a.mean
    mean = jnp.where(share_b == 1, b.mean, a.mean + apart * share_b)
    var = a.var * share_a + b.var * share_b + _squared(apart) * share_a * share_b
    return Moments(count, mean, var)


def pool_moments(m: Measured, axis: int | Sequence[int], axis_group: AxisGroup = AxisGroup()) -> Measured:  # noqa: B008
    """Moments of many sets put together: those along `axis` of m, and those of all shards; measured as x itself is."""
    shifted = partial(_shifted_pool, m, axis, axis_group)
    return _until_kept(shifted, shifted(None))


def _shifted_pool(m, axis, axis_group, shift):
    c = (m.mean if shift is None else m.mean - jnp.expand_dims(shift, axis)) + m.remainder
    std = jnp.sqrt(m.var)
    if shift is not None:
        peak = axis_group.total(jnp.max(jnp.where(m.count == 0, 0, jnp.maximum(jnp.abs(c), std)), axis))
        unit = _unit(peak)
        c, std = (v / jnp.expand_dims(unit, axis) for v in (c, std))
    count = jnp.broadcast_to(m.count, std.shape)
    sums = count, count * c, count * (_squared(std) + _squared(c))
    sums = axis_group.total(jax.tree.map(lambda v: jnp.sum(v, axis), sums))
    return _from_sums(*sums, shift, None if shift is None else unit)


def measure(x: jax.Array, weights: jax.Array | None, axes: tuple[int, ...], axis_group: AxisGroup) -> Measured:
    """Moments of x over `axes`, its mean as two floats; weights as `combined_weights` makes them."""
    return axis_group.own(measure_groups(x, weights, None, axes, axis_group))


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def measure_groups(
    x: jax.Array,
    weights: jax.Array | None,
    guess: jax.Array | None,
    axes: tuple[int, ...],
    axis_group: AxisGroup,
) -> Measured:
    """`measure` for every group of shards: as `axis_group.total` gives it.

    The guess, a mean near that of x (the running one), saves a pass where the mean is far from zero. It changes
    roundings only. Shards that share statistics would have to share it: without axis names alone.
    """
    if axis_group.axis_name is not None or weights is not None:
        guess = None  # Under weights XLA would send the count, the same in both branches, in a collective of its own.
    if axis_group.branch:
        return _measure_until_kept(x, weights, guess, axes, axis_group)
    shifted = partial(_shifted, x, weights, axes, axis_group)
    mean = shifted(None)[0].mean
    # Where it can, a compiler fuses the division that made the mean with the addition of an offset to it, and the mean
    # that is subtracted from x is not the one that is reported. A select stands in its way; a loop does too.
    return shifted(jnp.where(jnp.isfinite(mean), mean, 0))[0]


# Compiled once a shape: called op by op, a loop whose body is a new closure would be compiled at every call.
@partial(jax.jit, static_argnums=(3, 4))
def _measure_until_kept(x, weights, guess, axes, axis_group) -> Measured:
    shifted = partial(_shifted, x, weights, axes, axis_group)
    return _until_kept(shifted, _first(shifted, guess))


def _first(shifted, guess):
    """Sums from the mean that is guessed: free where the subtraction is fused into the sum.

    On a CPU sums from zero are those that libraries have fastest.
    """
    if guess is None:
        return shifted(None)
    near = partial(shifted, in_units=False)
    return lax.platform_dependent(guess, cpu=lambda _: shifted(None), default=near)


def _until_kept(shifted, first) -> Measured:
    """shifted(shift) -> (Measured, retry): the first, or one from the mean so far until digits are kept."""

    def again(state):
        step, (measured, _) = state
        return step + 1, shifted(measured.mean)

    return lax.while_loop(lambda s: (s[0] < _MAX_SHIFTS) & s[1][1], again, (0, first))[1][0]


def _shifted(x, weights, axes, axis_group, shift, in_units=True) -> tuple[Measured, jax.Array]:
    """Moments from the sums of c and |c|**2 for c = x - shift, and whether they lost too much to be kept."""
    # The first sums take their chance; done again they are in units of the peak, whose squares cannot overflow.
    unit = None
    if shift is not None and in_units:
        # Tied to what changes from step to step, x is not converted outside of a loop that hardly ever runs.
        x, _ = lax.optimization_barrier((x, shift))
        unit = _peak_unit(x, shift, weights, axes, axis_group)
    return _from_sums(*_sums(x, shift, unit, weights, axes, axis_group), shift, unit)


def _from_sums(count, first, second, shift, unit) -> tuple[Measured, jax.Array]:
    offset, square = safe_divide(first, count), safe_divide(second, count)
    lost = square > (1 + _MAX_RATIO**2) * (square - _squared(offset))
    var = jnp.maximum(square - _squared(offset), 0)
    if unit is not None:
        offset, var = offset * unit, var * unit * unit
    shift = jnp.zeros_like(offset) if shift is None else shift
    mean = shift + offset
    # No float lies nearer to the mean than such a shift does.
    settled = mean == shift
    retry = jnp.any((lost & ~settled) | jnp.isinf(second))
    return Measured(count, mean, (shift - mean) + offset, var), retry


def _sums(x, shift, unit, weights, axes, axis_group):
    """Count, sum of c = (x - shift) / unit and of |c|**2, the last two [features], over axes and shards, in one go."""
    shift, unit = (None if v is None else axis_group.own(v) for v in (shift, unit))
    short = Rows(x.shape, axes)
    long = long_rows(x.shape, axes) if weights is None else short
    sums = partial(_local_sums, weights)
    first, second = on_cpu(partial(sums, long, unshared), partial(sums, short, shared), x, shift, unit)
    if weights is None:
        count = jnp.asarray(size_of(x.shape, axes) * axis_group.size(), second.dtype)
        first, second = axis_group.total((first, second))
        return count if axis_group.groups is None else jnp.broadcast_to(count, second.shape), first, second
    count = jnp.sum(weights, axes) * size_of(x.shape, [a for a in axes if weights.shape[a] == 1])
    count = jnp.broadcast_to(count, second.shape).astype(second.dtype)
    return axis_group.total((count, first, second))


def _local_sums(weights, rows, apart, x, shift, unit):
    """Sums of c and |c|**2 over the rows; apart(arrays, number) keeps one sum from sharing them with the other."""

    def deviation(number):
        part, *vectors = apart((rows.lay(x), shift, unit), number)
        return _deviation(part, *(None if v is None else rows.spread(v) for v in vectors))

    c, again = deviation(1), _squared(deviation(2))
    if weights is None:
        return rows.total(c), rows.total(again)
    return weighted_sum(c, weights, rows.axes), weighted_sum(again, weights, rows.axes)


def _deviation(x, shift, unit):
    """(x - shift) / unit."""
    c = at_least_float32(x) if shift is None else at_least_float32(x) - shift
    return c if unit is None else c / unit


def weighted_sum(values: jax.Array, weights: jax.Array | None, axes: tuple[int, ...]) -> jax.Array:
    """Sum of weights * values over axes, in which a weight of zero silences even a NaN."""
    if weights is None:
        return jnp.sum(values, axes)
    return jnp.sum(jnp.where(weights == 0, 0, weights * values), axes)


def _peak_unit(x, shift, weights, axes, axis_group):
    """Power of two near the largest |c| of each feature; the shards' peaks are summed, which bounds their maximum."""
    c = _deviation(x, jnp.expand_dims(axis_group.own(shift), axes), None)
    size = jnp.abs(c) if weights is None else jnp.where(weights == 0, 0, jnp.abs(c))
    return _unit(axis_group.total(jnp.max(size, axes, initial=0)))


def _unit(peak):
    """Peak rounded to a power of two whose reciprocal is a normal number too."""
    limits = jnp.finfo(peak.dtype)
    peak = jnp.clip(peak, limits.smallest_normal, 1 / limits.smallest_normal)
    return lax.reduce_precision(peak, limits.nexp, 0)


@measure_groups.defjvp
def _measure_jvp(axes, axis_group, primals, tangents):
    x, weights, guess = primals
    measured = measure_groups(x, weights, guess, axes, axis_group)
    dmean, half_dvar = _mean_tangents(x, weights, measured, tangents[0], axes, axis_group)
    zero_count, zero_remainder = jnp.zeros_like(measured.count), jnp.zeros_like(measured.remainder)
    return measured, Measured(zero_count, dmean, zero_remainder, 2 * half_dvar)


@partial(jax.checkpoint, prevent_cse=False, static_argnums=(4, 5))
def _mean_tangents(x, weights, measured, dx, axes, axis_group):
    """mean(dx) and mean(Re(conj(x - mean) dx)); what is kept for the backward pass is x and three vectors."""
    return tangent_means(
        at_least_float32(dx), centered(x, axis_group.own(measured), axes), weights, measured.count, axes, axis_group
    )


def tangent_means(dx, c, weights, count, axes, axis_group):
    """mean(dx) and mean(Re(conj(c) dx)) over axes and shards, weighted, in one collective: as `axis_group.total`."""
    share = safe_divide(jnp.ones_like(count), count)
    # A NaN that has no weight is silenced here too: times the zero cotangent of its sum it would be NaN again.
    c = c if weights is None else jnp.where(weights == 0, 0, c)
    local = weighted_sum(dx, weights, axes), weighted_sum(inner(c, dx), weights, axes)
    first, second = axis_group.total(local)
    return first * share, second * share


def centered(x: jax.Array, measured: Measured, axes: tuple[int, ...]) -> jax.Array:
    """X minus its exact mean, float32 at least."""
    return (at_least_float32(x) - jnp.expand_dims(measured.mean, axes)) - jnp.expand_dims(measured.remainder, axes)


def at_least_float32(x: jax.Array) -> jax.Array:
    """X in float32 at least; float64 and complex stay."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def inner(a: jax.Array, b: jax.Array) -> jax.Array:
    """Re(conj(a) b), elementwise."""
    return a.real * b.real + a.imag * b.imag if jnp.iscomplexobj(a) or jnp.iscomplexobj(b) else a * b


def _squared(x):
    return inner(x, x)


def safe_divide(a, b):
    """A / b, and 0 where b is 0."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


def size_of(shape: Sequence[int], axes: Sequence[int]) -> int:
    """Number of values over `axes` of an array of that shape."""
    size = 1
    for axis in axes:
        size *= shape[axis]
    return size


def inexact(x, name: str = "x") -> jax.Array:
    """X as an array; TypeError unless floating or complex."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"{name} has dtype {x.dtype}; expected a floating or complex array: cast it, as in x.astype(jnp.float32)."
        )
    return x


def canonical_axes(axis: int | Sequence[int] | None, ndim: int, name: str = "axis") -> tuple[int, ...]:
    """Axes as sorted non-negative ints; ValueError where one is out of range or named twice."""
    if axis is None:
        return tuple(range(ndim))
    axes = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    if any(not -ndim <= a < ndim for a in axes):
        raise ValueError(f"{name}={axis} is out of range for an array of rank {ndim}; expected {-ndim} to {ndim - 1}.")
    canonical = tuple(sorted(a % ndim for a in axes))
    if len(set(canonical)) < len(canonical):
        raise ValueError(f"{name}={axis} names an axis of an array of rank {ndim} twice; name each axis once.")
    return canonical


def combined_weights(x: jax.Array, where, weights) -> jax.Array | None:
    """`where` and `weights` as one real array of x's rank, 1 or x's length along each axis, or None."""
    if where is None and weights is None:
        return None
    real = at_least_float32(x).real.dtype
    parts = []
    if where is not None:
        where = jnp.asarray(where)
        if where.dtype != bool:
            raise TypeError(f"where has dtype {where.dtype}; expected booleans. Pass real weights as weights=.")
        parts.append(_of_rank(where, x, "where").astype(real))
    if weights is not None:
        weights = jnp.asarray(weights)
        if jnp.iscomplexobj(weights):
            raise TypeError(f"weights have dtype {weights.dtype}; expected real numbers.")
        parts.append(_of_rank(weights, x, "weights").astype(real))
    # Constants by contract: without this a gradient of zero would be recorded for them.
    return lax.stop_gradient(parts[0] if len(parts) == 1 else parts[0] * parts[1])


def _of_rank(w, x, name):
    shape = (1,) * (x.ndim - w.ndim) + w.shape
    if w.ndim > x.ndim or any(a not in (1, b) for a, b in zip(shape, x.shape, strict=True)):
        raise ValueError(
            f"{name} of shape {w.shape} does not broadcast to x of shape {x.shape}; for one entry an example along the"
            f" first axis give it shape {(x.shape[0] if x.ndim else 1, *(1,) * (x.ndim - 1))}."
        )
    return w.reshape(shape)
