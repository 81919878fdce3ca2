"""Data sets of the Hugging Face hub, at fixed revisions, through the package `datasets`."""

import importlib
import importlib.util
from typing import Any, NamedTuple

import numpy as np

from experiments.errors import UserError

Part = tuple[np.ndarray, np.ndarray]  # images uint8 [n, height, width(, 3)] and labels [n]


class Repository(NamedTuple):
    """Where a data set lies on the hub.

    Attributes:
      name: of the repository.
      revision: the commit that is read.
      column: of the images.
    """

    name: str
    revision: str
    column: str


REPOSITORIES = {
    "mnist": Repository("ylecun/mnist", "77f3279092a1c1579b2250db8eafed0ad422088c", "image"),
    "fashion_mnist": Repository("zalando-datasets/fashion_mnist", "531be5e2ccc9dba0c201ad3ae567a4f3d16ecdd2", "image"),
    "cifar10": Repository("uoft-cs/cifar10", "0b2714987fa478483af9968de7c934580d0bb9a2", "img"),
}


def has_hub() -> bool:
    """Whether the package `datasets` is installed."""
    return importlib.util.find_spec("datasets") is not None


def read_hub(name: str) -> tuple[Part, Part]:
    """Training and test part of a data set of the hub; the package keeps them after the first time."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise UserError("hub: data sets need the package datasets: pip install datasets") from None
    repository = REPOSITORIES[name]
    try:
        loaded = datasets.load_dataset(repository.name, revision=repository.revision)
    except Exception as error:  # the package raises a dozen kinds, of its own and of its dependencies
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"cannot load {repository.name} from the hub ({reason}): check the network, or choose another --data"
        ) from None
    return _columns(loaded["train"], repository.column), _columns(loaded["test"], repository.column)


def _columns(split: Any, column: str) -> Part:
    split = split.with_format("numpy")
    return np.asarray(split[column], np.uint8), np.asarray(split["label"])
