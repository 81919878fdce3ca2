"""Timing programs against each other: in one process, in turns, so that what else the machine does falls on all."""

import ctypes
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import numpy as np

ROUND_SECONDS = 0.02

Result = TypeVar("Result")


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


def interleaved(
    programs: Mapping[str, Callable[[], object]], rounds: int, round_seconds: float = ROUND_SECONDS
) -> dict[str, np.ndarray]:
    """Seconds per call of each program, [rounds]; a program returns when its work is done.

    Each round runs every program, in an order drawn anew: whoever follows a program pays for the memory pages that it
    gave back.

    Args:
      programs: by name.
      rounds: of turns, after calls that compile and warm up.
      round_seconds: a program is repeated within a round until it takes about this long.
    """
    repeats = {name: _repeats(program, round_seconds) for name, program in programs.items()}
    works = {name: partial(_seconds_per_call, program, repeats[name]) for name, program in programs.items()}
    return {name: np.array(seconds) for name, seconds in in_turns(works, rounds).items()}


def in_turns(works: Mapping[str, Callable[[], Result]], rounds: int) -> dict[str, list[Result]]:
    """What each work returns in each round, in an order drawn anew each round."""
    order = np.random.default_rng(0)
    found: dict[str, list[Result]] = {name: [] for name in works}
    for _ in range(rounds):
        for name in order.permutation(list(works)):
            found[name].append(works[name]())
    return found


def _seconds_per_call(program: Callable[[], object], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        program()
    return (time.perf_counter() - began) / repeats


def _repeats(program: Callable[[], object], round_seconds: float) -> int:
    """Calls that fill a round; compiles, warms up and times the program once."""
    program()
    program()
    return max(1, math.ceil(round_seconds / _seconds_per_call(program, 1)))


def ratio(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Median over the rounds of our time over theirs."""
    return float(np.median(ours / theirs))
