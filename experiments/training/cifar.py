"""CIFAR-10 from a directory of its binary or its Python version (https://www.cs.toronto.edu/~kriz/cifar.html).

In both, an image is 3,072 bytes: 32 x 32 of red, then of green, then of blue. The binary version puts the label, one
byte, before each image; the Python version is a pickle of {"data": [n, 3072], "labels": list}.
"""

import pickle
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.errors import UserError
from experiments.training.dataset import Dataset, in_three_parts
from experiments.training.files import cannot_read, write_atomically
from experiments.training.unpickle import load_arrays

WIDTH, CHANNELS = 32, 3
IMAGE_BYTES = CHANNELS * WIDTH * WIDTH

Part = tuple[np.ndarray, np.ndarray]  # images uint8 [n, 32, 32, 3] and labels [n]


class CifarFiles(NamedTuple):
    """Paths of the files of a data set."""

    train: tuple[Path, ...]
    test: Path


def find_cifar_files(directory: Path) -> CifarFiles | None:
    """The files of either version in `directory`, or in the folder that its archive makes there; None where missing."""
    for folder, suffix in (("cifar-10-batches-bin", ".bin"), ("cifar-10-batches-py", "")):
        for place in (directory, directory / folder):
            train = tuple(place / f"data_batch_{number}{suffix}" for number in range(1, 6))
            test = place / f"test_batch{suffix}"
            if all(path.is_file() for path in (*train, test)):
                return CifarFiles(train, test)
    return None


def read_cifar_directory(directory: Path) -> Dataset:
    """CIFAR-10 from its files; UserError if any is missing or damaged."""
    files = find_cifar_files(directory)
    if files is None:
        raise UserError(
            f"{directory} does not hold CIFAR-10: name a directory with data_batch_1.bin to data_batch_5.bin and"
            " test_batch.bin, or with the files of the same names without .bin of the Python version"
        )
    parts = [read_cifar_file(path) for path in files.train]
    train = np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])
    return in_three_parts(str(directory), train, read_cifar_file(files.test))


def read_cifar_file(path: Path) -> Part:
    """Images and labels of one file of either version."""
    try:
        if path.suffix == ".bin":
            return _read_binary(path)
        return _read_pickle(path)
    except OSError as error:
        raise cannot_read(path, error) from None


def _read_binary(path: Path) -> Part:
    content = np.fromfile(path, np.uint8)
    if not content.size or content.size % (1 + IMAGE_BYTES):
        raise UserError(
            f"{path} holds {content.size} bytes, which is no multiple of {1 + IMAGE_BYTES}: it is truncated or"
            " damaged, get it again"
        )
    records = content.reshape(-1, 1 + IMAGE_BYTES)
    return _channels_last(records[:, 1:]), records[:, 0]


def _read_pickle(path: Path) -> Part:
    try:
        with path.open("rb") as file:
            content = load_arrays(file)
        # Strings of a pickle that Python 3 wrote are strings.
        data, labels = (
            np.asarray(content[key] if key in content else content[key.decode()]) for key in (b"data", b"labels")
        )
    except (pickle.UnpicklingError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no file of CIFAR-10's Python version ({error}): get it again") from None
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != IMAGE_BYTES or labels.dtype.kind not in "iu":
        raise UserError(
            f"{path} holds data of {data.dtype} {data.shape} and labels of {labels.dtype}, not bytes"
            f" [n, {IMAGE_BYTES}] and whole numbers: get it again"
        )
    return _channels_last(data), labels


def _channels_last(flat: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(flat.reshape(-1, CHANNELS, WIDTH, WIDTH).transpose(0, 2, 3, 1))


def write_cifar_directory(directory: Path, train: Part, test: Part) -> None:
    """Write both parts as the files of the binary version."""
    files = [f"data_batch_{number}.bin" for number in range(1, 6)]
    for name, images, labels in zip(files, np.split(train[0], 5), np.split(train[1], 5), strict=True):
        write_atomically(directory / name, _records(images, labels))
    write_atomically(directory / "test_batch.bin", _records(*test))


def _records(images: np.ndarray, labels: np.ndarray) -> bytes:
    flat = images.transpose(0, 3, 1, 2).reshape(len(images), IMAGE_BYTES)
    return np.concatenate([labels.astype(np.uint8)[:, None], flat], axis=1).tobytes()
