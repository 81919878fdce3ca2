"""Batch norm with as much noise in its statistics as a run asks for, and dropout, as one normalizer.

All kinds train in one compiled program on the same batches: what differs is over how many examples statistics are
taken, so that the noise of batch norm changes and that of SGD does not.
"""

import jax
import jax.numpy as jnp
from jax import Array

import jaxbn
from experiments.training import models

SMALLEST = 4  # examples: all groups are made of as many, one after the other in the batch
WHOLE = 2**20  # a group of the whole batch, whatever its size
DECAY, EPSILON = 0.9, 1e-5


def kind(group: int = WHOLE, *, normalize: bool = True, drawn: bool = False, dropout: float = 0.0) -> dict[str, float]:
    """The numbers of a run that say what its layers do.

    Args:
      group: over how many examples statistics are taken: SMALLEST times a power of 2. It has to divide the batch.
      normalize: else only a bias is added.
      drawn: statistics are those of the whole batch, with Gaussian noise as great as statistics of `group` have.
      dropout: the probability with which a unit is set to 0 in training. It comes before the activation: for ReLU that
        is the same as after it.
    """
    return {"group": group, "normalize": int(normalize), "drawn": int(drawn), "dropout": dropout}


def start(network: models.Network, run: dict, key: Array, x: Array) -> dict:
    """The variables of a network with NOISY, of the kind that the run says; each layer has noise of its own."""
    variables = network.init(key, x)
    stats = [
        {
            **of_layer,
            "kind": {name: jnp.array(run[name], jnp.float32) for name in kind()},
            "key": jax.random.key_data(jax.random.fold_in(key, number)),
        }
        for number, of_layer in enumerate(variables["batch_stats"])
    ]
    return {**variables, "batch_stats": stats}


def at_sample(variables: dict, number: Array) -> dict:
    """The same network, which in training mode draws the noise of that sample; none was drawn in training."""
    stats = [
        {**one, "key": one["key"] ^ jnp.uint32(1), "count": jnp.uint32(number)} for one in variables["batch_stats"]
    ]
    return {**variables, "batch_stats": stats}


def _init(key: Array, x: Array) -> dict:
    variables = jaxbn.batch_norm().init(key, x)
    own = {"kind": {name: jnp.zeros(()) for name in kind()}, "key": jnp.zeros(2, jnp.uint32), "count": jnp.uint32(0)}
    return {**variables, "batch_stats": {**variables["batch_stats"], **own}}


def _apply(variables: dict, x: Array, *, train: bool) -> tuple[Array, dict]:
    params, stats = variables["params"], variables["batch_stats"]
    kind = stats["kind"]
    if not train:
        y = jaxbn.normalize(x, stats["mean"], stats["var"], **params, axis=0, epsilon=EPSILON)
        return jnp.where(kind["normalize"] > 0, y, x + params["bias"][None]), stats
    keys = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(stats["key"]), stats["count"]))
    mean, var = group_statistics(x, kind, keys[0])  # of each piece of SMALLEST examples: [pieces, features]
    pieces = x.reshape(-1, SMALLEST, x.shape[-1])
    y = (pieces - mean[:, None]) * jax.lax.rsqrt(var + EPSILON)[:, None] * params["scale"][None, None]
    y = jnp.where(kind["normalize"] > 0, y.reshape(x.shape), x) + params["bias"][None]
    # The averages of what groups have, as where the batch is that small.
    moved = {
        name: DECAY * stats[name] + (1 - DECAY) * jax.lax.stop_gradient(value.mean(0))
        for name, value in (("mean", mean), ("var", var))
    }
    return drop(keys[1], y, kind["dropout"]), {**stats, **moved, "count": stats["count"] + 1}


# Noise depends on a layer's key and on how many batches it has seen, which lie among the statistics: the same variables
# give the same noise, and those of the next step other noise.
NOISY = jaxbn.Normalizer(_init, _apply)


def group_statistics(x: Array, kind: dict, key: Array) -> tuple[Array, Array]:
    """Mean and biased variance of the group to which each piece of SMALLEST examples belongs: [pieces, features]."""
    center = x.mean(0, keepdims=True)
    pieces = (x - center).reshape(-1, SMALLEST, x.shape[-1])
    number = jnp.arange(len(pieces)) * SMALLEST // kind["group"].astype(int)
    same = (number[:, None] == number[None]).astype(x.dtype)
    pool = same / same.sum(1, keepdims=True)  # [pieces, pieces]: means over the pieces of a group

    means, squares = pieces.mean(1), (pieces**2).mean(1)
    mean = pool @ means
    var = jnp.maximum(pool @ squares - mean**2, 0)

    # Of n Gaussian values the mean has the deviation std / sqrt(n), the logarithm of the std about 1 / sqrt(2 n).
    whole = squares.mean(0, keepdims=True)
    noise = pool @ jax.random.normal(key, (len(pieces), 2 * x.shape[-1])) / SMALLEST**0.5  # 1 / sqrt(group)
    of_mean, of_std = jnp.split(noise, 2, axis=1)
    drawn = kind["drawn"] > 0
    mean = jnp.where(drawn, jnp.sqrt(whole + EPSILON) * of_mean, mean)
    var = jnp.where(drawn, whole * jnp.exp(2 * of_std / 2**0.5), var)
    return center + mean, var


def drop(key: Array, y: Array, probability: Array) -> Array:
    """Dropout: 0 with this probability, a multiple of 1/256, else y over the probability to be kept."""
    # Random bytes: a quarter of the work of random floats.
    kept = jax.random.bits(key, y.shape, jnp.uint8) >= (256 * probability).astype(jnp.uint8)
    return jnp.where(kept, y / (1 - probability), 0)
