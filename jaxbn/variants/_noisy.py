"""Noise after normalization: covariate shift put back on purpose."""

import jax
import jax.numpy as jnp

from jaxbn._affine import Activation
from jaxbn._arithmetic import at_least_float32
from jaxbn._factory import normalizer_factory
from jaxbn._inputs import feature_shape, reduced_axes
from jaxbn._normalizer import Normalizer


@normalizer_factory
def noisy(
    norm: Normalizer,
    *,
    mean_range: float = 0.5,
    scale_range: float = 1.25,
    mean_spread: float = 0.1,
    scale_spread: float = 0.1,
    feature_axis: int = -1,
    activation: Activation | None = None,
) -> Normalizer:
    """A normalizer followed by noise that shifts each unit anew at each step (Santurkar et al. 2018, section 2).

    In training, for each unit j and then for each value i of it,

        mean_j  ~ uniform(-mean_range, mean_range)      shift_ij ~ uniform(mean_j - mean_spread, mean_j + mean_spread)
        scale_j ~ uniform(1, scale_range)               gain_ij  ~ normal(scale_j, scale_spread)

    and y_ij becomes gain_ij * y_ij + shift_ij. At test time there is no noise. Wrap a norm without an activation
    of its own and give the activation here, since the noise comes between.

    Args:
      norm: the Normalizer whose output is disturbed.
      mean_range: the largest mean of the shift, the paper's n_mu.
      scale_range: the largest mean of the gain, at least 1; the paper's n_sigma.
      mean_spread: half the width of the shift, the paper's r_mu.
      scale_spread: standard deviation of the gain, the paper's r_sigma.
      feature_axis: the axis of the units.
      activation: elementwise function applied last.

    Returns:
      A Normalizer with the params and batch_stats of `norm`; apply needs `rng` in training.

    Raises:
      ValueError: a negative range or spread, a scale_range below 1; from apply, training without rng.
    """
    if min(mean_range, scale_range, mean_spread, scale_spread) < 0:
        raise ValueError(
            f"mean_range={mean_range}, scale_range={scale_range}, mean_spread={mean_spread}, scale_spread="
            f"{scale_spread}; expected numbers of at least 0."
        )
    if scale_range < 1:
        raise ValueError(f"scale_range={scale_range}; expected at least 1, for gains are drawn from 1 to scale_range.")

    def apply(variables, x, *, train, where=None, weights=None, rng=None, **arguments):
        if train and rng is None:
            raise ValueError("noisy needs a random key in training; pass rng=jax.random.key(...), new at each step.")
        inner_rng, noise_rng = (None, None) if rng is None else jax.random.split(rng)
        y, batch_stats = norm.apply(variables, x, train=train, where=where, weights=weights, rng=inner_rng, **arguments)
        disturbed = _disturb(at_least_float32(y), noise_rng) if train else y
        disturbed = disturbed if activation is None else activation(disturbed)
        return disturbed.astype(y.dtype), batch_stats

    def _disturb(y, rng):
        keys = jax.random.split(rng, 4)
        units, axes = feature_shape(y, feature_axis), reduced_axes(y.ndim, feature_axis)
        mean = jax.random.uniform(keys[0], units, y.dtype, -mean_range, mean_range)
        scale = jax.random.uniform(keys[1], units, y.dtype, 1, scale_range)
        shift = jax.random.uniform(keys[2], y.shape, y.dtype, -mean_spread, mean_spread) + jnp.expand_dims(mean, axes)
        gain = scale_spread * jax.random.normal(keys[3], y.shape, y.dtype) + jnp.expand_dims(scale, axes)
        return gain * y + shift

    return Normalizer(norm.init, apply)
