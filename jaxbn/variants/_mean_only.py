"""Mean-only batch normalization: center by the batch, and leave the scale to the weights."""

from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._affine import Activation, Initializer, affine_of, scale_shift
from jaxbn._axis_group import axis_group_of
from jaxbn._checks import check_decay, check_several, checked
from jaxbn._factory import normalizer_factory
from jaxbn._inputs import along, combined_weights, feature_shape, inexact, reduced_axes, stats_dtype
from jaxbn._measure import centered, measure_groups
from jaxbn._moments import Moments
from jaxbn._normalizer import Normalizer
from jaxbn._padding import at_running_mean, silenced
from jaxbn._recording import MeasuringNormalizer, running_normalizer
from jaxbn._running import over_all_groups, update_batch_stats


@normalizer_factory
def mean_only_batch_norm(
    *,
    decay: float = 0.99,
    feature_axis: int | Sequence[int] = -1,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    use_bias: bool = True,
    bias_init: Initializer = jax.nn.initializers.zeros,
    dtype: jax.typing.DTypeLike | None = None,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    activation: Activation | None = None,
    skip_nonfinite: bool = True,
) -> Normalizer:
    """Mean-only batch norm (Salimans and Kingma 2016, section 4): y = x - mean + bias.

    It leaves the variance to the weights, which `weight_norm` keeps at a learned size. In training mean is the batch's
    and gradients flow through it, which centres them; at test time it is the running one. `apply` also takes
    `residual`, an array of x's shape added before the activation.

    Args:
      decay: of the running mean: new = decay * old + (1 - decay) * batch.
      feature_axis: the axis or axes kept.
      axis_name: named axis, or tuple of them, whose shards share the mean.
      axis_index_groups: groups of indices on `axis_name` that share it.
      use_bias: learn a bias.
      bias_init: bias_init(key, shape, dtype), zeros.
      dtype: of the output; None is the input's.
      param_dtype: of the bias.
      activation: elementwise function applied last.
      skip_nonfinite: a batch whose mean is not finite leaves the running mean alone.

    Returns:
      A Normalizer with params {"bias"} and batch_stats {"mean"}, both of the features' shape.

    Raises:
      ValueError: decay outside [0, 1]; and from apply, shapes that do not fit, or one value per feature in training.
    """
    check_decay(decay)
    axis_group = axis_group_of(axis_name, axis_index_groups)
    affine = affine_of(False, use_bias, jax.nn.initializers.ones, bias_init, param_dtype)

    def init(key, x):
        shape = feature_shape(x, feature_axis)
        return {"params": affine.init(key, shape), "batch_stats": {"mean": jnp.zeros(shape, stats_dtype(x))}}

    def read(variables, x, train):
        shape = feature_shape(x, feature_axis)
        params, batch_stats = checked(variables, x, train, feature_axis, affine.shapes(shape), {"mean": shape})
        return along(params.get("bias"), x.ndim, feature_axis), lax.stop_gradient(batch_stats["mean"])

    def finish(c, bias, residual, x):
        return scale_shift(c, None, bias, residual, activation, jnp.dtype(dtype or x.dtype))

    def evaluate(variables, x, *, where, weights, rng=None, residual=None):
        del rng
        x = inexact(x)
        bias, mean = read(variables, x, False)
        c = at_running_mean(x, mean, where, weights, feature_axis) - along(mean, x.ndim, feature_axis)
        return finish(c, bias, residual, x)

    def train(variables, x, *, where, weights, rng=None, residual=None):
        del rng
        x = inexact(x)
        bias, _ = read(variables, x, True)
        axes = reduced_axes(x.ndim, feature_axis)
        check_several(x, axes, axis_group, "Train on more examples, or use train=False.")
        weights = combined_weights(x, where, weights)
        rows = measure_groups(x, weights, axes, axis_group)
        c = silenced(centered(x, axis_group.select_group(rows), axes), weights)
        return finish(c, bias, residual, x), over_all_groups(lax.stop_gradient(rows), axis_group)

    def _update(batch_stats, measured):
        # The variance is not used, so a variance that overflows must not make the batch be refused.
        moments = Moments(measured.count, measured.mean, jnp.zeros_like(measured.var))
        return update_batch_stats(batch_stats, moments, decay=decay, skip_nonfinite=skip_nonfinite)

    measuring = MeasuringNormalizer(init, train, evaluate)
    everyone = axis_group._replace(groups=None)
    return running_normalizer(measuring, _update, feature_axis=feature_axis, axis_group=everyone)
