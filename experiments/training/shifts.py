"""Images that differ from those that a network was trained on: lower contrast, noise, digits from another source."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.errors import UserError
from experiments.training.dataset import Dataset, pixels, spread, stratified_split

NAMES = NONE, LOW_CONTRAST, NOISY, OTHER = "no shift", "low contrast", "noise", "other digits"
CONTRAST = 0.3  # what is left of each pixel's distance from mid-gray
NOISE = 0.5  # standard deviation, of pixels in [0, 1]
OTHER_TEST, OTHER_VALIDATION = 100, 20  # images of each kind among the other digits
OTHER_TEST_SEED, OTHER_VALIDATION_SEED = 1797, 1798


def lower_contrast(x: Array) -> Array:
    """Pixels in [0, 1] drawn towards mid-gray."""
    return 0.5 + CONTRAST * (x - 0.5)


def add_noise(x: Array, key: Array) -> Array:
    """Pixels in [0, 1] with Gaussian noise, clipped to the same range."""
    return jnp.clip(x + NOISE * jax.random.normal(key, x.shape), 0, 1)


@functools.cache
def other_digits() -> Dataset:
    """1,797 digits of another source, made to look like MNIST's: 597 / 200 / 1,000, fixed and stratified.

    Thirteen people wrote them into forms, and they have 8 x 8 pixels: the test part of Alpaydin and Kaynak 1998,
    Optical Recognition of Handwritten Digits, which comes with scikit-learn, which mlxtend needs. They are enlarged to
    20 x 20 pixels and put into the middle of 28 x 28, which is how MNIST's digits lie.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "the other digits ship inside scikit-learn, which is not installed: pip install scikit-learn"
        ) from None
    found = load_digits()
    small = jnp.asarray(found.images[..., None], jnp.float32) * (255 / 16)
    large = jax.image.resize(small, (len(small), 20, 20, 1), "linear")
    images = np.asarray(jnp.pad(jnp.round(large), ((0, 0), (4, 4), (4, 4), (0, 0)))).astype(np.uint8)
    labels = found.target.astype(np.int32)
    test, rest = stratified_split(labels, OTHER_TEST, OTHER_TEST_SEED)
    validation, train = (rest[part] for part in stratified_split(labels[rest], OTHER_VALIDATION, OTHER_VALIDATION_SEED))
    return Dataset(*(array[part] for part in (train, validation, test) for array in (images, labels)))


Images = tuple[Array, np.ndarray]  # float32 in [0, 1], and their labels


def shifted(images: Array, labels: np.ndarray, key: Array) -> dict[str, Images]:
    """Images of the source by the NAMES of what is done to them."""
    return {
        NONE: (images, labels),
        LOW_CONTRAST: (lower_contrast(images), labels),
        NOISY: (add_noise(images, key), labels),
    }


def pools_and_tests(source: Dataset, count: int) -> tuple[Mapping[str, Images], Mapping[str, Images]]:
    """For each of NAMES images to adapt to, which are not tested on, and at most `count` images to test on."""
    other = other_digits()
    pool = pixels(jnp.asarray(source.validation_images)), source.validation_labels
    tested = spread(min(count, len(source.test_labels)), len(source.test_labels))
    test = pixels(jnp.asarray(source.test_images[tested])), source.test_labels[tested]
    others = pixels(jnp.asarray(other.train_images)), other.train_labels
    tested = spread(min(count, len(other.test_labels)), len(other.test_labels))
    other_test = pixels(jnp.asarray(other.test_images[tested])), other.test_labels[tested]
    return (
        {**shifted(*pool, jax.random.key(0)), OTHER: others},
        {**shifted(*test, jax.random.key(1)), OTHER: other_test},
    )


def drawn(labels: np.ndarray, seed: int, count: int, of_one: int) -> np.ndarray:
    """Numbers of images, drawn anew for each seed: [2, count], of all digits and (the first `of_one`) of one digit."""
    draw = np.random.default_rng(seed)
    all_digits = draw.permutation(len(labels))[:count]
    one_digit = draw.permutation(np.flatnonzero(labels == seed % 10))[:of_one]
    return np.stack([all_digits, np.resize(one_digit, count)])
