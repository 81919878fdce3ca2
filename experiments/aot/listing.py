"""The programs that are compiled ahead of time, with each norm: a title, the unit of the bytes, and the lines.

The unit is the activation T where there is one, else None.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from experiments.aot import programs as aot_programs
from experiments.aot.programs import ARMS, compile_chain, compile_layer, compile_loop, compile_step
from experiments.bench.peers import WITH_RELU
from experiments.training import conv_chain

FLOAT32 = 4  # bytes


class Line(NamedTuple):
    """One program to compile.

    Attributes:
      norm: what normalizes, as printed.
      compiled: compiles it.
    """

    norm: str
    compiled: partial


def layer(mesh: Mesh) -> tuple[str, int, Iterator[Line]]:
    """One layer, its gradients alone and with its output, plain and followed by relu."""

    def lines() -> Iterator[Line]:
        for output in (False, True):
            for after, activation in (("", None), (" + relu", jax.nn.relu)):
                for arm in ("jaxbn", "jaxbn, fused", "flax") if activation else ("jaxbn", "jaxbn, masked", "flax"):
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

    def lines() -> Iterator[Line]:
        for first, block in (("convolution", conv_chain.convolve_first), ("norm", conv_chain.norm_first)):
            for name, norm in WITH_RELU.items():
                for policy in (False, True):
                    what = f"{name}, {first} first{', policy' if policy else ''}"
                    yield Line(what, partial(compile_loop, conv_chain.loop(block, policy), norm(), mesh))

    shape = aot_programs.LOOP
    size = size_of(shape)
    title = f"A loop over {conv_chain.BLOCKS} blocks of convolution 3 x 3, norm, relu, gradients"
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
