"""Batch norm, ghost batch norm, renorm, group norm and no norm as one normalizer: all train in one compiled program.

They differ in the values over which mean and variance are taken, and in nothing else. Every example and channel has a
mean m and a variance v over its positions; those of any set of examples and channels are pooled from them:

    mean = average of m        var = average of (v + m^2) - mean^2

and y = scale ((x - mean) / sqrt(var + epsilon) r + d) + bias, where r = 1 and d = 0 but for renorm.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

import jaxbn

EPSILON = 1e-5
CHANNEL_GROUPS = 4  # of group norm
EXACT = jax.lax.Precision.HIGHEST  # an average in fewer digits would be another one


def kind(
    group: int = 1, *, normalize: bool = True, by_channels: bool = False, r_max: float = 1.0, d_max: float = 0.0
) -> dict[str, float]:
    """The numbers of a run that say which normalizer it has, for `pooled`.

    Args:
      group: number of consecutive examples that share mean and variance in training: the batch size for batch norm.
      normalize: else only a bias is added.
      by_channels: whether CHANNEL_GROUPS groups of neighbouring channels share them, too: group norm, with groups of 1
        example. It keeps no running statistics.
      r_max: the largest r of renorm; 1 is batch norm. 1 / r_max is the least.
      d_max: the largest size of d; 0 is batch norm.
    """
    return {
        "group": group,
        "normalize": int(normalize),
        "by_channels": int(by_channels),
        "running": int(normalize and not by_channels),
        "r_max": r_max,
        "d_max": d_max,
    }


def pooled(run: dict) -> jaxbn.Normalizer:
    """The normalizer of a run that holds the numbers of `kind`, "decay" and "warmup", the steps before renorm begins.

    These lie among the statistics, since `apply` is given nothing else of a run. "running" among them says whether the
    running statistics are used at test time; without, each example has its own.
    """
    names = (*kind(), "decay", "warmup")

    def init(key: Array, x: Array) -> dict:
        features = x.shape[-1:]
        # Copies: each norm's own, since a training step consumes the state that it is given.
        stats = {name: jnp.array(run[name], jnp.float32) for name in names}
        stats |= {"mean": jnp.zeros(features), "var": jnp.ones(features), "step": jnp.zeros(())}
        return {"params": {"scale": jnp.ones(features), "bias": jnp.zeros(features)}, "batch_stats": stats}

    def apply(variables: dict, x: Array, *, train: bool) -> tuple[Array, dict]:
        stats, params = variables["batch_stats"], variables["params"]
        m, square = of_each_example(x)
        mean, var = pool(stats, m, square, train)
        if not train:
            on = stats["running"] > 0
            mean, var = jnp.where(on, stats["mean"][None], mean), jnp.where(on, stats["var"][None], var)
        std = jnp.sqrt(var + EPSILON)
        r, d = correction(stats, mean, std) if train else (1.0, 0.0)
        scale, bias = params["scale"][None], params["bias"][None]
        on = stats["normalize"] > 0
        factor = jnp.where(on, scale * r / std, 1.0)
        shift = bias + jnp.where(on, scale * (d - mean * r / std), 0.0)
        axes = tuple(range(1, x.ndim - 1))
        y = x * jnp.expand_dims(factor, axes) + jnp.expand_dims(shift, axes)
        return y, move(stats, m, square) if train else stats

    return jaxbn.Normalizer(init, apply)


def of_each_example(x: Array) -> tuple[Array, Array]:
    """The mean and the mean square over the positions of each example and channel, [batch, channels].

    x: [batch, ..., channels].
    """
    axes = tuple(range(1, x.ndim - 1))
    m = jnp.mean(x, axes)
    return m, jnp.mean((x - jnp.expand_dims(m, axes)) ** 2, axes) + m**2


def pool(stats: dict, m: Array, square: Array, train: bool) -> tuple[Array, Array]:
    """Mean and variance by which each example and channel is normalized, [batch, channels]."""
    both = jnp.stack([m, square])
    if train:
        number = jnp.arange(len(m)) // stats["group"]
        both = jnp.matmul(averaging(number), both, precision=EXACT)
    channels = m.shape[-1]
    number = jnp.arange(channels) // jnp.where(stats["by_channels"] > 0, max(1, channels // CHANNEL_GROUPS), 1)
    mean, square = jnp.matmul(both, averaging(number), precision=EXACT)
    return mean, jnp.maximum(square - mean**2, 0)


def averaging(number: Array) -> Array:
    """The matrix [n, n] that replaces each value by the mean of those with the same number; number: [n]."""
    same = (number[:, None] == number[None]).astype(jnp.float32)
    return same / same.sum(1, keepdims=True)


def correction(stats: dict, mean: Array, std: Array) -> tuple[Array, Array]:
    """R and d of renorm, without gradients: Ioffe 2017, algorithm 1."""
    warm = stats["step"] >= stats["warmup"]
    r_max, d_max = jnp.where(warm, stats["r_max"], 1.0), jnp.where(warm, stats["d_max"], 0.0)
    running = jnp.sqrt(stats["var"] + EPSILON)[None]
    r = jnp.clip(std / running, 1 / r_max, r_max)
    d = jnp.clip((mean - stats["mean"][None]) / running, -d_max, d_max)
    return stop_gradient(r), stop_gradient(d)


def move(stats: dict, m: Array, square: Array) -> dict:
    """Running statistics after a batch: those of all its values, whatever the groups."""
    mean = jnp.mean(m, 0)
    batch = {"mean": mean, "var": jnp.maximum(jnp.mean(square, 0) - mean**2, 0)}
    moved = {name: stats["decay"] * stats[name] + (1 - stats["decay"]) * batch[name] for name in batch}
    return {**stats, **stop_gradient(moved), "step": stats["step"] + 1}


def with_numbers(variables: dict, **numbers: Any) -> dict:
    """The same network with other numbers of `kind`, or another "decay", in every norm."""

    def one(stats: dict) -> dict:
        return {**stats, **{name: jnp.full_like(stats[name], value) for name, value in numbers.items()}}

    return {**variables, "batch_stats": [one(stats) for stats in variables["batch_stats"]]}
