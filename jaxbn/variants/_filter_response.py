"""Filter response normalization with its thresholded linear unit."""

from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp

from jaxbn._affine import Activation, Initializer, scale_shift
from jaxbn._axis_group import axis_group_of
from jaxbn._checks import checked_epsilon
from jaxbn._factory import normalizer_factory
from jaxbn._inputs import canonical_axes, reduced_axes, size_of
from jaxbn._normalizer import Normalizer
from jaxbn._padding import silenced
from jaxbn.variants._each_example import each_example_norm
from jaxbn.variants._root_mean_square import root_mean_square_normalize

_SMALL = jax.nn.initializers.constant(1e-4)


@normalizer_factory
def filter_response_norm(
    *,
    epsilon: float = 1e-6,
    learn_epsilon: bool = False,
    use_threshold: bool = True,
    feature_axis: int | Sequence[int] = -1,
    batch_axis: int | Sequence[int] = 0,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
    use_scale: bool = True,
    use_bias: bool = True,
    scale_init: Initializer = jax.nn.initializers.ones,
    bias_init: Initializer = jax.nn.initializers.zeros,
    threshold_init: Initializer = jax.nn.initializers.zeros,
    epsilon_init: Initializer = _SMALL,
    dtype: jax.typing.DTypeLike | None = None,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    activation: Activation | None = None,
) -> Normalizer:
    """Filter response normalization (Singh and Krishnan 2020, section 3).

    It keeps no running statistics: training and evaluation compute the same.

    y = max(scale * x / sqrt(nu2 + epsilon) + bias, threshold), nu2 the mean of x**2 over the positions of one feature
    map of one example. The maximum is the paper's thresholded linear unit (TLU), which takes the place of a ReLU.
    `apply` also takes `residual`, an array of x's shape added before the maximum.

    Args:
      epsilon: added to nu2, inside the square root.
      learn_epsilon: add the absolute value of a parameter "epsilon" per feature to it. Needed where a feature map has
        one position: y would be scale * sign(x) + bias.
      use_threshold: apply the TLU, "threshold" in params.
      feature_axis: the axis or axes along which the parameters run.
      batch_axis: the axis or axes of the examples.
      axis_name: named axis over which the positions are sharded: squares are pooled over its shards.
      use_scale: learn a scale.
      use_bias: learn a bias.
      scale_init: scale_init(key, shape, dtype), ones.
      bias_init: bias_init(key, shape, dtype), zeros.
      threshold_init: threshold_init(key, shape, dtype), zeros, so that the TLU starts as a ReLU.
      epsilon_init: epsilon_init(key, shape, dtype), 1e-4.
      dtype: of the output; None is the input's.
      param_dtype: of the parameters.
      activation: elementwise function applied last, after the TLU.

    Returns:
      A Normalizer with params {"scale", "bias", "threshold", "epsilon"}, those in use, and batch_stats {}.

    Raises:
      ValueError: a negative epsilon; and from apply, one position without learn_epsilon, or params of another shape.
    """
    checked_epsilon(epsilon)

    def compute(x, params, weights, residual):
        scale, bias, threshold, learnt = map(params.get, ("scale", "bias", "threshold", "epsilon"))
        features = canonical_axes(feature_axis, x.ndim, "feature_axis")
        batch = canonical_axes(batch_axis, x.ndim, "batch_axis")
        axes = reduced_axes(x.ndim, features + batch, "batch_axis, feature_axis")
        axis_group = axis_group_of(axis_name, None)
        if not learn_epsilon and size_of(x.shape, axes) * axis_group.size() == 1:
            raise ValueError(
                f"x of shape {x.shape} has one position per feature map: y would be scale * sign(x) + bias; pass"
                " learn_epsilon=True."
            )
        total = jnp.asarray(epsilon) if learnt is None else epsilon + jnp.abs(learnt)
        xhat = root_mean_square_normalize(silenced(x, weights), total, weights, axes, axis_group)
        y = scale_shift(xhat, scale, bias, residual, None, xhat.dtype)
        y = y if threshold is None else jnp.maximum(y, threshold)
        y = y if activation is None else activation(y)
        return y.astype(dtype or x.dtype)

    params = {
        "scale": scale_init if use_scale else None,
        "bias": bias_init if use_bias else None,
        "threshold": threshold_init if use_threshold else None,
        "epsilon": epsilon_init if learn_epsilon else None,
    }
    return each_example_norm(compute, params, feature_axis=feature_axis, param_dtype=param_dtype, check=lambda x: None)
