"""Root-mean-square normalization: divide by the size, leave the mean alone."""

from collections.abc import Hashable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxbn._affine import Activation, Initializer, scale_shift
from jaxbn._arithmetic import at_least_float32, inner, safe_divide, weighted_sum
from jaxbn._axis_group import AxisGroup, axis_group_of
from jaxbn._checks import checked_epsilon
from jaxbn._factory import normalizer_factory
from jaxbn._inputs import canonical_axes, size_of
from jaxbn._measure import STATISTICS
from jaxbn._normalizer import Normalizer
from jaxbn._padding import silenced
from jaxbn.variants._each_example import each_example_norm

# x is divided by 1024, which is exact, before it is squared: sums over millions of values of 1e18 fit in float32.
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
    """RMSNorm (Zhang and Sennrich 2019, equation 4).

    It keeps no running statistics: training and evaluation compute the same.

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

    def compute(x, params, weights, residual):
        axes, axis_group = canonical_axes(axis, x.ndim), axis_group_of(axis_name, None)
        xhat = root_mean_square_normalize(silenced(x, weights), jnp.asarray(epsilon), weights, axes, axis_group)
        return scale_shift(xhat, params.get("scale"), None, residual, activation, jnp.dtype(dtype or x.dtype))

    return each_example_norm(
        compute,
        {"scale": scale_init if use_scale else None},
        feature_axis=axis if feature_axis is None else feature_axis,
        param_dtype=param_dtype,
        check=lambda x: canonical_axes(axis, len(x.shape)),
    )


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def root_mean_square_normalize(
    x: jax.Array, epsilon: jax.Array, weights: jax.Array | None, axes: tuple[int, ...], axis_group: AxisGroup
) -> jax.Array:
    """`x / sqrt(mean(|x|**2) + epsilon)`, float32 at least; where nothing counts the mean square is 0.

    The derivative rule is written in units of the output, since 1 / rms**3 would leave the range of float32.

    Args:
      x: floating or complex array.
      epsilon: real, a scalar or broadcastable to x with 1 for `axes`; differentiable.
      weights: as `combined_weights` makes them.
      axes: reduced.
      axis_group: shards that share the mean.
    """
    return at_least_float32(x) * _inverse_root(x, epsilon, weights, axes, axis_group)[0]


@root_mean_square_normalize.defjvp
def _root_mean_square_jvp(axes, axis_group, primals, tangents):
    x, epsilon, weights = primals
    dx, depsilon, _ = tangents
    # By this name the policies of `jax.checkpoint` keep it, and the backward pass measures nothing again.
    inverse, share = checkpoint_name(_inverse_root(x, epsilon, weights, axes, axis_group), STATISTICS)
    y = at_least_float32(x) * inverse
    du = at_least_float32(dx) * inverse
    total = axis_group.psum(weighted_sum(inner(y, du), weights, axes))
    mean = jnp.expand_dims(total, axes) * share + 0.5 * depsilon * inverse**2
    return y, du - y * mean


def _inverse_root(x, epsilon, weights, axes, axis_group):
    """1 / sqrt(mean(|x|**2) + epsilon), and 1 / count, over axes and shards; the axes stay, with length 1."""
    small = at_least_float32(x) * _ROOM
    squares = weighted_sum(inner(small, small), weights, axes)
    if weights is None:
        total, count = axis_group.psum(squares), jnp.asarray(size_of(x.shape, axes) * axis_group.size(), squares.dtype)
    else:
        total, count = axis_group.psum((squares, jnp.sum(jnp.broadcast_to(weights, x.shape), axes)))
    share = safe_divide(jnp.ones_like(count), count)
    total, share = (jnp.expand_dims(jnp.broadcast_to(v, total.shape), axes) for v in (total, share))
    return lax.rsqrt(total * share + epsilon * _ROOM**2) * _ROOM, share
