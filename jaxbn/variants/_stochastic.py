"""Monte Carlo batch normalization: the noise of the batch kept at test time, for uncertainty."""

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._affine import Activation, Initializer, affine_of
from jaxbn._axis_group import axis_group_of
from jaxbn._checks import check_decay, check_several, checked, checked_epsilon
from jaxbn._factory import normalizer_factory
from jaxbn._inputs import feature_shape, inexact, reduced_axes, stats_dtype
from jaxbn._normalize import normalize, normalize_by_batch
from jaxbn._normalizer import Normalizer, OneDrawNormalizer
from jaxbn._padding import at_running_mean
from jaxbn._recording import MeasuringNormalizer, running_normalizer
from jaxbn._running import accepts, init_batch_stats, over_all_groups, running_moments, update_batch_stats


@normalizer_factory
def stochastic_batch_norm(
    *,
    bank_size: int = 64,
    decay: float | None = 0.99,
    epsilon: float = 1e-5,
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
) -> Normalizer:
    """Monte Carlo batch norm (Teye, Azizpour and Smith 2018, algorithm 1).

    In training this is batch norm that also records the moments of each batch in a bank of the latest `bank_size`. At
    test time with `rng` it normalizes by those of one recorded batch, drawn uniformly: the outputs over many keys are
    samples of the approximate posterior predictive distribution. Without `rng`, or with an empty bank, it uses
    the running statistics. One key for all layers draws the same batch in each, as in the paper; `jaxbn.linen.Norm` and
    `jaxbn.nnx.Norm` give one to all layers. To record the batches that belong to the final weights, train the last
    steps with a learning rate of 0. With `axis_index_groups` the bank holds the moments of all groups together,
    the same on every shard.

    Args:
      bank_size: how many batches the bank holds.
      decay: of the running statistics: new = decay * old + (1 - decay) * batch. None averages all batches equally.
      epsilon: added to the variance, inside the square root.
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

    Returns:
      A Normalizer with params {"scale", "bias"} and batch_stats {"mean", "var"} of the features' shape, {"mean_bank",
      "var_bank"} of shape [bank_size, features], and "step", int32 []: batches recorded so far. With decay=None also
      "weight".

    Raises:
      ValueError: bank_size below 1, decay outside [0, 1], a negative epsilon; and from apply, shapes that do not fit,
        or one value per feature in training.
    """
    check_decay(decay)
    checked_epsilon(epsilon)
    if bank_size < 1:
        raise ValueError(f"bank_size={bank_size}; expected room for at least 1 batch.")
    axis_group = axis_group_of(axis_name, axis_index_groups)
    affine = affine_of(use_scale, use_bias, scale_init, bias_init, param_dtype)

    def init(key, x):
        shape = feature_shape(x, feature_axis)
        running = init_batch_stats(shape, stats_dtype(x), decay=decay)
        bank = {f"{n}_bank": jnp.broadcast_to(running[n], (bank_size, *shape)) for n in ("mean", "var")}
        step = jnp.zeros((), jnp.int32)
        return {"params": affine.init(key, shape), "batch_stats": running | bank | {"step": step}}

    out: dict[str, Any] = dict(epsilon=epsilon, activation=activation, dtype=dtype)

    def read(variables, x, train):
        shape = feature_shape(x, feature_axis)
        params, batch_stats = checked(variables, x, train, feature_axis, affine.shapes(shape), _kept(shape))
        return params.get("scale"), params.get("bias"), batch_stats, reduced_axes(x.ndim, feature_axis)

    def evaluate(variables, x, *, where, weights, rng=None, residual=None):
        x = inexact(x)
        scale, bias, batch_stats, axes = read(variables, x, False)
        mean, var = running_moments(batch_stats) if rng is None else _draw(batch_stats, rng, bank_size)
        x = at_running_mean(x, mean, where, weights, feature_axis)
        return normalize(x, mean, var, scale, bias, axis=axes, residual=residual, **out)

    def train(variables, x, *, where, weights, rng=None, residual=None):
        del rng
        x = inexact(x)
        scale, bias, _, axes = read(variables, x, True)
        check_several(x, axes, axis_group, "Train on more examples, or use train=False.")
        batch = dict(where=where, weights=weights, axis_group=axis_group, residual=residual)
        y, rows = normalize_by_batch(x, scale, bias, axis=axes, **batch, **out)
        return y, over_all_groups(lax.stop_gradient(rows), axis_group)

    def _kept(shape):
        running = dict.fromkeys(("mean", "var") if decay is not None else ("mean", "var", "weight"), shape)
        return running | dict.fromkeys(("mean_bank", "var_bank"), (bank_size, *shape)) | {"step": ()}

    update = partial(_record, decay=decay, bank_size=bank_size)
    measuring = MeasuringNormalizer(init, train, evaluate)
    everyone = axis_group._replace(groups=None)
    return OneDrawNormalizer(*running_normalizer(measuring, update, feature_axis=feature_axis, axis_group=everyone))


def _draw(batch_stats, rng, bank_size):
    batch_stats = lax.stop_gradient(batch_stats)
    recorded = jnp.minimum(batch_stats["step"], bank_size)
    slot = jax.random.randint(rng, (), 0, jnp.maximum(recorded, 1))
    pairs = zip(running_moments(batch_stats), (batch_stats["mean_bank"], batch_stats["var_bank"]), strict=True)
    return tuple(jnp.where(recorded == 0, running, bank[slot]) for running, bank in pairs)


def _record(batch_stats, measured, *, decay, bank_size):
    """Move the running statistics, and write the moments over the oldest in the bank; a bad batch does neither."""
    batch_stats, moments = lax.stop_gradient((batch_stats, measured.moments))
    running = {name: batch_stats[name] for name in ("mean", "var", "weight") if name in batch_stats}
    accept = accepts(jnp.all(moments.count > 0), moments.mean, moments.var)
    slot = batch_stats["step"] % bank_size

    def write(bank, value):
        return bank.at[slot].set(jnp.where(accept, value, bank[slot]).astype(bank.dtype))

    bank = {
        "mean_bank": write(batch_stats["mean_bank"], moments.mean),
        "var_bank": write(batch_stats["var_bank"], moments.var),
        "step": batch_stats["step"] + accept.astype(jnp.int32),
    }
    return update_batch_stats(running, moments, decay=decay) | bank
