"""Instance normalization: every feature map of every example by itself."""

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._affine import Activation, Initializer
from jaxbn._axis_group import axis_group_of
from jaxbn._checks import check_several, checked_epsilon
from jaxbn._factory import normalizer_factory
from jaxbn._inputs import canonical_axes, reduced_axes
from jaxbn._normalize import batch_normalize
from jaxbn._normalizer import Normalizer
from jaxbn.variants._each_example import each_example_norm


@normalizer_factory
def instance_norm(
    *,
    epsilon: float = 1e-5,
    feature_axis: int | Sequence[int] = -1,
    batch_axis: int | Sequence[int] = 0,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
    use_scale: bool = True,
    use_bias: bool = True,
    scale_init: Initializer = jax.nn.initializers.ones,
    bias_init: Initializer = jax.nn.initializers.zeros,
    dtype: jax.typing.DTypeLike | None = None,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    activation: Activation | None = None,
) -> Normalizer:
    """Instance normalization (Ulyanov, Vedaldi and Lempitsky 2016, section 2).

    It keeps no running statistics: training and evaluation compute the same.

    y = scale * (x - mean) / sqrt(var + epsilon) + bias with mean and var over the positions, which are all axes but
    those of batch and features. `apply` also takes `residual`, an array of x's shape added before the activation.

    Args:
      epsilon: added to the variance, inside the square root.
      feature_axis: the axis or axes along which scale and bias run.
      batch_axis: the axis or axes of the examples.
      axis_name: named axis over which the positions are sharded: statistics are pooled over its shards.
      use_scale: learn a scale.
      use_bias: learn a bias.
      scale_init: scale_init(key, shape, dtype), ones.
      bias_init: bias_init(key, shape, dtype), zeros.
      dtype: of the output; None is the input's.
      param_dtype: of scale and bias.
      activation: elementwise function applied last.

    Returns:
      A Normalizer with params {"scale", "bias"} of the features' shape and batch_stats {}.

    Raises:
      ValueError: a negative epsilon; and from apply, a single position, or scale and bias of another shape.
    """
    checked_epsilon(epsilon)

    def kept(ndim):
        features = canonical_axes(feature_axis, ndim, "feature_axis")
        batch = canonical_axes(batch_axis, ndim, "batch_axis")
        return canonical_axes(features + batch, ndim, "batch_axis, feature_axis")

    def compute(x, params, weights, residual):
        axes = reduced_axes(x.ndim, kept(x.ndim))
        check_several(x, axes, axis_group_of(axis_name, None))
        # Shaped as the statistics: without the reduced axes, and with length 1 along the batch axes.
        scale, bias = (None if v is None else jnp.squeeze(v, axes) for v in map(params.get, ("scale", "bias")))
        how: dict[str, Any] = dict(axis=axes, epsilon=epsilon, axis_name=axis_name, dtype=dtype)
        y, _ = batch_normalize(x, scale, bias, weights=weights, residual=residual, activation=activation, **how)
        return y

    return each_example_norm(
        compute,
        {"scale": scale_init if use_scale else None, "bias": bias_init if use_bias else None},
        feature_axis=feature_axis,
        param_dtype=param_dtype,
        check=lambda x: kept(len(x.shape)),
    )
