"""The bytes that a compiled program reads and writes where it normally runs, counted from its text.

XLA's own count takes every computation once: a branch that never runs, a loop over badly conditioned statistics, and a
training loop of a thousand steps. Here a loop that counts is taken as often as it runs; a loop that ends when values
say so, as that over badly conditioned statistics does, is taken once and apart; of a conditional the branch that moves
most.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from experiments.aot.hlo import Array, HloModule, Instruction, arrays, elements, parse

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "partition-id",
    "replica-id", "opt-barrier", "optimization-barrier", "domain",
}  # fmt: skip
_FREE_CALLS = {"AllocateBuffer", "ConcatBitcast"}  # a TPU's: they name memory
_SLICES = {"dynamic-slice", "slice", "gather"}
_VIEWS = {"bitcast", "reshape"}


class Move(NamedTuple):
    """What one instruction reads and writes in one run of the program.

    Attributes:
      instruction: whose operands and results these are.
      bytes: read and written in the device's main memory.
      on_chip: bytes read and written in memory beside the cores, where a TPU's compiler places what fits.
      rare: whether it stands in a loop that ends when values say so.
    """

    instruction: Instruction
    bytes: int
    on_chip: int
    rare: bool


class Traffic(NamedTuple):
    """Bytes read and written by one device: in main memory, in the rare loops (a round each), and on the chip."""

    normal: int
    rare: int
    on_chip: int


def traffic(text: str) -> Traffic:
    """Bytes that a program moves, from `compiled.as_text()`.

    Every instruction's operands, each once, and results: fusions, convolutions, collectives, copies, custom calls. A
    slice or an update in place counts what it touches. Padding that TPUs add counts.
    """
    all_moves = moves(text)
    normal = [move for move in all_moves if not move.rare]
    return Traffic(_sum(normal), _sum(move for move in all_moves if move.rare), sum(move.on_chip for move in normal))


def moves(text: str) -> list[Move]:
    """Every instruction that moves bytes, in the order of the text; loops' bodies multiplied by their rounds."""
    program = parse(text)
    return list(_moves(program, program.entry, 1, False))


def _sum(some: Iterable[Move]) -> int:
    return sum(move.bytes for move in some)


def _moves(program: HloModule, name: str, times: int, rare: bool) -> Iterator[Move]:
    for instruction in program.computations[name].values():
        opcode = instruction.opcode
        if opcode == "while":
            rounds = program.rounds(name, instruction)
            body = instruction.attribute("body")
            yield from _moves(program, body, times * (1 if rounds is None else rounds), rare or rounds is None)
        elif opcode == "conditional":
            taken = [list(_moves(program, branch, times, rare)) for branch in instruction.branches()]
            yield from max(taken, key=_sum)
        elif opcode in ("call", "async-start"):
            for called in instruction.called():
                yield from _moves(program, called, times, rare)
        elif not _is_free(instruction):
            touched = list(_touched(program, name, instruction))
            main, on_chip = (times * sum(a.padded for a in touched if a.on_chip == side) for side in (False, True))
            yield Move(instruction, main, on_chip, rare)


def _is_free(instruction: Instruction) -> bool:
    if instruction.opcode == "custom-call":
        return instruction.attribute("custom_call_target") in _FREE_CALLS
    return instruction.opcode in _FREE or instruction.opcode.endswith(("-done", "-update"))


def _touched(program: HloModule, name: str, instruction: Instruction) -> Iterator[Array]:
    """The arrays that an instruction reads and writes, slices at their own size."""
    for operand in dict.fromkeys(instruction.operands):
        part = _part_read(program, instruction, instruction.operands.index(operand))
        yield from _cut(arrays(program.computations[name][operand].shape), part)
    for place, result in enumerate(elements(instruction.result())):
        yield from _cut(arrays(result), _part_written(program, name, instruction, place))


def _cut(whole: list[Array], part: int | None) -> list[Array]:
    """The arrays, or of a single one as many entries as are touched."""
    if part is None:
        return whole
    (array,) = whole
    return [array._replace(padded=min(part, array.size) * array.padded // max(array.size, 1))]


def _part_read(program: HloModule, instruction: Instruction, place: int) -> int | None:
    """Entries read of an operand of which only slices are; None where it is read whole."""
    opcode = instruction.opcode.removesuffix("-start")
    if opcode in _SLICES and place == 0:
        return _size(instruction.result())
    if opcode == "dynamic-update-slice" and place == 0:
        return 0
    if opcode != "fusion":
        return None
    inside = program.computations[instruction.attribute("calls")]
    parameter = next(i for i in inside.values() if i.opcode == "parameter" and int(i.inside) == place)
    views = _views(inside, parameter)
    if any(inside[view].is_root for view in views):
        return None
    parts = [_part_read(program, user, user.operands.index(view)) for view in views for user in _users(inside, view)]
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _views(inside: dict[str, Instruction], instruction: Instruction) -> list[str]:
    """Names under which an instruction's array is used unchanged."""
    names = [instruction.name]
    for name in names:
        names += [user.name for user in inside.values() if name in user.operands and user.opcode in _VIEWS]
    return names


def _users(inside: dict[str, Instruction], name: str) -> list[Instruction]:
    return [user for user in inside.values() if name in user.operands and user.opcode not in _VIEWS]


def _part_written(program: HloModule, name: str, instruction: Instruction, place: int) -> int | None:
    """Entries written of a result of which only a slice is; None where it is written whole."""
    computation = program.computations[name]
    if instruction.opcode == "fusion":
        name = instruction.attribute("calls")
        computation = program.computations[name]
        instruction = next(i for i in computation.values() if i.is_root)
        if instruction.opcode == "tuple":
            instruction = computation[instruction.operands[place]]
        while instruction.opcode in _VIEWS:
            instruction = computation[instruction.operands[0]]
        if instruction.opcode == "fusion":
            return _part_written(program, name, instruction, 0)
    if instruction.opcode != "dynamic-update-slice":
        return None
    return _size(computation[instruction.operands[1]].shape)


def _size(shape: str) -> int:
    return sum(array.size for array in arrays(shape))
