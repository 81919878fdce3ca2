"""Which values of an array are normalized together."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Scope(NamedTuple):
    """A way to sort the values of x into the sets that share one mean and one variance.

    Attributes:
      name: how reports and the option `--scope` call it.
      split: x [batch, ..., features] -> [values, sets], one column for each set.
      join: the inverse: join(split(x), x.shape) is x.
    """

    name: str
    split: Callable[[np.ndarray], np.ndarray]
    join: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]

    def size(self, shape: tuple[int, ...]) -> int:
        """How many values of an array of that shape each set has."""
        return len(self.split(np.empty(shape, bool)))


def regrouped(name: str, shape: Callable[[tuple[int, ...]], tuple[int, ...]], axes: tuple[int, ...]) -> Scope:
    """Scope of the values along `axes` of x once it is reshaped to `shape(x.shape)`."""

    def split(x):
        x = np.reshape(x, shape(x.shape))
        front = np.moveaxis(x, axes, range(len(axes)))
        return front.reshape(int(np.prod(front.shape[: len(axes)])), -1)

    def join(values, original):
        middle = shape(original)
        reduced = [axis % len(middle) for axis in axes]
        kept = [size for axis, size in enumerate(middle) if axis not in reduced]
        front = np.reshape(values, [middle[axis] for axis in reduced] + kept)
        return np.moveaxis(front, range(len(axes)), axes).reshape(original)

    return Scope(name, split, join)


def _rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (int(np.prod(shape[:-1])), shape[-1])


BATCH = regrouped("batch", _rows, (0,))
LAYER = regrouped("layer", _rows, (1,))
INSTANCE = regrouped("instance", lambda shape: (shape[0], int(np.prod(shape[1:-1])), shape[-1]), (1,))
EXAMPLE = regrouped("example", lambda shape: (shape[0], int(np.prod(shape[1:]))), (1,))


def group(groups: int) -> Scope:
    """Group normalization (Wu and He 2018): within an example, runs of features, all positions."""

    def shape(original):
        features = original[-1]
        if features % groups:
            raise ValueError(f"scope group:{groups} does not divide {features} features")
        return original[0], int(np.prod(original[1:-1])), groups, features // groups

    return regrouped(f"group:{groups}", shape, (1, 3))


def ghost(size: int) -> Scope:
    """Ghost batches (Hoffer et al. 2017): each run of `size` examples by itself, feature by feature."""

    def shape(original):
        if original[0] % size:
            raise ValueError(f"scope ghost:{size} does not divide a batch of {original[0]}")
        return original[0] // size, size * int(np.prod(original[1:-1])), original[-1]

    return regrouped(f"ghost:{size}", shape, (1,))


SCOPES = {scope.name: scope for scope in (BATCH, LAYER, INSTANCE, EXAMPLE)}
_NUMBERED = {"group": group, "ghost": ghost}


def scope_named(text: str) -> Scope:
    """The scope of that name: a key of `SCOPES`, "group:4" (4 groups) or "ghost:2" (runs of 2 examples).

    Raises:
      ValueError: there is none of that name.
    """
    if text in SCOPES:
        return SCOPES[text]
    kind, _, number = text.partition(":")
    if kind in _NUMBERED and number.isdigit() and int(number) > 0:
        return _NUMBERED[kind](int(number))
    raise ValueError(f"no scope is called {text!r}; there are {', '.join(SCOPES)}, group:N and ghost:N")
