"""Two ways to normalized activations that batch norm replaced: ask for them in the loss, or restore them each step."""

from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp

from jaxbn._checks import checked_epsilon
from jaxbn._inputs import along, canonical_axes
from jaxbn._moments import Moments
from jaxbn._moments_of import moments


def penalty(
    x: jax.Array,
    axis: int | Sequence[int] | None = 0,
    *,
    epsilon: float = 1e-5,
    where: jax.Array | None = None,
    weights: jax.Array | None = None,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
) -> jax.Array:
    """How far activations are from mean 0 and standard deviation 1: the mean over features of mean**2 + (std - 1)**2.

    To be added to the loss, times a weight. Goodfellow, Bengio and Courville (2016, section 8.7.1) describe the idea
    without a formula; this is the squared 2-Wasserstein distance between the feature's Gaussian and the unit Gaussian.

    Args:
      x: activations, floating.
      axis: the axes reduced, as in `jnp.mean`; the others are the features.
      epsilon: added to the variance inside the square root, so that a constant feature has a gradient.
      where: boolean, broadcastable to x: True counts.
      weights: real, broadcastable to x.
      axis_name: named axis whose shards share statistics.

    Returns:
      A real scalar, float32 at least. A feature that saw nothing adds nothing.

    Raises:
      TypeError, ValueError: as `moments`; a negative epsilon.
    """
    checked_epsilon(epsilon)
    measured = moments(x, axis, where=where, weights=weights, axis_name=axis_name)
    distance = jnp.abs(measured.mean) ** 2 + (jnp.sqrt(measured.var + epsilon) - 1) ** 2
    seen = jnp.broadcast_to(measured.count > 0, distance.shape)
    return jnp.sum(jnp.where(seen, distance, 0)) / jnp.maximum(jnp.sum(seen), 1)


def renormalize_after_step(
    kernel: jax.Array,
    bias: jax.Array,
    measured: Moments,
    *,
    feature_axis: int = -1,
    epsilon: float = 1e-5,
) -> tuple[jax.Array, jax.Array]:
    """Kernel and bias changed so that the pre-activation that had the measured moments has mean 0 and variance 1.

    To be called after each step of the optimizer, for one layer after the other from the input on, each measured
    through those already renormalized (Goodfellow, Bengio and Courville 2016, section 8.7.1). The optimizer does not
    know of it: a gradient that would change mean or variance is undone here, step after step.

    Args:
      kernel: of a dense layer or a convolution, its output features along `feature_axis`.
      bias: [features].
      measured: of the layer's x @ kernel + bias: `moments` over all axes but the features'.
      feature_axis: of the kernel.
      epsilon: added to the variance, inside the square root.

    Returns:
      kernel / std and (bias - mean) / std, in the dtypes given. A feature that saw nothing is left alone.

    Raises:
      ValueError: a negative epsilon, or shapes that do not fit.
    """
    checked_epsilon(epsilon)
    (axis,) = canonical_axes(feature_axis, kernel.ndim, "feature_axis")
    features = (kernel.shape[axis],)
    for name, value in (("bias", bias), ("measured.mean", measured.mean), ("measured.var", measured.var)):
        if jnp.shape(value) != features:
            raise ValueError(
                f"{name} has shape {jnp.shape(value)}; the kernel, {kernel.shape}, has features {features}."
            )
    seen = measured.count > 0
    gain = jnp.where(seen, jax.lax.rsqrt(measured.var + epsilon), 1)
    mean = jnp.where(seen, measured.mean, 0)
    return (kernel * along(gain, kernel.ndim, axis)).astype(kernel.dtype), ((bias - mean) * gain).astype(bias.dtype)
