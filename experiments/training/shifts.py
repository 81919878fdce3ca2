"""Images that differ from those that a network was trained on: lower contrast, noise, digits from another source."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.errors import UserError
from experiments.training.dataset import Dataset, stratified_split

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
