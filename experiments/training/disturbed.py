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
NOISE = jaxbn.noisy(jaxbn.identity())


def _init(key: Array, x: Array) -> dict:
    variables = BATCH_NORM.init(key, x)
    zeros = {"normalize": jnp.zeros(()), "noise": jnp.zeros(()), "count": jnp.zeros((), jnp.int32)}
    stats = {"norm": variables["batch_stats"], "key": jnp.zeros(2, jnp.uint32), **zeros}
    return {"params": variables["params"], "batch_stats": stats}


def _apply(variables: dict, x: Array, *, train: bool) -> tuple[Array, dict]:
    params, stats = variables["params"], variables["batch_stats"]
    y, moved = BATCH_NORM.apply({"params": params, "batch_stats": stats["norm"]}, x, train=train)
    if train:
        rng = jax.random.fold_in(jax.random.wrap_key_data(stats["key"]), stats["count"])
        noised, _ = NOISE.apply({"params": {}, "batch_stats": {}}, y, train=True, rng=rng)
        y = jnp.where(stats["noise"] > 0, noised, y)
    bias = jnp.expand_dims(params["bias"], tuple(range(x.ndim - 1)))
    y = jnp.where(stats["normalize"] > 0, y, x + bias)
    return y, {**stats, "norm": moved, "count": stats["count"] + int(train)}


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
