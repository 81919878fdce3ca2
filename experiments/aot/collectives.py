"""What a compiled program sends between devices, read from its text."""

from functools import partial
from typing import NamedTuple

from experiments.aot.hlo import HloModule, Instruction, arrays, parse

_KINDS = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


class Collective(NamedTuple):
    """One operation that sends.

    Attributes:
      kind: "all-reduce", "all-gather", "all-to-all", "collective-permute" or "reduce-scatter".
      bytes: of its result on one device.
      in_loop: whether it stands in a while loop of any kind.
      rare: whether it stands in a loop that ends when values say so, as that over badly conditioned statistics does.
    """

    kind: str
    bytes: int
    in_loop: bool
    rare: bool = False


def collectives(text: str) -> list[Collective]:
    """Every collective of a compiled program, from `compiled.as_text()`; of alternatives, those that send most."""
    program = parse(text)
    lesser = _lesser_branches(program)
    loops = [(program.rounds(name, loop), loop.attribute("body")) for name, loop in program.loops()]
    looped = program.reachable(body for _, body in loops)
    rare = program.reachable(body for rounds, body in loops if rounds is None)
    return [
        Collective(_kind(instruction), _sent(instruction), name in looped, name in rare)
        for name, instructions in program.computations.items()
        if name not in lesser
        for instruction in instructions.values()
        if _kind(instruction) in _KINDS
    ]


def _kind(instruction: Instruction) -> str:
    return instruction.opcode.removesuffix("-start")


def _sent(instruction: Instruction) -> int:
    return sum(array.bytes for array in arrays(instruction.result())) if _kind(instruction) in _KINDS else 0


def _lesser_branches(program: HloModule) -> set[str]:
    """Computations that only one branch of a conditional runs, where another branch of it sends more."""
    lesser: set[str] = set()
    conditionals = (i for inside in program.computations.values() for i in inside.values() if i.opcode == "conditional")
    for conditional in conditionals:
        run = sorted((program.reachable({name}) for name in conditional.branches()), key=partial(_total, program))
        lesser |= set().union(*run[:-1]) - run[-1]
    return lesser


def _total(program: HloModule, names: set[str]) -> int:
    return sum(_sent(i) for name in names for i in program.computations[name].values())
