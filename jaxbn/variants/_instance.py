"""Instance normalization: every feature map of every example by itself."""

from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp

from jaxbn._affine import Activation, Initializer, affine_of
from jaxbn._axis_group import axis_group_of
from jaxbn._checks import check_several, checked, checked_epsilon
from jaxbn._factory import normalizer_factory
from jaxbn._inputs import canonical_axes, feature_shape, inexact, reduced_axes
from jaxbn._normalize import batch_normalize
from jaxbn._normalizer import Normalizer


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
    """Instance normalization (Ulyanov, Vedaldi and Lempitsky 2016, section 2); no running state, both modes alike.

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
    affine = affine_of(use_scale, use_bias, scale_init, bias_init, param_dtype)

    def init(key, x):
        _kept(len(x.shape))
        return {"params": affine.init(key, feature_shape(x, feature_axis)), "batch_stats": {}}

    def apply(variables, x, *, train, where=None, weights=None, rng=None, residual=None):
        del rng
        x = inexact(x)
        shape = feature_shape(x, feature_axis)
        params, batch_stats = checked(variables, x, train, feature_axis, affine.shapes(shape), {})
        axes = reduced_axes(x.ndim, _kept(x.ndim))
        check_several(x, axes, axis_group_of(axis_name, None))
        scale, bias = (_with_batch(params.get(name), x.ndim) for name in ("scale", "bias"))
        batch = dict(where=where, weights=weights, axis_name=axis_name, residual=residual)
        y, _ = batch_normalize(x, scale, bias, axis=axes, epsilon=epsilon, activation=activation, dtype=dtype, **batch)
        return y, batch_stats

    def _kept(ndim):
        features = canonical_axes(feature_axis, ndim, "feature_axis")
        return canonical_axes(
            features + canonical_axes(batch_axis, ndim, "batch_axis"), ndim, "batch_axis, feature_axis"
        )

    def _with_batch(v, ndim):
        # Ones for the batch axes, in the order of the axes kept: the shape of the statistics that it broadcasts to.
        batch = canonical_axes(batch_axis, ndim, "batch_axis")
        return None if v is None else jnp.expand_dims(v, [i for i, a in enumerate(_kept(ndim)) if a in batch])

    return Normalizer(init, apply)
