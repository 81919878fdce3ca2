"""A data set: images and labels in three parts, checked, and with a fingerprint.

Pixels stay bytes in [0, 255] until a batch is drawn; `pixels` then maps them to float32 in [0, 1] by dividing by 255,
which is what the sources of the experiments do (no mean is subtracted). MNIST digits are white on black.
"""

import hashlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.errors import UserError

CLASSES = 10  # of every data set here
MOST_VALIDATION = 5000  # validation examples


class Dataset(NamedTuple):
    """Images [n, height, width, channels] uint8 and labels [n] int32 in three parts.

    Networks train on the first part. Rates, decays and stopping points are chosen on validation, results are on test.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    validation_images: np.ndarray
    validation_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the names, types, shapes and contents of all arrays, in hexadecimal digits."""
        found = hashlib.sha256()
        for name, array in self._asdict().items():
            found.update(f"{name} {array.dtype.str} {array.shape} ".encode())
            found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Numbers of training, validation and test examples."""
        return len(self.train_labels), len(self.validation_labels), len(self.test_labels)


def pixels(images: jax.Array) -> jax.Array:
    """uint8 images of any shape to float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255


def in_three_parts(where: str, train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> Dataset:
    """A data set whose source has two parts: the first 5,000 training examples become the validation part.

    That is what TensorFlow's reader of MNIST did, with which the published figures were made. Where there are fewer
    than 50,000 training examples, the first tenth is taken.

    Args:
      where: the source, for messages.
      train: images [n, height, width, channels] and labels [n].
      test: likewise.

    Raises:
      UserError: a label is none of the classes, a part has too few examples, or the parts' images differ in shape.
    """
    images, labels = _checked(where, "training", *train)
    size = max(1, min(MOST_VALIDATION, len(labels) // 10))
    if len(labels) < 2:
        raise UserError(f"{where} has {len(labels)} training images: it takes 2 at least, one of them for validation")
    test_images, test_labels = _checked(where, "test", *test)
    if images.shape[1:] != test_images.shape[1:]:
        raise UserError(
            f"{where} has training images of {_in_words(images)} and test images of {_in_words(test_images)}: its"
            " files belong to different data sets"
        )
    return Dataset(images[size:], labels[size:], images[:size], labels[:size], test_images, test_labels)


def validation_for_training(dataset: Dataset) -> Dataset:
    """The data set with the validation part in front of the training part, for final runs after everything is chosen.

    The validation part stays beside them; accuracy on it is then accuracy on training examples.
    """
    return dataset._replace(
        train_images=np.concatenate([dataset.validation_images, dataset.train_images]),
        train_labels=np.concatenate([dataset.validation_labels, dataset.train_labels]),
    )


def stratified_split(labels: np.ndarray, per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices of `per_class` examples of every class, drawn with `seed`, and of all the others."""
    generator = np.random.default_rng(seed)
    chosen = [generator.permutation(np.flatnonzero(labels == label))[:per_class] for label in np.unique(labels)]
    first = np.sort(np.concatenate(chosen))
    return first, np.setdiff1d(np.arange(len(labels)), first)


def spread(count: int, of: int) -> np.ndarray:
    """Numbers of `count` examples at equal distances among `of`: a data set may lie sorted by its labels."""
    return np.arange(count) * of // count


def _checked(where: str, part: str, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels as a Dataset holds them."""
    if len(images) != len(labels):
        raise UserError(
            f"{where} has {len(images)} {part} images but {len(labels)} labels: its files belong to different data"
            " sets, get all of them again"
        )
    if not len(images):
        raise UserError(f"{where} has no {part} images: name a directory that holds the data set")
    wrong = np.flatnonzero((labels < 0) | (labels >= CLASSES))
    if len(wrong):
        raise UserError(
            f"{where} has the label {labels[wrong[0]]} at {part} image {wrong[0]}, where labels run from 0 to"
            f" {CLASSES - 1}: use a data set of {CLASSES} classes"
        )
    return images, labels.astype(np.int32)


def _in_words(images: np.ndarray) -> str:
    return " x ".join(map(str, images.shape[1:]))
