"""Reading and writing IDX files, the format of MNIST (http://yann.lecun.com/exdb/mnist/), plain or gzipped.

An IDX file is two zero bytes, a byte for the element type, a byte for the number of dimensions, the dimensions as
big-endian 32-bit integers, and the elements.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from experiments.errors import UserError
from experiments.training.dataset import Dataset, in_three_parts
from experiments.training.files import cannot_read, write_atomically

UNSIGNED_BYTE = 0x08  # the only element type that the data sets here use
GZIP_MAGIC = b"\x1f\x8b"
MOST_BYTES = 2**30  # that a header may announce; MNIST has 47 million

STEMS = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
SUBDIRECTORIES = ("", "raw", "MNIST/raw", "FashionMNIST/raw")  # as torchvision lays them out


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read a uint8 array with `dimensions` dimensions; UserError if the file is no such thing or is cut short."""
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == GZIP_MAGIC
            file.seek(0)
            if not zipped:
                return _read_open(path, file, dimensions)
            with gzip.open(file) as unzipped:
                return _read_open(path, unzipped, dimensions)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path} ({error}): it is damaged, get it again") from None
    except OSError as error:
        raise cannot_read(path, error) from None


def _read_open(path: Path, file: BinaryIO | gzip.GzipFile, dimensions: int) -> np.ndarray:
    """Reads no more than what the header announces and one byte: what is gzipped may be of any size."""
    magic, header = file.read(4), file.read(4 * dimensions)
    if magic != bytes([0, 0, UNSIGNED_BYTE, dimensions]) or len(header) < 4 * dimensions:
        raise UserError(
            f"{path} is not an IDX file of {dimensions}-dimensional bytes (it starts with"
            f" {magic.hex() or 'nothing'}, not 000008{dimensions:02x}): get it again"
        )
    shape = struct.unpack(f">{dimensions}I", header)
    announced = math.prod(shape)
    if announced > MOST_BYTES:
        raise UserError(f"{path} announces {announced} bytes of data (shape {shape}): it is damaged, get it again")
    content = file.read(announced + 1)
    if len(content) != announced:
        held = f"more than {announced}" if len(content) > announced else str(len(content))
        raise UserError(
            f"{path} holds {held} bytes of data where its header announces {announced} (shape {shape}): it is"
            " truncated or damaged, get it again"
        )
    return np.frombuffer(content, np.uint8).reshape(shape)


class IdxFiles(NamedTuple):
    """Paths of the four files of a data set."""

    train_images: Path
    train_labels: Path
    test_images: Path
    test_labels: Path


def find_idx_files(directory: Path) -> IdxFiles | None:
    """The four files under any of their usual names in `directory`, or in the folders that torchvision makes in it.

    The names are `train-images-idx3-ubyte` and `train-images.idx3-ubyte`, and so on, with or without ".gz".
    None where any is missing.
    """
    for subdirectory in SUBDIRECTORIES:
        found = [_find(directory / subdirectory, stem) for stem in STEMS]
        if all(found):
            return IdxFiles(*[path for path in found if path])
    return None


def _find(directory: Path, stem: str) -> Path | None:
    names = (f"{stem}-ubyte", f"{stem.replace('-idx', '.idx')}-ubyte")
    paths = [directory / (name + suffix) for name in names for suffix in ("", ".gz")]
    return next((path for path in paths if path.is_file()), None)


def read_idx_directory(directory: Path) -> Dataset:
    """A data set from its four IDX files; UserError if any is missing, damaged or of another data set."""
    files = find_idx_files(directory)
    if files is None:
        missing = [f"{stem}-ubyte" for stem in STEMS if _find(directory, stem) is None]
        raise UserError(f"{directory} has no file {missing[0]}(.gz): name a directory that holds the four IDX files")
    train, test = (
        (read_idx(images, 3)[..., None], read_idx(labels, 1))
        for images, labels in ((files.train_images, files.train_labels), (files.test_images, files.test_labels))
    )
    return in_three_parts(str(directory), train, test)


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write a uint8 array; the file appears when it is complete."""
    if array.dtype != np.uint8:
        raise ValueError(f"array has dtype {array.dtype}; expected uint8.")
    header = bytes([0, 0, UNSIGNED_BYTE, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    write_atomically(path, header + array.tobytes())


def write_idx_directory(
    directory: Path, train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]
) -> None:
    """Write images [n, height, width] and labels [n] of both parts, uint8, under their usual names."""
    for stem, array in zip(STEMS, (*train, *test), strict=True):
        write_idx(directory / f"{stem}-ubyte", array)
