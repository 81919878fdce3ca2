"""Batch norm, batch norm with noise after it, and neither, as one normalizer: all train in one compiled program."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

import jaxbn
from experiments.training import models
from jaxbn import diagnostics

# The numbers of a run that say which one it has, for `start`.
PLAIN, NORM, NOISY = {"normalize": 0, "noise": 0}, {"normalize": 1, "noise": 0}, {"normalize": 1, "noise": 1}

BATCH_NORM = jaxbn.batch_norm(decay=0.9, epsilon=1e-5)
MEAN_RANGE, SCALE_RANGE, SPREAD = 0.5, 1.25, 0.1  # of the noise: the defaults of `jaxbn.noisy`


def noise(key: Array, y: Array) -> Array:
    """`gain * y + shift`, distributed as in `jaxbn.noisy`; y: [..., features].

    One draw makes it all: with four for each of 24 layers most of a program's compile time went into random bits.
    """
    features = y.shape[-1]
    u = jax.random.uniform(key, (2 * y.size + 2 * features,), y.dtype, minval=1e-6)
    units, values = u[: 2 * features].reshape(2, *(1,) * (y.ndim - 1), features), u[2 * features :].reshape(2, *y.shape)
    shift = MEAN_RANGE * (2 * units[0] - 1) + SPREAD * (2 * values[0] - 1)
    gain = 1 + (SCALE_RANGE - 1) * units[1] + SPREAD * jax.scipy.special.ndtri(values[1])
    return gain * y + shift


def _init(key: Array, x: Array) -> dict:
    variables = BATCH_NORM.init(key, x)
    zeros = {"normalize": jnp.zeros(()), "noise": jnp.zeros(()), "count": jnp.zeros((), jnp.uint32)}
    stats = {"norm": variables["batch_stats"], "key": jnp.zeros(2, jnp.uint32), **zeros}
    return {"params": variables["params"], "batch_stats": stats}


def _apply(variables: dict, x: Array, *, train: bool) -> tuple[Array, dict]:
    params, stats = variables["params"], variables["batch_stats"]
    y, moved = BATCH_NORM.apply({"params": params, "batch_stats": stats["norm"]}, x, train=train)
    if train:
        key = jax.random.wrap_key_data(stats["key"] + stats["count"])
        y = jnp.where(stats["noise"] > 0, noise(key, y), y)
    bias = jnp.expand_dims(params["bias"], tuple(range(x.ndim - 1)))
    y = jnp.where(stats["normalize"] > 0, y, x + bias)
    return y, {**stats, "norm": moved, "count": stats["count"] + jnp.uint32(train)}


# Without normalization only a bias is added. Noise depends on the layer's key and on how many batches it has seen, all
# of which lie among the statistics: the same variables give the same noise, and those of the next step other noise.
DISTURBED = jaxbn.Normalizer(_init, _apply)


def start(network: models.Network, run: dict, key: Array, x: Array) -> dict:
    """The variables of a network with DISTURBED, of the kind that the run says; each layer has a key of its own."""
    variables = network.init(key, x)
    stats = [
        {
            **of_layer,
            "normalize": jnp.array(run["normalize"], jnp.float32),
            "noise": jnp.array(run["noise"], jnp.float32),
            "key": jax.random.key_data(jax.random.fold_in(key, number)),
        }
        for number, of_layer in enumerate(variables["batch_stats"])
    ]
    return {**variables, "batch_stats": stats}


def tapped(build: Callable[[jaxbn.Normalizer], models.Network], tap: diagnostics.Tap) -> models.Network:
    """The network with DISTURBED, which shows what every norm gives to its activation to `tap`, as "0", "1", ..."""
    numbers = itertools.count()

    def apply(variables: dict, x: Array, *, train: bool) -> tuple[Array, dict]:
        y, stats = DISTURBED.apply(variables, x, train=train)
        return tap(str(next(numbers)), y), stats

    return build(jaxbn.Normalizer(DISTURBED.init, apply))
