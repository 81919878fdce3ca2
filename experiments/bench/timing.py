"""Timing programs against each other: in one process, in turns, so that what else the machine does falls on all."""

import ctypes
import math
import time
from collections.abc import Callable, Mapping

import numpy as np

ROUND_SECONDS = 0.02  # a program is repeated within a round until it takes about this long


def keep_freed_memory() -> None:
    """Let malloc keep what is freed, for all libraries alike; without glibc, nothing.

    Else it gives the pages of a large array back and faults for fresh ones at the next call, or not, as the heap
    happens to lie: up to half the time of a call, on whichever program it falls. To be called before threads start.
    """
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    for parameter, value in ((trim_threshold, 2**31 - 1), (mmap_threshold, 2**25), (arena_max, 1)):
        mallopt(parameter, value)


def interleaved(programs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds per call of each program, [rounds]; a program returns when its work is done.

    Each round runs every program, first in one order, then in the reverse, so that no program always follows the same.
    """
    repeats = {name: _repeats(program) for name, program in programs.items()}
    names = list(programs)
    seconds = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 else reversed(names):
            began = time.perf_counter()
            for _ in range(repeats[name]):
                programs[name]()
            seconds[name].append((time.perf_counter() - began) / repeats[name])
    return {name: np.array(values) for name, values in seconds.items()}


def _repeats(program) -> int:
    """Calls that fill a round; compiles, warms up and times the program once."""
    program()
    program()
    began = time.perf_counter()
    program()
    return max(1, math.ceil(ROUND_SECONDS / (time.perf_counter() - began)))


def ratio(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Median over the rounds of our time over theirs."""
    return float(np.median(ours / theirs))
