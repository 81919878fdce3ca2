"""How near made images are to real ones, in the features of a classifier that is trained here on the real ones.

The Frechet distance of Heusel et al. 2017 without their network: that between Gaussians with the means and covariances
of both sets' features. With another classifier it is another number; it must not be called FID.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax import Array

import jaxbn
from experiments.training import data, loop, models

UNITS = 32  # features
NORM = jaxbn.batch_norm(decay=0.9, epsilon=1e-5)
BLOCKS = ((16,), (32,))
SURE = 0.9  # probability from which on the classifier is sure of a digit
FOUND = 0.02  # share of the samples from which on a digit counts as made: a fifth of its share among the real ones


class Seen(NamedTuple):
    """What the classifier says of images: features [..., images, UNITS] and probabilities [..., images, classes]."""

    features: Array
    probabilities: Array


@cache
def classifier(name: str, steps: int) -> Callable[[Array], Seen]:
    """A small convolutional network trained on a data set's training part; images: float32 [n, 28, 28, 1] in [0, 1]."""
    network = models.vgg(BLOCKS, NORM, units=UNITS)

    def init(run: dict, key: Array, x: Array) -> dict:
        return network.init(key, x)

    task = loop.Task(init, network.apply, lambda run: optax.adam(2e-3))
    runs, arrays = loop.stacked([{"seed": 0}], 1), loop.on_device(data.load(name))
    programs = loop.compile_grid(task, loop.Schedule(steps, steps, 128))
    states, _ = programs.advance(programs.start(runs, arrays), runs, arrays, 0)
    variables = jax.tree.map(lambda leaf: leaf[0], states["variables"])
    watched = models.vgg(BLOCKS, models.watched(NORM, lambda x, y: y), units=UNITS)

    @jax.jit
    def look(images: Array) -> Seen:
        logits, layers = watched.apply(variables, images, train=False)
        return Seen(jax.nn.relu(layers[-1]), jax.nn.softmax(logits))

    return look


def gaussian(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance in float64; features: [images, units]."""
    features = np.asarray(features, np.float64)
    return features.mean(0), np.cov(features, rowvar=False)


def frechet_distance(one: np.ndarray, other: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) between the Gaussians of two sets of features, [images, units]."""
    (mean, covariance), (mean2, covariance2) = gaussian(one), gaussian(other)
    root = _root(covariance)
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ covariance2 @ root), 0, None)).sum()
    return float(np.sum((mean - mean2) ** 2) + np.trace(covariance) + np.trace(covariance2) - 2 * cross)


def _root(symmetric: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(symmetric)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def variety(made: np.ndarray, real: np.ndarray) -> float:
    """The variance of made images' features over that of the real ones; 0 where all images are one."""
    return float(np.trace(gaussian(made)[1]) / np.trace(gaussian(real)[1]))


def sure_of(probabilities: np.ndarray) -> float:
    """The share of images of which the classifier is SURE."""
    return float(np.mean(probabilities.max(-1) >= SURE))


def digits_found(probabilities: np.ndarray) -> int:
    """How many classes are made: the classifier is SURE of it in at least a share FOUND of the images."""
    return int(np.sum(np.mean(probabilities >= SURE, axis=0) >= FOUND))


def compared(made: Seen, real: Seen) -> dict[str, float]:
    """Everything that is measured of one generator's images; nan where one of its numbers is not finite."""
    if not np.isfinite(made.features).all():
        return dict.fromkeys(("distance", "variety", "sure", "digits"), np.nan)
    return {
        "distance": frechet_distance(made.features, real.features),
        "variety": variety(made.features, real.features),
        "sure": sure_of(made.probabilities),
        "digits": digits_found(made.probabilities),
    }


def in_batches(look: Callable[[Array], Seen], images: Array) -> Seen:
    """The same for many images, at most `loop.EVALUATION_BATCH` at a time; numpy arrays."""
    size = loop.EVALUATION_BATCH
    parts = [jax.device_get(look(images[at : at + size])) for at in range(0, len(images), size)]
    return Seen(*(np.concatenate(leaves) for leaves in zip(*parts, strict=True)))
