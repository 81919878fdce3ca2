"""Root-mean-square normalization: divide by the size, leave the mean alone."""

from collections.abc import Hashable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._affine import Activation, Initializer, affine_of, scale_shift
from jaxbn._arithmetic import at_least_float32, inner, weighted_sum
from jaxbn._axis_group import AxisGroup, axis_group_of
from jaxbn._checks import checked, checked_epsilon
from jaxbn._factory import normalizer_factory
from jaxbn._inputs import along, canonical_axes, combined_weights, feature_shape, inexact, size_of
from jaxbn._normalizer import Normalizer

# Squares are summed of x / 1024, which is exact, so that the sum over millions of values of 1e18 stays in float32.
_ROOM = 2.0**-10


@normalizer_factory
def rms_norm(
    *,
    axis: int | Sequence[int] = -1,
    feature_axis: int | Sequence[int] | None = None,
    epsilon: float = 1e-6,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
    use_scale: bool = True,
    scale_init: Initializer = jax.nn.initializers.ones,
    dtype: jax.typing.DTypeLike | None = None,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    activation: Activation | None = None,
) -> Normalizer:
    """RMSNorm (Zhang and Sennrich 2019, equation 4); no running state, both modes alike.

    y = scale * x / sqrt(mean(x**2) + epsilon) with the mean over `axis`. `apply` also takes `residual`, an array of x's
    shape added before the activation.

    Args:
      axis: the axis or axes *reduced*.
      feature_axis: the axis or axes along which scale runs; None takes those of `axis`.
      epsilon: added to the mean square, inside the square root; the paper has none, 1e-6 is Flax's.
      axis_name: named axis over which `axis` is sharded: squares are pooled over its shards.
      use_scale: learn a scale.
      scale_init: scale_init(key, shape, dtype), ones.
      dtype: of the output; None is the input's.
      param_dtype: of scale.
      activation: elementwise function applied last.

    Returns:
      A Normalizer with params {"scale"} of the features' shape and batch_stats {}.

    Raises:
      ValueError: a negative epsilon; and from apply, a scale of another shape.
    """
    checked_epsilon(epsilon)
    affine = affine_of(use_scale, False, scale_init, jax.nn.initializers.zeros, param_dtype)
    feature_axis = axis if feature_axis is None else feature_axis

    def init(key, x):
        canonical_axes(axis, len(x.shape))
        return {"params": affine.init(key, feature_shape(x, feature_axis)), "batch_stats": {}}

    def apply(variables, x, *, train, where=None, weights=None, rng=None, residual=None):
        del rng
        x = inexact(x)
        shapes = affine.shapes(feature_shape(x, feature_axis))
        params, batch_stats = checked(variables, x, train, feature_axis, shapes, {})
        weights = combined_weights(x, where, weights)
        axes = canonical_axes(axis, x.ndim)
        xhat = root_mean_square_normalize(x, jnp.asarray(epsilon), weights, axes, axis_group_of(axis_name, None))
        scale = along(params.get("scale"), x.ndim, feature_axis)
        return scale_shift(xhat, scale, None, residual, activation, jnp.dtype(dtype or x.dtype)), batch_stats

    return Normalizer(init, apply)


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def root_mean_square_normalize(
    x: jax.Array, epsilon: jax.Array, weights: jax.Array | None, axes: tuple[int, ...], axis_group: AxisGroup
) -> jax.Array:
    """X / sqrt(mean(|x|**2) + epsilon), float32 at least; where nothing counts the mean square is 0.

    The derivative rule is written in units of the output, since 1 / rms**3 would leave the range of float32.

    Args:
      x: floating or complex array.
      epsilon: real, a scalar or broadcastable to x with 1 for `axes`; differentiable.
      weights: as `combined_weights` makes them.
      axes: reduced.
      axis_group: shards that share the mean.
    """
    return at_least_float32(x) * _inverse_root(x, epsilon, weights, axes, axis_group)


@root_mean_square_normalize.defjvp
def _root_mean_square_jvp(axes, axis_group, primals, tangents):
    x, epsilon, weights = primals
    dx, depsilon, _ = tangents
    inverse = _inverse_root(x, epsilon, weights, axes, axis_group)
    y = root_mean_square_normalize(*primals, axes, axis_group)
    du = at_least_float32(dx) * inverse
    mean = _mean(inner(y, du), weights, axes, axis_group) + 0.5 * depsilon * inverse**2
    return y, du - y * mean


def _inverse_root(x, epsilon, weights, axes, axis_group):
    small = at_least_float32(x) * _ROOM
    return lax.rsqrt(_mean(inner(small, small), weights, axes, axis_group) + epsilon * _ROOM**2) * _ROOM


def _mean(values, weights, axes, axis_group):
    """Weighted mean over axes and shards, which stay as axes of length 1."""
    if weights is None:
        count, total = size_of(values.shape, axes) * axis_group.size(), axis_group.psum(jnp.sum(values, axes))
        return jnp.expand_dims(total / count, axes)
    count = jnp.sum(jnp.broadcast_to(weights, values.shape), axes)
    count, total = axis_group.psum((count, weighted_sum(values, weights, axes)))
    return jnp.expand_dims(jnp.where(count == 0, 0, total / jnp.where(count == 0, 1, count)), axes)
