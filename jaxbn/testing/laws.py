"""What a law is, and how a broken one speaks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

# What a law may need of a normalizer, and how the report says that it is not there.
NEEDS = {
    "batch": "statistics over the batch",
    "running": "running statistics",
    "where": "a mask (where=)",
    "weights": "weights (weights=)",
    "scale": "a scale among its params",
    "bias": "a bias among its params",
    "epsilon": "an epsilon",
    "shards": "a version with axis_name",
    "devices": "two devices",
    "channels first": "a version with feature_axis=1",
    "rank 2": "inputs of rank 2",
    "rank 4": "inputs of rank 4",
    "jit": "a function that JAX can trace",
    "gradient": "reverse mode",
    "forward mode": "forward mode",
    "float64": "float64 inputs",
}


class BrokenLawError(AssertionError):
    """A law does not hold: what was expected, what came, and how far apart the two may be.

    Attributes:
      inputs: {name: value} of the smallest failing input, filled in by who drew it.
    """

    def __init__(self, message: str):
        super().__init__(message)
        self.inputs: Mapping[str, Any] = {}


@dataclass(frozen=True, eq=False)
class Law:
    """One invariant as a property check.

    Attributes:
      name: as in `jaxbn.testing`.
      statement: what holds, in a sentence.
      bound: where the tolerance comes from.
      source: who showed it, or where it is promised.
      needs: keys of `NEEDS` without which the law says nothing.
      inputs: inputs(subject) -> {name: hypothesis strategy}, the arguments of `function`.
      function: function(subject, **drawn); raises `BrokenLawError`.
      examples: of the number of examples that were asked for, the share that this law tries.
    """

    name: str
    statement: str
    bound: str
    source: str
    needs: frozenset[str]
    inputs: Callable[[Any], Mapping[str, Any]]
    function: Callable[..., None]
    examples: float

    def __call__(self, norm: Any, **options: Any) -> None:
        """Check this law alone, as `check(norm, laws=[law], **options)`."""
        from jaxbn.testing.runner import check  # check runs laws: it comes after them

        check(norm, laws=[self], **options)

    def __repr__(self) -> str:
        return f"<law {self.name}: {self.statement}>"


LAWS: dict[str, Law] = {}


def law(
    *,
    statement: str,
    bound: str,
    source: str,
    inputs: Callable[[Any], Mapping[str, Any]],
    needs: tuple[str, ...] = (),
    examples: float = 1.0,
) -> Callable[[Callable], Law]:
    """Make a function(subject, **drawn) a law, named after it and listed in `LAWS` in order of definition."""
    unknown = set(needs) - set(NEEDS)
    if unknown:
        raise ValueError(f"needs {sorted(unknown)}; expected some of {sorted(NEEDS)}.")

    def register(function: Callable) -> Law:
        function.__doc__ = function.__doc__ or statement
        made = Law(function.__name__, statement, bound, source, frozenset(needs), inputs, function, examples)
        LAWS[made.name] = made
        return made

    return register


def agree(expected: Any, got: Any, bound: Any, what: str) -> None:
    """Raise `BrokenLawError` unless |got - expected| <= bound everywhere.

    An infinite bound says nothing; a NaN never agrees.

    Args:
      expected: array or number.
      got: of the same shape.
      bound: broadcastable to that.
      what: name of the compared quantity.
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
