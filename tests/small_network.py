"""A network of two normalized layers with unequal example weights, small enough to compile in a second."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxbn.training import LossOutput

INPUTS, HIDDEN, CLASSES, BATCH = 6, 8, 3, 64
KEY = jax.random.key(0)


def batches(count, seed=0):
    """`count` batches, leaves [count, BATCH, ...]; a fifth of the examples has no weight."""
    rng = np.random.default_rng(seed)
    weight = rng.uniform(0.5, 2, (count, BATCH)) * (rng.uniform(size=(count, BATCH)) > 0.2)
    return {
        "x": rng.normal(1.0, 2.0, (count, BATCH, INPUTS)).astype(np.float32),
        "label": rng.integers(0, CLASSES, (count, BATCH)).astype(np.int32),
        "weight": weight.astype(np.float32),
    }


BATCHES = batches(4)
FIRST = jax.tree.map(lambda leaf: leaf[0], BATCHES)


def initial(norm):
    """Variables of the network."""
    of_norm = norm.init(KEY, jnp.zeros((BATCH, HIDDEN)))
    sizes = (INPUTS, HIDDEN, HIDDEN, CLASSES)
    keys = jax.random.split(KEY, 3)
    kernels = [0.5 * jax.random.normal(k, shape) for k, shape in zip(keys, itertools.pairwise(sizes), strict=True)]
    params = {"kernels": kernels, "norms": [of_norm["params"]] * 2}
    return {"params": params, "batch_stats": [of_norm["batch_stats"]] * 2}


def apply(norm, variables, batch):
    """Logits and moved statistics, in training; examples without weight do not count in the statistics."""
    *kernels, last = variables["params"]["kernels"]
    x, moved = batch["x"], []
    for kernel, params, stats in zip(kernels, variables["params"]["norms"], variables["batch_stats"], strict=True):
        variables = {"params": params, "batch_stats": stats}
        x, stats = norm.apply(variables, x @ kernel, train=True, weights=batch["weight"][:, None])
        x = jax.nn.relu(x)
        moved.append(stats)
    return x @ last, moved


def loss_of(norm):
    """The cross-entropy as jaxbn.training wants it."""

    def loss(variables, batch, rng):
        del rng
        logits, batch_stats = apply(norm, variables, batch)
        weight = batch["weight"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        hits = jnp.argmax(logits, -1) == batch["label"]
        return LossOutput(jnp.sum(losses * weight), jnp.sum(weight), batch_stats, {"accuracy": jnp.sum(hits * weight)})

    return loss
