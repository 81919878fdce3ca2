"""What a compiled program costs on accelerators, counted ahead of time on a machine without one.

    python -m experiments bench --aot v5e:2x4 --program layer      # one synchronized layer, 8 TPU chips; a minute
    python -m experiments bench --aot h100:8 --program chain       # convolution, norm, relu, six times, 8 GPUs
    python -m experiments bench --aot v5e:2x2 --program loop       # what a loop over layers keeps
    python -m experiments bench --aot v5e:16x16 --program resnet50 # a train step, 256 chips; minutes an arm
    python -m experiments bench --aot v5e:16x16                    # all four, the cheap ones first

prints for jaxbn, for Flax's BatchNorm and without normalization what one device sends, reads, writes and keeps. TPUs
need the package libtpu, GPUs ("h100:8", "h200:8") JAX's CUDA plugin: `pip install 'jax[cuda12]'`; neither a device.
On a GPU convolutions are cuDNN's and no kernel is chosen by timing it.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from experiments.aot import programs as aot_programs
from experiments.aot.collectives import collectives
from experiments.aot.hlo_bytes import traffic
from experiments.aot.programs import ARMS, compile_chain, compile_layer, compile_loop, compile_step
from experiments.aot.targets import mesh_of
from experiments.bench import memory as bench_memory
from experiments.errors import UserError

GIB, KIB = 2**30, 2**10
FLOAT32 = 4  # bytes


class Cost(NamedTuple):
    """What one device does in one run, from the compiled program.

    Attributes:
      all_reduces: on the path that normally runs.
      rare: all-reduces in loops that run where statistics are badly conditioned.
      payload: bytes of the results of `all_reduces`, parameters' gradients included.
      moved: bytes read from and written to main memory on that path.
      moved_rarely: bytes that one round of each of those loops adds.
      on_chip: bytes read and written beside the cores, where a TPU's compiler keeps what fits.
      temporary: bytes of buffers that live during the run only.
    """

    all_reduces: int
    rare: int
    payload: int
    moved: int
    moved_rarely: int
    on_chip: int
    temporary: int


class Line(NamedTuple):
    """One program to compile.

    Attributes:
      norm: what normalizes, as printed.
      compiled: compiles it.
    """

    norm: str
    compiled: partial


def main(topology: str, program: str = "all") -> None:
    """Compile for a topology, such as "v5e:16x16" or "h100:8", and print one line for each norm."""
    if program != "all" and program not in PROGRAMS:
        raise UserError(f"--program {program!r} is none of {', '.join(PROGRAMS)}, all")
    mesh = mesh_of(topology)
    for name in PROGRAMS if program == "all" else [program]:
        title, unit, lines = PROGRAMS[name](mesh)
        print(f"{title}, on each of {mesh.size} devices ({topology})")
        _table(unit, lines)


def _table(unit, lines):
    """In units of the activation T where there is one, else in GiB."""
    size, label = (GIB, "GiB") if unit is None else (unit, "T")
    heads = "all-reduces", "rare", "KiB sent", f"moved {label}", f"rare {label}", f"on chip {label}", f"kept {label}"
    print(f"{'norm':44}" + "".join(f"{head:>12}" for head in heads))
    for line in lines:
        cost = cost_of(line.compiled())
        volumes = (cost.moved, cost.moved_rarely, cost.on_chip, cost.temporary)
        row = f"{cost.all_reduces:12}{cost.rare:12}{cost.payload / KIB:12.1f}"
        print(f"{line.norm:44}{row}" + "".join(f"{volume / size:12.3f}" for volume in volumes), flush=True)


def layer(mesh: Mesh) -> tuple[str, int, Iterator[Line]]:
    """One layer, its gradients alone and with its output, plain and followed by relu."""

    def lines():
        for output in (False, True):
            for after, activation in (("", None), (" + relu", jax.nn.relu)):
                for arm in ("jaxbn", "jaxbn, fused", "flax") if activation else ("jaxbn", "flax"):
                    norm = ARMS[arm]("data", activation)
                    what = ", output too" if output else ""
                    yield Line(f"{arm}{after}{what}", partial(compile_layer, norm, mesh, output=output))

    shape = aot_programs.LAYER
    size = size_of(shape)
    return f"One layer, gradients; T: {shape} float32, {size / 1e6:.0f} MB", size, lines()


def chain(mesh: Mesh) -> tuple[str, int, Iterator[Line]]:
    """Six convolutions, each with norm and relu."""
    arms = "none", "jaxbn", "jaxbn, fused", "flax"
    shape = aot_programs.CHAIN
    size = size_of(shape)
    lines = (Line(arm, partial(compile_chain, ARMS[arm]("data", jax.nn.relu), mesh)) for arm in arms)
    title = f"{aot_programs.CHAIN_LENGTH} times convolution 3 x 3, norm, relu, gradients"
    return f"{title}; T: {shape} float32, {size / 1e6:.0f} MB", size, lines


def loop(mesh: Mesh) -> tuple[str, int, Iterator[Line]]:
    """Loops over six blocks, each device with a batch of its own: what they keep, without and with the policy."""

    def lines():
        for first, block in (("convolution", bench_memory.convolve_first), ("norm", bench_memory.norm_first)):
            for name, norm in bench_memory.NORMS.items():
                for policy in (False, True):
                    what = f"{name}, {first} first{', policy' if policy else ''}"
                    yield Line(what, partial(compile_loop, bench_memory.loop(block, policy), norm(), mesh))

    shape = aot_programs.LOOP
    size = size_of(shape)
    title = f"A loop over {bench_memory.BLOCKS} blocks of convolution 3 x 3, norm, relu, gradients"
    return f"{title}; T: {shape} float32, {size / 1e6:.0f} MB", size, lines()


def resnet50(mesh: Mesh) -> tuple[str, None, Iterator[Line]]:
    """A train step of ResNet-50."""
    lines = (Line(arm, partial(compile_step, ARMS[arm]("data", None), mesh)) for arm in ("none", "jaxbn", "flax"))
    images = aot_programs.IMAGES_PER_CHIP
    return f"ResNet-50, SGD step, {images} images of 224 x 224, bfloat16 activations", None, lines


PROGRAMS = {"layer": layer, "chain": chain, "loop": loop, "resnet50": resnet50}  # the cheap ones first


def size_of(shape: tuple[int, ...]) -> int:
    """Bytes of an array of float32."""
    return FLOAT32 * math.prod(shape)


def cost_of(compiled: jax.stages.Compiled) -> Cost:
    """Read the cost of a compiled program."""
    text = compiled.as_text()
    sent = [c for c in collectives(text) if c.kind == "all-reduce"]
    normal = [c for c in sent if not c.rare]
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return Cost(len(normal), len(sent) - len(normal), sum(c.bytes for c in normal), *traffic(text), temporary)
