"""Fashion-MNIST from Debian's package `dataset-fashion-mnist`, unpacked without installing it.

apt checks the package's signature. Where it is installed, its files lie in one of `DIRECTORIES`.
"""

import shutil
import subprocess
import tempfile
from pathlib import Path

from experiments.errors import UserError
from experiments.training.idx import find_idx_files, read_idx, write_idx_directory

PACKAGE = "dataset-fashion-mnist"
DIRECTORIES = ("/usr/share/datasets/fashion-mnist", "/usr/share/dataset-fashion-mnist")


def has_apt() -> bool:
    """Whether this is a Debian system."""
    return bool(shutil.which("apt-get") and shutil.which("dpkg-deb"))


def fetch_fashion_mnist(directory: Path) -> None:
    """Download the package with apt and write its four IDX files into `directory`; needs no root."""
    with tempfile.TemporaryDirectory() as temporary:
        _run(["apt-get", "download", "-qq", PACKAGE], temporary)
        (package,) = Path(temporary).glob("*.deb")
        _run(["dpkg-deb", "--extract", package.name, "unpacked"], temporary)
        unpacked = Path(temporary, "unpacked")
        files = next(filter(None, (find_idx_files(unpacked / place.lstrip("/")) for place in DIRECTORIES)), None)
        if files is None:
            raise UserError(f"{package.name} holds no IDX files where they are expected: {', '.join(DIRECTORIES)}")
        train = read_idx(files.train_images, 3), read_idx(files.train_labels, 1)
        test = read_idx(files.test_images, 3), read_idx(files.test_labels, 1)
        write_idx_directory(directory, train, test)


def _run(command: list[str], directory: str) -> None:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("E:")]
        reason = said[-1].removeprefix("E: ") if said else f"exit status {done.returncode}"
        raise UserError(
            f"{' '.join(command[:2])} of {PACKAGE} failed ({reason}): run apt-get update, or put the four IDX files of"
            " Fashion-MNIST into a directory and pass --data fashion_mnist:DIRECTORY"
        )
