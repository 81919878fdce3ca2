"""Standardize, scale and shift: with given statistics, or with the array's own and gradients through them."""

from collections.abc import Hashable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxbn._affine import Activation, before_activation, deviations
from jaxbn._arithmetic import at_least_float32, inner
from jaxbn._axis_group import AxisGroup, axis_group_of, varying_axes
from jaxbn._checks import check_features, check_residual, checked_epsilon
from jaxbn._cpu import forced, on_cpu, output_tangent_on_cpu
from jaxbn._inputs import canonical_axes, combined_weights, inexact
from jaxbn._measure import STATISTICS, measure_groups, tangent_means
from jaxbn._moments import Measured, Moments

# By this name, and `STATISTICS`, the policies of a `jax.checkpoint` know what the derivative rule keeps.
INPUT = "jaxbn_input"


def normalize(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    axis: int | Sequence[int] | None,
    epsilon: float,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """activation(scale * (x - mean) / sqrt(var + epsilon) + bias + residual), with given statistics.

    For the statistics of x itself use `batch_normalize`, which also subtracts what rounding the mean to one float lost.
    The backward pass keeps x and the vectors, nothing of the output's size.

    Args:
      x: floating or complex array.
      mean: [features]: x's shape without `axis`; or broadcastable to that with as many axes.
      var: as mean, real.
      scale: as mean; None is 1.
      bias: as mean; None is 0.
      axis: the axes over which the statistics are shared, as in `jnp.mean`; None means all.
      epsilon: added to var, inside the square root.
      activation: elementwise function applied last, before the output is rounded to `dtype`.
      residual: array of x's shape added before the activation: the shortcut of a residual network.
      dtype: of the output; None is x's.

    Raises:
      TypeError: x is not floating or complex.
      ValueError: an axis out of range, or statistics whose rank is not x's without `axis`.
    """
    x = inexact(x)
    axes = canonical_axes(axis, x.ndim)
    mean, var = jnp.asarray(mean), jnp.asarray(var)
    for name, value in (("mean", mean), ("var", var), ("scale", scale), ("bias", bias)):
        check_features(name, value, x, axes)
    check_residual(residual, x)
    spec = _Spec(axes, AxisGroup(), checked_epsilon(epsilon), activation, jnp.dtype(dtype or x.dtype))
    measured = Measured(jnp.zeros(()), mean, jnp.zeros_like(mean), var)
    return jax.checkpoint(_affine, prevent_cse=False, static_argnums=(6,))(
        x, measured, scale, bias, residual, None, spec
    )


def batch_normalize(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    axis: int | Sequence[int] | None,
    epsilon: float,
    where: jax.Array | None = None,
    weights: jax.Array | None = None,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> tuple[jax.Array, Moments]:
    """Normalize x by its own mean and variance over `axis`; gradients flow through both.

    y = activation(scale * (x - mean) / sqrt(var + epsilon) + bias + residual), every place of x included, those that
    `where` leaves out too (as if at the mean where such a place holds no finite number). All derivative modes and
    orders work. The backward pass keeps x, `residual` and vectors of the features' shape, recomputes the rest, and
    takes two sums and one pass over x, with one collective. The transform is that of Ioffe and Szegedy (2015,
    algorithm 1).

    Args:
      x: floating or complex array of any shape; float16 and bfloat16 are computed in float32.
      scale: [features], x's shape without `axis`, or broadcastable to that with as many axes; None is 1.
      bias: as scale; None is 0.
      axis: the axes to reduce, as in `jnp.mean`; None reduces all.
      epsilon: added to the variance, inside the square root.
      where: boolean mask of the values that count in the statistics; see `moments`.
      weights: real weights of the values in the statistics; see `moments`.
      axis_name: named axis, or tuple of them, whose shards share the statistics.
      axis_index_groups: groups of shards that share them; see `moments`.
      activation: elementwise function applied last, before the output is rounded to `dtype`.
      residual: array of x's shape added before the activation.
      dtype: of the output; None is x's.

    Returns:
      y of x's shape, and the Moments of x: float32 at least, [features].

    Raises:
      TypeError, ValueError: as `moments`, and for a scale, bias or residual of the wrong shape.
    """
    axis_group = axis_group_of(axis_name, axis_index_groups)
    how = dict(axis=axis, epsilon=epsilon, activation=activation, residual=residual, dtype=dtype)
    y, measured = normalize_by_batch(x, scale, bias, where=where, weights=weights, axis_group=axis_group, **how)
    return y, axis_group.select_group(measured.moments)


def normalize_by_batch(
    x, scale, bias, *, axis, epsilon, where, weights, axis_group, activation, residual, dtype
) -> tuple[jax.Array, Measured]:
    """`batch_normalize` for an AxisGroup; measured as `AxisGroup.psum` gives it."""
    x = inexact(x)
    axes = canonical_axes(axis, x.ndim)
    check_features("scale", scale, x, axes)
    check_features("bias", bias, x, axes)
    check_residual(residual, x)
    spec = _Spec(axes, axis_group, checked_epsilon(epsilon), activation, jnp.dtype(dtype or x.dtype), forced())
    return _standardize_jit(x, scale, bias, residual, combined_weights(x, where, weights), None, spec)


class _Spec(NamedTuple):
    """The static part of a normalization."""

    axes: tuple[int, ...]
    axis_group: AxisGroup
    epsilon: float
    activation: Activation | None
    dtype: jnp.dtype
    code: str | None = None  # As `_cpu.forced` says: a key of the cache of `_standardize_jit`.


def _affine(x, measured, scale, bias, residual, weights, spec):
    """The output, from given statistics; one pass over x."""
    own = spec.axis_group.select_group(measured)
    gain, offset = _gain_and_offset(own, scale, bias, spec)
    y = before_activation(x, own.mean, gain, offset, residual, weights, spec.axes)
    return (y if spec.activation is None else spec.activation(y)).astype(spec.dtype)


def _gain_and_offset(measured, scale, bias, spec):
    """Two vectors beside the mean and no more: compilers for GPUs then recompute y where it is used, not store it."""
    gain = lax.rsqrt(measured.var + spec.epsilon)
    gain = gain if scale is None else scale * gain
    return gain, -measured.remainder * gain if bias is None else bias - measured.remainder * gain


@partial(jax.custom_jvp, nondiff_argnums=(6,))
def _standardize(x, scale, bias, residual, weights, known, spec):
    """Output and statistics; `known` are the statistics where they have been measured already, else None."""
    measured = measure_groups(x, weights, spec.axes, spec.axis_group) if known is None else known
    return _affine(x, measured, scale, bias, residual, weights, spec), measured


@_standardize.defjvp
def _standardize_jvp(spec, primals, tangents):
    x, scale, bias, residual, weights, known = primals
    known = _statistics(x, weights, spec) if known is None else known
    # Naming `x` stops an outer checkpoint from saving it twice.
    x = checkpoint_name(x, INPUT)
    y, measured = _standardize(x, scale, bias, residual, weights, known, spec)
    dy, dmean, dvar = _tangent(spec, x, scale, bias, residual, weights, measured, *tangents[:4])
    zeros = jnp.zeros_like(measured.count), jnp.zeros_like(measured.remainder)
    return (y, measured), (dy, Measured(zeros[0], dmean, zeros[1], dvar))


# Layers of one shape are then traced and lowered once.
_standardize_jit = jax.jit(_standardize, static_argnums=(6,))


def _statistics(x, weights, spec):
    """Measured, by a name by which checkpoints save them; constants, for `_tangent` differentiates through them."""
    measured = measure_groups(lax.stop_gradient(x), weights, spec.axes, spec.axis_group)
    return checkpoint_name(measured, STATISTICS)


# dy = scale rstd (dx - mean(dx) - xhat mean(xhat dx)) + dscale xhat + dbias, where xhat = (x - mean) rstd
#    = gain dx + shift + slope (x - mean)                                          [batch, features]
#
#   gain  = scale rstd                                                             [features], as all below
#   slope = (dscale - gain mean(xhat dx)) rstd
#   shift = dbias - gain mean(dx)
#
# times the derivative of the activation. JAX transposes this into the least backward pass: two sums of the output's
# cotangent, which are the gradients of bias and scale too, and one elementwise pass. Statistics enter in units of the
# standard deviation, for the products of var itself leave the range of float32. The checkpoint keeps x and vectors.
@partial(jax.checkpoint, prevent_cse=False, static_argnums=(0,))
def _tangent(spec, x, scale, bias, residual, weights, measured, dx, dscale, dbias, dresidual):
    """Tangents of the output and of mean and var; vectors are [groups, features] where groups of shards share."""
    own, row = spec.axis_group.select_group, spec.axis_group.add_group_axis
    rstd = lax.rsqrt(measured.var + spec.epsilon)
    gain = rstd if scale is None else row(scale) * rstd
    xhat = deviations(x, own(measured.mean), weights, spec.axes) * jnp.expand_dims(own(rstd), spec.axes)
    mean_dx, mean_xhat_dx = tangent_means(
        at_least_float32(dx), xhat, weights, measured.count, spec.axes, spec.axis_group
    )
    mean_xhat_dx = mean_xhat_dx - inner(measured.remainder, mean_dx) * rstd  # The mean is two floats.
    parameters = [v for v in (gain, dbias, dscale) if v is not None]
    means = _varying_together((mean_dx, mean_xhat_dx), spec.axis_group, *parameters)
    shift = -gain * means[0] if dbias is None else row(dbias) - gain * means[0]
    slope = -gain * means[1] if dscale is None else row(dscale) - gain * means[1]
    gain, shift, slope = own((gain, *_varying_together((shift, slope), spec.axis_group, x)))
    slope = slope * own(rstd)
    shift = shift - slope * own(measured.remainder)
    statistics = own(measured)
    vectors = statistics.mean, *_gain_and_offset(statistics, scale, bias, spec), gain, shift, slope
    twins = output_tangent_on_cpu, _output_tangent
    dy = on_cpu(*(partial(twin, spec) for twin in twins), x, residual, weights, vectors, dx, dresidual)
    return dy, mean_dx, 2 * mean_xhat_dx / rstd


def _output_tangent(spec, x, residual, weights, vectors, dx, dresidual):
    """activation'(y) (gain dx + dresidual + shift + slope (x - mean)); y from the first three vectors."""
    mean, gain_of_y, offset_of_y, gain, shift, slope = vectors
    spread = partial(jnp.expand_dims, axis=spec.axes)
    dy = spread(gain) * at_least_float32(dx) + spread(shift)
    dy = dy + spread(slope) * deviations(x, mean, weights, spec.axes)
    dy = dy if dresidual is None else dy + at_least_float32(dresidual)
    if spec.activation is not None:
        y = before_activation(x, mean, gain_of_y, offset_of_y, residual, weights, spec.axes)
        dy = jax.jvp(spec.activation, (y,), (dy,))[1]
    return dy.astype(spec.dtype)


def _varying_together(tree, axis_group, *others):
    """Mark vectors as varying, as others do, in one step: their cotangents are then summed in one collective."""
    axes = tuple(_varying(others) - _varying(tree))
    if axis_group.axis_name is None or not axes:
        return tree
    shape = jnp.broadcast_shapes(*(v.shape for v in tree))
    stacked = jnp.stack([jnp.broadcast_to(v, shape) for v in tree])
    return tuple(lax.pcast(stacked, axes, to="varying"))


def _varying(vectors):
    return frozenset().union(*map(varying_axes, vectors))
