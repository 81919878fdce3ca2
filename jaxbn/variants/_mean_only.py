"""Mean-only batch normalization, and the weight normalization that it goes with."""

from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._affine import Activation, Initializer, affine_of, scale_shift
from jaxbn._axis_group import AxisGroup, axis_group_of
from jaxbn._checks import check_decay, check_several, checked, checked_epsilon
from jaxbn._factory import normalizer_factory
from jaxbn._inputs import along, canonical_axes, combined_weights, feature_shape, inexact, reduced_axes, stats_dtype
from jaxbn._measure import centered, measure_groups
from jaxbn._moments import Moments
from jaxbn._normalizer import Normalizer
from jaxbn._padding import at_running_mean, silenced
from jaxbn._recording import MeasuringNormalizer, running_normalizer
from jaxbn._running import over_all_groups, update_batch_stats
from jaxbn.variants._root_mean_square import root_mean_square_normalize


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
        rows = measure_groups(x, weights, None, axes, axis_group)
        c = silenced(centered(x, axis_group.select_group(rows), axes), weights)
        return finish(c, bias, residual, x), over_all_groups(lax.stop_gradient(rows), axis_group)

    def _update(batch_stats, moments):
        # The variance, which may overflow where the mean does not, is nobody's concern here.
        moments = Moments(moments.count, moments.mean, jnp.zeros_like(moments.var))
        return update_batch_stats(batch_stats, moments, decay=decay, skip_nonfinite=skip_nonfinite)

    measuring = MeasuringNormalizer(init, train, evaluate)
    everyone = axis_group._replace(groups=None)
    return running_normalizer(measuring, _update, feature_axis=feature_axis, axis_group=everyone)


def weight_norm(direction: jax.Array, gain: jax.Array, *, feature_axis: int = -1) -> jax.Array:
    """The kernel gain * direction / ||direction||, one norm per output feature (Salimans and Kingma 2016, equation 2).

    Args:
      direction: kernel of a dense layer or a convolution, its output features along `feature_axis`.
      gain: [features], the norms that the result has.
      feature_axis: of the kernel.

    Returns:
      A kernel of direction's shape and dtype; a direction of zeros gives zeros.

    Raises:
      ValueError: a gain of another shape.
    """
    if jnp.shape(gain) != feature_shape(direction, feature_axis):
        raise ValueError(f"gain has shape {jnp.shape(gain)}; the kernel, {direction.shape}, has one for each feature.")
    unit, _ = _split(direction, feature_axis)
    return (unit * along(gain, direction.ndim, feature_axis)).astype(direction.dtype)


def weight_norm_split(kernel: jax.Array, *, feature_axis: int = -1) -> tuple[jax.Array, jax.Array]:
    """The direction and gain that `weight_norm` makes this kernel of: the kernel itself, and its norms.

    Args:
      kernel: of a dense layer or a convolution, its output features along `feature_axis`.
      feature_axis: of the kernel.

    Returns:
      direction, the kernel, and gain, [features] of the same dtype.
    """
    return kernel, _split(kernel, feature_axis)[1].astype(kernel.dtype)


def weight_norm_init(
    gain: jax.Array, bias: jax.Array, measured: Moments, *, epsilon: float = 1e-5
) -> tuple[jax.Array, jax.Array]:
    """Gain and bias with which pre-activations start at mean 0 and variance 1 (Salimans and Kingma 2016, equation 6).

    The paper starts from gain 1 and bias 0; this holds for any: gain / std and (bias - mean) / std.

    Args:
      gain: [features].
      bias: [features].
      measured: of the pre-activations of a first batch under this gain and bias.
      epsilon: added to the variance, inside the square root.

    Returns:
      The new gain and bias.

    Raises:
      ValueError: a negative epsilon.
    """
    checked_epsilon(epsilon)
    inverse = lax.rsqrt(measured.var + epsilon)
    return (gain * inverse).astype(gain.dtype), ((bias - measured.mean) * inverse).astype(bias.dtype)


def _split(kernel, feature_axis):
    """Kernel over its norms, and the norms, over all axes but the features'; zero over zero is zero."""
    axes = tuple(a for a in range(kernel.ndim) if a not in canonical_axes(feature_axis, kernel.ndim, "feature_axis"))
    # Changes no norm of weights above 1e-11 or so, and keeps zeros from 0 / 0.
    tiny = jnp.asarray(1e-30)
    root = root_mean_square_normalize(kernel, tiny, None, axes, AxisGroup())
    size = 1
    for axis in axes:
        size *= kernel.shape[axis]
    unit = root / jnp.sqrt(jnp.asarray(size, root.dtype))
    return unit, jnp.sum(unit * kernel, axes)
