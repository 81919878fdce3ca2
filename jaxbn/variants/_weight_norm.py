"""Weight normalization: a kernel as a direction and a length for each output feature."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._axis_group import AxisGroup
from jaxbn._checks import checked_epsilon
from jaxbn._inputs import along, feature_shape, reduced_axes, size_of
from jaxbn._moments import Moments
from jaxbn.variants._root_mean_square import root_mean_square_normalize


def weight_norm(direction: jax.Array, gain: jax.Array, *, feature_axis: int = -1) -> jax.Array:
    """The kernel `gain * direction / ||direction||`, one norm a feature (Salimans and Kingma 2016, equation 2).

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
    """The direction and gain from which `weight_norm` makes this kernel: the kernel itself, and its norms.

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
    """The kernel over its norms, and the norms, over all axes but the features'; zero over zero is zero."""
    axes = reduced_axes(kernel.ndim, feature_axis)
    # Too small to change the norm of weights above 1e-11 or so; a direction of zeros gives 0 and not 0 / 0.
    tiny = jnp.asarray(1e-30)
    root = root_mean_square_normalize(kernel, tiny, None, axes, AxisGroup())
    unit = root / jnp.sqrt(jnp.asarray(size_of(kernel.shape, axes), root.dtype))
    return unit, jnp.sum(unit * kernel, axes)
