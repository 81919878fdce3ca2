"""How far a classifier's probabilities can be trusted, and averages over samples of a network that is random."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

import jaxbn
from experiments.training import models

TEMPERATURES = jnp.exp(jnp.linspace(-2.0, 3.0, 101))


def log_likelihood(probabilities: Array, labels: Array) -> Array:
    """Mean logarithm of the probability of the right class, in nats; probabilities: [n, classes], labels: int [n]."""
    right = jnp.take_along_axis(probabilities, labels[:, None], 1)
    return jnp.mean(jnp.log(jnp.maximum(right, jnp.finfo(right.dtype).tiny)))


def calibration_error(probabilities: Array, labels: Array, bins: int = 15) -> Array:
    """Expected calibration error (Guo et al. 2017): |accuracy - confidence| in equal bins of confidence, averaged."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    number = jnp.minimum((confidence * bins).astype(int), bins - 1)
    gap = jnp.zeros(bins).at[number].add(right - confidence)
    return jnp.sum(jnp.abs(gap)) / len(labels)


def entropy(probabilities: Array) -> Array:
    """Of each row, in nats: [n]."""
    return -jnp.sum(jax.scipy.special.xlogy(probabilities, probabilities), axis=1)


def auroc(known: Array, unknown: Array) -> Array:
    """The probability that an unknown's score is higher than a known one's, ties counted half; [m] and [n]."""
    known = jnp.sort(known)
    below, not_above = (jnp.searchsorted(known, unknown, side=side) for side in ("left", "right"))
    return jnp.mean((below + not_above) / 2) / len(known)


def best_temperature(logits: Array, labels: Array) -> Array:
    """The one of TEMPERATURES with the best likelihood of softmax(logits / temperature)."""
    scores = jax.vmap(lambda t: log_likelihood(jax.nn.softmax(logits / t), labels))(TEMPERATURES)
    return TEMPERATURES[jnp.argmax(scores)]


def mean_probabilities(logits: Callable[[Array], Array], samples: Array) -> Array:
    """The mean over samples (numbers or keys, [samples]) of softmax(logits(sample)): [n, classes]."""

    def add(total: Array, sample: Array) -> tuple[Array, None]:
        return total + jax.nn.softmax(logits(sample)), None

    zeros = jnp.zeros_like(jax.eval_shape(logits, samples[0]))
    return jax.lax.scan(add, zeros, samples)[0] / len(samples)


def monte_carlo_batch_norm(
    build: Callable[[jaxbn.Normalizer], models.Network], params: list, batches: Array, images: Array, key: Array
) -> Array:
    """Mean probabilities of `jaxbn.stochastic_batch_norm`, as many samples as batches: [n, classes].

    Args:
      build: build(norm) -> the network.
      params: of a network with batch norm.
      batches: of training images: [samples, batch, ...]; each sample has the statistics of one of them in all layers.
      images: to be classified: [n, ...].
      key: draws the batches.
    """
    norm = jaxbn.stochastic_batch_norm(bank_size=len(batches))

    def record(stats: list, batch: Array) -> tuple[list, None]:
        return build(norm).apply({"params": params, "batch_stats": stats}, batch, train=True)[1], None

    stats, _ = jax.lax.scan(record, build(norm).init(key, images[:2])["batch_stats"], batches)

    def logits(key: Array) -> Array:
        drawn = jaxbn.Normalizer(norm.init, partial(norm.apply, rng=key))
        return build(drawn).apply({"params": params, "batch_stats": stats}, images, train=False)[0]

    return mean_probabilities(logits, jax.random.split(key, len(batches)))
