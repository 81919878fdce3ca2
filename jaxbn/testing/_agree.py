"""How a law compares what it expected with what came, and how it says that they differ."""

from collections.abc import Mapping
from typing import Any

import numpy as np


class BrokenLawError(AssertionError):
    """A law does not hold: what was expected, what came, and how far apart the two may be.

    Attributes:
      inputs: {name: value} of the smallest failing input, filled in by the search that found it.
    """

    def __init__(self, message: str):
        super().__init__(message)
        self.inputs: Mapping[str, Any] = {}


class LawDoesNotApplyError(Exception):
    """A law found, while it ran, that it says nothing about this layer; the message says why."""


def agree(expected: Any, got: Any, bound: Any, what: str) -> None:
    """Raise `BrokenLawError` unless |got - expected| <= bound everywhere.

    An infinite bound accepts anything; a NaN never agrees with a finite bound.

    Args:
      expected: array or number.
      got: array or number of the same shape.
      bound: array or number that broadcasts to that shape.
      what: name of the compared quantity, for the message.
    """
    expected, got = np.asarray(expected, np.float64), np.asarray(got, np.float64)
    if expected.shape != got.shape:
        raise BrokenLawError(f"{what} has shape {got.shape}, expected {expected.shape}")
    bound = np.broadcast_to(bound, expected.shape)
    with np.errstate(invalid="ignore"):
        gap = np.abs(got - expected)
        wrong = ~((gap <= bound) | (bound == np.inf))
    if not wrong.any():
        return
    excess = np.where(wrong, np.where(np.isnan(gap), np.inf, gap / np.maximum(bound, 1e-300)), -1)
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    where = f"{what}{list(map(int, worst))}" if worst else what
    raise BrokenLawError(
        f"{where}: expected {expected[worst]:.8g}, got {got[worst]:.8g},"
        f" apart {gap[worst]:.2g}, bound {bound[worst]:.2g}"
    )


def require(condition: Any, message: str) -> None:
    """Raise `BrokenLawError` with the message unless the condition holds."""
    if not condition:
        raise BrokenLawError(message)
