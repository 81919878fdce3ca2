"""Batch renormalization: train on what will be used at test time, up to a bounded correction."""

from collections.abc import Callable, Hashable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._affine import Activation, Initializer, affine_of, scale_shift
from jaxbn._axis_group import axis_group_of
from jaxbn._checks import check_decay, check_several, checked, checked_epsilon
from jaxbn._factory import normalizer_factory
from jaxbn._inputs import feature_shape, inexact, reduced_axes, stats_dtype
from jaxbn._normalize import normalize, normalize_by_batch
from jaxbn._normalizer import Normalizer
from jaxbn._padding import at_running_mean
from jaxbn._recording import MeasuringNormalizer, running_normalizer
from jaxbn._running import accepts, init_batch_stats, over_all_groups, running_moments, update_batch_stats

Limit = float | Callable[[jax.Array], jax.Array]


def paper_r_max(step: jax.Array) -> jax.Array:
    """1 for the first 5,000 steps, then linearly to 3 at step 40,000 (Ioffe 2017, section 4)."""
    return 1 + 2 * jnp.clip((step - 5_000) / 35_000, 0, 1)


def paper_d_max(step: jax.Array) -> jax.Array:
    """0 for the first 5,000 steps, then linearly to 5 at step 25,000 (Ioffe 2017, section 4)."""
    return 5 * jnp.clip((step - 5_000) / 20_000, 0, 1)


@normalizer_factory
def batch_renorm(
    *,
    r_max: Limit = paper_r_max,
    d_max: Limit = paper_d_max,
    warmup_steps: int = 0,
    decay: float | None = 0.99,
    epsilon: float = 1e-3,
    feature_axis: int | Sequence[int] = -1,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    use_scale: bool = True,
    use_bias: bool = True,
    scale_init: Initializer = jax.nn.initializers.ones,
    bias_init: Initializer = jax.nn.initializers.zeros,
    dtype: jax.typing.DTypeLike | None = None,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    activation: Activation | None = None,
    skip_nonfinite: bool = True,
    allow_single_value: bool = False,
) -> Normalizer:
    """Batch renormalization (Ioffe 2017, algorithm 1): y = scale * ((x - mean) / std * r + d) + bias in training.

    mean and std = sqrt(var + epsilon) are the batch's, and the correction turns them into the running ones as far as
    the limits allow; no gradient flows through it:

        r = clip(std / running_std, 1 / r_max, r_max)      d = clip((mean - running_mean) / running_std, -d_max, d_max)

    The paper averages std; here the running variance is averaged, so that batch_stats interchange with batch norm's.
    With r_max=1 and d_max=0 this is batch norm. CrossQ's use of it (Bhatt et al. 2024) is r_max=3, d_max=5 and
    warmup_steps=100_000. `apply` also takes `step`, which the limits then see in place of the count kept in
    batch_stats, and `residual`, an array of x's shape added before the activation.

    Args:
      r_max: at least 1; a number, or a function of the step (int32 scalar).
      d_max: at least 0; a number, or a function of the step.
      warmup_steps: steps of plain batch norm at the start, whatever the limits say.
      decay: of the running statistics: new = decay * old + (1 - decay) * batch. None averages all batches equally.
      epsilon: added to the variances, inside the square root.
      feature_axis: the axis or axes kept.
      axis_name: named axis, or tuple of them, whose shards share statistics.
      axis_index_groups: groups of indices on `axis_name` that share statistics.
      use_scale: learn a scale.
      use_bias: learn a bias.
      scale_init: scale_init(key, shape, dtype), ones.
      bias_init: bias_init(key, shape, dtype), zeros.
      dtype: of the output; None is the input's.
      param_dtype: of scale and bias.
      activation: elementwise function applied last.
      skip_nonfinite: a batch whose moments are not finite leaves batch_stats alone.
      allow_single_value: train even where each feature sees one value only.

    Returns:
      A Normalizer with params {"scale", "bias"} and batch_stats {"mean", "var", "step"}: step, int32 [], is the number
      of batches that moved mean and var; with decay=None also "weight".

    Raises:
      ValueError: limits out of range, a negative warmup_steps or epsilon, decay outside [0, 1]; and from apply, shapes
        that do not fit, or one value per feature.
    """
    check_decay(decay)
    checked_epsilon(epsilon)
    _check_limits(r_max, d_max, warmup_steps)
    axis_group = axis_group_of(axis_name, axis_index_groups)
    affine = affine_of(use_scale, use_bias, scale_init, bias_init, param_dtype)

    def init(key, x):
        shape = feature_shape(x, feature_axis)
        batch_stats = init_batch_stats(shape, stats_dtype(x), decay=decay)
        return {"params": affine.init(key, shape), "batch_stats": batch_stats | {"step": jnp.zeros((), jnp.int32)}}

    def read(variables, x, train):
        shape = feature_shape(x, feature_axis)
        params, batch_stats = checked(variables, x, train, feature_axis, affine.shapes(shape), _kept(shape))
        return params.get("scale"), params.get("bias"), batch_stats, reduced_axes(x.ndim, feature_axis)

    def evaluate(variables, x, *, where, weights, rng=None, residual=None, step=None):
        del rng, step
        x = inexact(x)
        scale, bias, batch_stats, axes = read(variables, x, False)
        mean, var = running_moments(batch_stats)
        x = at_running_mean(x, mean, where, weights, feature_axis)
        out = dict(epsilon=epsilon, activation=activation, residual=residual, dtype=dtype)
        return normalize(x, mean, var, scale, bias, axis=axes, **out)

    def train(variables, x, *, where, weights, rng=None, residual=None, step=None):
        del rng
        x = inexact(x)
        scale, bias, batch_stats, axes = read(variables, x, True)
        if not allow_single_value:
            check_several(x, axes, axis_group, "Train on more examples, or pass allow_single_value=True.")
        batch = dict(where=where, weights=weights, dtype=stats_dtype(x), activation=None, residual=None)
        xhat, rows = normalize_by_batch(x, None, None, axis=axes, epsilon=epsilon, axis_group=axis_group, **batch)
        measured = axis_group.select_group(rows)
        r_limit, d_limit = _limits(batch_stats["step"] if step is None else step)
        r, d = _correction(batch_stats, measured.moments, r_limit, d_limit, epsilon)
        # scale * (xhat r + d) + bias, as one multiplication and one addition for each element.
        gain, shift = (r, d) if scale is None else (scale * r, scale * d)
        shift = shift if bias is None else shift + bias
        gain, shift = (jnp.expand_dims(v, axes) for v in (gain, shift))
        y = scale_shift(xhat, gain, shift, residual, activation, jnp.dtype(dtype or x.dtype))
        return y, over_all_groups(lax.stop_gradient(rows), axis_group)

    def _kept(shape):
        return dict.fromkeys(("mean", "var") if decay is not None else ("mean", "var", "weight"), shape) | {"step": ()}

    def _limits(step):
        r, d = (limit(step) if callable(limit) else limit for limit in (r_max, d_max))
        warm = step >= warmup_steps
        return jnp.where(warm, r, 1), jnp.where(warm, d, 0)

    def _update(batch_stats, measured):
        moments = measured.moments
        running = {name: value for name, value in batch_stats.items() if name != "step"}
        accept = accepts(jnp.any(moments.count > 0), moments.mean, moments.var, skip_nonfinite=skip_nonfinite)
        moved = update_batch_stats(running, moments, decay=decay, skip_nonfinite=skip_nonfinite)
        return moved | {"step": batch_stats["step"] + accept.astype(jnp.int32)}

    measuring = MeasuringNormalizer(init, train, evaluate)
    everyone = axis_group._replace(groups=None)
    return running_normalizer(measuring, _update, feature_axis=feature_axis, axis_group=everyone)


def _correction(batch_stats, moments, r_max, d_max, epsilon):
    """R and d of the paper, without gradients; neutral for a feature that saw nothing."""
    mean, var = running_moments(batch_stats)
    moments = lax.stop_gradient(moments)
    std = jnp.sqrt(var + epsilon)
    r = jnp.clip(jnp.sqrt(moments.var + epsilon) / std, 1 / r_max, r_max)
    d = jnp.clip((moments.mean - mean) / std, -d_max, d_max)
    seen = moments.count > 0
    return jnp.where(seen, r, 1), jnp.where(seen, d, 0)


def _check_limits(r_max, d_max, warmup_steps):
    if not callable(r_max) and not r_max >= 1:
        raise ValueError(f"r_max={r_max}; expected at least 1, the value at which the scale is not corrected.")
    if not callable(d_max) and not d_max >= 0:
        raise ValueError(f"d_max={d_max}; expected at least 0, the value at which the mean is not corrected.")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps={warmup_steps}; expected 0 or more steps of plain batch norm.")
