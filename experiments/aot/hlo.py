"""A compiled program, taken apart: its computations, their instructions and what they call, from `as_text()`."""

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|called_computations|true_computation|false_computation)"
    r"=(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|true_computation=([%\w.\-]+), false_computation=([%\w.\-]+)")


class Array(NamedTuple):
    """One array of an instruction's result.

    Attributes:
      size: number of its entries.
      bytes: of its entries.
      padded: bytes in memory, with what the tiles of a TPU add.
      on_chip: whether the compiler placed it in a memory beside the cores instead of the device's main memory.
    """

    size: int
    bytes: int
    padded: int
    on_chip: bool


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      name: unique in its computation.
      shape: the type of its result as text, such as "(f32[8]{0}, s32[])".
      opcode: such as "fusion" or "all-reduce-start".
      inside: the text between its parentheses: operands, or the value of a constant.
      operands: names of instructions in the same computation.
      attributes: the text behind its parentheses: computations called, metadata and so on.
      is_root: whether its result is that of the computation.
    """

    name: str
    shape: str
    opcode: str
    inside: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def attribute(self, name: str) -> str:
        """The text behind `name=`, up to a comma or a space; "" without such an attribute."""
        found = re.search(rf"\b{name}=%?\"?([^\s,\"}}]*)", self.attributes)
        return found[1] if found else ""

    def result(self) -> str:
        """The type of what it writes: `shape` of one that starts an asynchronous operation holds its operands too."""
        parts = elements(self.shape)
        if not self.opcode.endswith("-start") or len(parts) == 1 or self.opcode == "all-reduce-start":
            return self.shape
        return parts[0] if self.opcode == "copy-start" else parts[1]

    def called(self) -> Iterator[str]:
        """Names of the computations that it calls, reducers included."""
        for several, one in _CALLED.findall(self.attributes):
            yield from _names(several or one)

    def branches(self) -> list[str]:
        """Names of the computations of a conditional."""
        found = _BRANCHES.search(self.attributes)
        return [name for part in found.groups() if part for name in _names(part)] if found else []


def _names(text: str) -> list[str]:
    return [part.strip().lstrip("%") for part in text.split(",") if part.strip()]


class HloModule(NamedTuple):
    """A compiled program.

    Attributes:
      entry: name of the computation that runs first.
      computations: instructions by the name of their computation, in the order in which they run.
    """

    entry: str
    computations: dict[str, dict[str, Instruction]]

    def reachable(self, names: Iterable[str]) -> set[str]:
        """The named computations and all that they call."""
        reached, waiting = set(), list(names)
        while waiting:
            name = waiting.pop()
            if name in reached or name not in self.computations:
                continue
            reached.add(name)
            for instruction in self.computations[name].values():
                waiting += instruction.called()
        return reached

    def loops(self) -> Iterator[tuple[str, Instruction]]:
        """Every while loop and the computation in which it stands."""
        for name, instructions in self.computations.items():
            for instruction in instructions.values():
                if instruction.opcode == "while":
                    yield name, instruction

    def branches(self) -> int:
        """How many instructions wait for data: every conditional, and the loops of which values decide the end."""
        instructions = [i for inside in self.computations.values() for i in inside.values()]
        conditionals = sum(instruction.opcode == "conditional" for instruction in instructions)
        return conditionals + sum(self.rounds(*loop) is None for loop in self.loops())

    def rounds(self, computation: str, loop: Instruction) -> int | None:
        """How often a loop's body runs; None where values decide, as for badly conditioned statistics.

        `lax.scan` and `lax.fori_loop` count: XLA says so on CPU and GPU; for TPUs the condition compares a counter
        with a constant.
        """
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[loop.attribute("condition")]
        last = next(i for i in condition.values() if i.is_root)
        if last.opcode != "compare" or last.attribute("direction") != "LT":
            return None
        counter, bound = (condition[name] for name in last.operands)
        if counter.opcode != "get-tuple-element" or bound.opcode != "constant" or not bound.shape.startswith("s32"):
            return None
        return int(bound.inside) - self._start(computation, loop, int(counter.attribute("index")))

    def _start(self, computation: str, loop: Instruction, index: int) -> int:
        instructions = self.computations[computation]
        start = instructions[instructions[loop.operands[0]].operands[index]]
        while start.opcode == "copy":
            start = instructions[start.operands[0]]
        return int(start.inside) if start.opcode == "constant" else 0


def text_of(compiled: jax.stages.Compiled) -> str:
    """The program's text, as `parse` reads it; ValueError where XLA gives none."""
    text = compiled.as_text()
    if text is None:
        raise ValueError("this program has no text: XLA gives none on this platform.")
    return text


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes that the program allocates beside arguments and results; ValueError where XLA does not say."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise ValueError("XLA does not say what memory this program takes on this platform.")
    return analysis.temp_size_in_bytes


def parse(text: str) -> HloModule:
    """The program whose `compiled.as_text()` this is; ValueError if it is none."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            current = computations.setdefault(start[2], {})
            entry = start[2] if start[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            instruction = _instruction(match[2], line[match.end() :], is_root=bool(match[1]))
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError(f"no ENTRY computation in a text of {len(text)} characters; expected compiled.as_text().")
    return HloModule(entry, computations)


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    end = _closing(text) if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].strip()
    opcode, inside = rest[: rest.index("(")], rest[rest.index("(") :]
    end = _closing(inside)
    inside, attributes = inside[1 : end - 1], inside[end:]
    return Instruction(name, shape, opcode, inside, tuple(re.findall(r"%([\w.\-]+)", inside)), attributes, is_root)


def _closing(text: str) -> int:
    """Where the parenthesis that text begins with is closed, and one further."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return place + 1
    raise ValueError(f"a parenthesis is never closed: {text[:80]!r}")


def elements(shape: str) -> list[str]:
    """The types in a tuple's type; of any other type, itself alone."""
    if not shape.startswith("("):
        return [shape]
    parts, depth, begin = [], 0, 1
    for place, character in enumerate(shape):
        if character in ",)" and depth == 1:
            parts.append(shape[begin:place])
            begin = place + 1
        depth += (character in "([{") - (character in ")]}")
    return [re.sub(r"/\*.*?\*/", "", part).strip() for part in parts if part.strip()]


def arrays(shape: str) -> list[Array]:
    """The arrays of a type, tuples flattened."""
    return [_array(*found) for found in _ARRAY.findall(shape)]


def _array(kind: str, dimensions: str, layout: str) -> Array:
    sizes = [int(size.strip("<=")) for size in dimensions.split(",") if size]
    tile = _TILE.search(layout)
    stored = _padded(sizes, layout, [int(size) for size in tile[1].split(",")]) if tile else sizes
    size, places, bits = math.prod(sizes), math.prod(stored), _bits(kind)
    return Array(size, -(-bits * size // 8), -(-bits * places // 8), bool(re.search(r"S\([1-9]", layout)))


def _padded(sizes: list[int], layout: str, tile: list[int]) -> list[int]:
    """Sizes in the order of memory, the last of them rounded up to whole tiles."""
    order = [int(axis) for axis in layout.split(":")[0].split(",") if axis]
    sizes = [1] * (len(tile) - len(sizes)) + [sizes[axis] for axis in reversed(order)]
    split = len(sizes) - len(tile)
    return sizes[:split] + [-(-size // unit) * unit for size, unit in zip(sizes[split:], tile, strict=True)]


def _bits(kind: str) -> int:
    if kind == "pred":
        return 8
    number = re.match(r"[a-z]+(\d+)", kind)  # f8e4m3fn has 8
    return int(number[1]) if number else 0
