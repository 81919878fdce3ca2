"""What one device does in one run of a compiled program, read from the program."""

from typing import NamedTuple

import jax

from experiments.aot.collectives import collectives
from experiments.aot.hlo import parse, temporary_bytes, text_of
from experiments.aot.hlo_bytes import traffic


class Cost(NamedTuple):
    """What one device does in one run, from the compiled program.

    Attributes:
      collectives: all-reduces, all-gathers and the like, on the path that normally runs.
      rare: those in loops of which values decide the end.
      branches: conditionals, and loops of which values decide the end.
      payload: bytes of the results of `collectives`, parameters' gradients included.
      moved: bytes read from and written to main memory on that path.
      moved_rarely: bytes that one round of each of those loops adds.
      on_chip: bytes read and written beside the cores, where a TPU's compiler keeps what fits.
      temporary: bytes of buffers that live during the run only.
    """

    collectives: int
    rare: int
    branches: int
    payload: int
    moved: int
    moved_rarely: int
    on_chip: int
    temporary: int


def cost_of(compiled: jax.stages.Compiled) -> Cost:
    """Read the cost of a compiled program."""
    text = text_of(compiled)
    sent = collectives(text)
    normal = [c for c in sent if not c.rare]
    temporary = temporary_bytes(compiled)
    payload = sum(c.bytes for c in normal)
    return Cost(len(normal), len(sent) - len(normal), parse(text).branches(), payload, *traffic(text), temporary)
