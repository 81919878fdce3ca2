"""Layer normalization: every example by its own mean and variance over its units."""

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._affine import Activation, Initializer, scale_shift
from jaxbn._axis_group import axis_group_of
from jaxbn._checks import check_several, checked_epsilon
from jaxbn._factory import normalizer_factory
from jaxbn._inputs import canonical_axes, stats_dtype
from jaxbn._normalize import batch_normalize
from jaxbn._normalizer import Normalizer
from jaxbn.variants._each_example import each_example_norm


@normalizer_factory
def layer_norm(
    *,
    axis: int | Sequence[int] = -1,
    feature_axis: int | Sequence[int] | None = None,
    epsilon: float = 1e-5,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
    use_scale: bool = True,
    use_bias: bool = True,
    scale_init: Initializer = jax.nn.initializers.ones,
    bias_init: Initializer = jax.nn.initializers.zeros,
    dtype: jax.typing.DTypeLike | None = None,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    activation: Activation | None = None,
) -> Normalizer:
    """Layer normalization (Ba, Kiros and Hinton 2016, equations 3 and 4).

    It keeps no running statistics: training and evaluation compute the same.

    y = scale * (x - mean) / sqrt(var + epsilon) + bias with mean and var over `axis`, one pair per example (and per
    position, where x has more axes). `apply` also takes `residual`, an array of x's shape added before the activation.

    Args:
      axis: the axis or axes *reduced*.
      feature_axis: the axis or axes along which scale and bias run; None takes those of `axis`, as the paper has it.
      epsilon: added to the variance, inside the square root; the paper has none, 1e-5 is torch's.
      axis_name: named axis over which `axis` is sharded: statistics are pooled over its shards.
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
      ValueError: a negative epsilon; and from apply, one value to normalize over, or scale and bias of another shape.
    """
    checked_epsilon(epsilon)

    def compute(x, params, weights, residual):
        axes = canonical_axes(axis, x.ndim)
        check_several(x, axes, axis_group_of(axis_name, None))
        how: dict[str, Any] = dict(axis=axes, epsilon=epsilon, axis_name=axis_name, dtype=stats_dtype(x))
        xhat, _ = batch_normalize(x, weights=weights, **how)
        return scale_shift(
            xhat, params.get("scale"), params.get("bias"), residual, activation, jnp.dtype(dtype or x.dtype)
        )

    return each_example_norm(
        compute,
        {"scale": scale_init if use_scale else None, "bias": bias_init if use_bias else None},
        feature_axis=axis if feature_axis is None else feature_axis,
        param_dtype=param_dtype,
        check=lambda x: canonical_axes(axis, len(x.shape)),
    )
