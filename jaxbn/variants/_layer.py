"""Layer normalization: every example by its own mean and variance over its units."""

from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp

from jaxbn._affine import Activation, Initializer, affine_of, scale_shift
from jaxbn._axis_group import axis_group_of
from jaxbn._checks import check_several, checked, checked_epsilon
from jaxbn._factory import normalizer_factory
from jaxbn._inputs import along, canonical_axes, feature_shape, inexact, stats_dtype
from jaxbn._normalize import batch_normalize
from jaxbn._normalizer import Normalizer


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
    """Layer normalization (Ba, Kiros and Hinton 2016, equations 3 and 4); no running state, both modes alike.

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
    affine = affine_of(use_scale, use_bias, scale_init, bias_init, param_dtype)
    feature_axis = axis if feature_axis is None else feature_axis

    def init(key, x):
        canonical_axes(axis, len(x.shape))
        return {"params": affine.init(key, feature_shape(x, feature_axis)), "batch_stats": {}}

    def apply(variables, x, *, train, where=None, weights=None, rng=None, residual=None):
        del rng
        x = inexact(x)
        shape = feature_shape(x, feature_axis)
        params, batch_stats = checked(variables, x, train, feature_axis, affine.shapes(shape), {})
        axes = canonical_axes(axis, x.ndim)
        check_several(x, axes, axis_group_of(axis_name, None))
        batch = dict(where=where, weights=weights, axis_name=axis_name)
        xhat, _ = batch_normalize(x, axis=axes, epsilon=epsilon, dtype=stats_dtype(x), **batch)
        scale, bias = (along(params.get(name), x.ndim, feature_axis) for name in ("scale", "bias"))
        return scale_shift(xhat, scale, bias, residual, activation, jnp.dtype(dtype or x.dtype)), batch_stats

    return Normalizer(init, apply)
