"""What several libraries take for the same work: times in turns, and the memory of compiled programs."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from experiments.framework.timing import interleaved, ratio


class Candidate(NamedTuple):
    """The work as one library does it.

    Attributes:
      run: does it once, and waits.
      temporary: bytes that the compiled program allocates while it runs; None where there is no such program.
    """

    run: Callable[[], object]
    temporary: int | None = None


class Comparison(NamedTuple):
    """What was measured.

    Attributes:
      seconds: median per call, by library.
      ours_over: median over the rounds of our time over a library's.
      quartiles: of our seconds.
      temporary: bytes that a compiled program allocates, by library.
    """

    seconds: dict[str, float]
    ours_over: dict[str, float]
    quartiles: tuple[float, float]
    temporary: dict[str, int]


def compare(
    candidates: Mapping[str, Candidate], ours: str, rounds: int, scale: Mapping[str, float] | None = None
) -> Comparison:
    """Time all candidates in turns.

    Args:
      candidates: by library.
      ours: the name of that over which ratios are taken.
      rounds: of turns.
      scale: factors of the times of some candidates, such as a copy that stands for several passes over memory.
    """
    found = interleaved({name: candidate.run for name, candidate in candidates.items()}, rounds)
    found = {name: values * (scale or {}).get(name, 1) for name, values in found.items()}
    jax.clear_caches()
    lower, upper = np.percentile(found[ours], [25, 75])
    return Comparison(
        {name: float(np.median(values)) for name, values in found.items()},
        {name: ratio(found[ours], values) for name, values in found.items()},
        (float(lower), float(upper)),
        {name: one.temporary for name, one in candidates.items() if one.temporary is not None},
    )
