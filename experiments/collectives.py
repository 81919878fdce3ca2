"""What a compiled program sends between devices, read from its text."""

import math
import re
from functools import partial
from typing import NamedTuple

_KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({_KINDS})(?:-start)?\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_LOOP = re.compile(r"(?:body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|true_computation=([%\w.\-]+), false_computation=([%\w.\-]+)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|called_computations|true_computation|false_computation)"
    r"=\{?([%\w.\-, ]+)"
)


class Collective(NamedTuple):
    """One operation that sends.

    Attributes:
      kind: "all-reduce", "all-gather", "all-to-all", "collective-permute" or "reduce-scatter".
      bytes: of its result on one device.
      in_loop: whether it stands in a while loop, such as the one that measures badly conditioned statistics again.
    """

    kind: str
    bytes: int
    in_loop: bool


def collectives(text: str) -> list[Collective]:
    """Every collective of a compiled program, from `compiled.as_text()`; of alternatives, those that send most."""
    computations = _computations(text)
    for name in _lesser_branches(computations):
        del computations[name]
    looped = _reachable(
        computations, {name for lines in computations.values() for line in lines for name in _LOOP.findall(line)}
    )
    return [
        Collective(match[2], _bytes(match[1]), name in looped)
        for name, lines in computations.items()
        for line in lines
        if (match := _COLLECTIVE.search(line))
    ]


def _lesser_branches(computations) -> set[str]:
    """Computations that only one branch of a conditional runs, where another branch of it sends more."""
    lesser = set()
    for found in (m for lines in computations.values() for line in lines for m in _BRANCHES.findall(line)):
        names = [name.strip().lstrip("%") for part in found for name in part.split(",") if name]
        run = sorted((_reachable(computations, {name}) for name in names), key=partial(_sent, computations))
        lesser |= set().union(*run[:-1]) - run[-1]
    return lesser


def _sent(computations, names):
    matches = (_COLLECTIVE.search(line) for name in names for line in computations[name])
    return sum(_bytes(match[1]) for match in matches if match)


def _computations(text):
    computations, name = {}, None
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            name = start[2]
            computations[name] = []
        elif name:
            computations[name].append(line)
    return computations


def _reachable(computations, names):
    reached, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        if name in reached or name not in computations:
            continue
        reached.add(name)
        for line in computations[name]:
            for called in _CALLED.findall(line):
                waiting += [part.strip().lstrip("%") for part in called.split(",")]
    return reached


def _bytes(shapes):
    """Bytes of an HLO type, such as "(f32[8]{0}, s32[])"."""
    total = 0
    for kind, sizes in _SHAPE.findall(shapes):
        bits = _BITS.get(kind) or int(re.sub(r"\D", "", kind) or 0)
        total += bits // 8 * math.prod(int(size) for size in sizes.split(",") if size)
    return total
