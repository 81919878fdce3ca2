"""What batch norm keeps in memory for the backward pass, and what a checkpoint policy leaves of it.

    python -m experiments bench memory

Six blocks of a 3 x 3 convolution, a norm and relu, and one gradient by their input and parameters; with jaxbn's norm,
with jaxbn's and relu fused into it, with Flax's; each as it is, and under `jax.checkpoint` with the policy
`jaxbn.dots_and_statistics_saveable`. Everything is counted, nothing timed: what JAX records, and the temporary bytes of
programs compiled for a CPU. The unit T is one activation.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax

import jaxbn
from experiments.aot import hlo
from experiments.bench.peers import LINEN as PEER
from experiments.bench.peers import WITH_RELU as NORMS
from experiments.framework.tables import Table
from experiments.training.conv_chain import (
    BLOCKS,
    Chain,
    arguments,
    compile_gradient,
    convolve_first,
    loop,
    norm_first,
    unrolled,
)

FLOAT32 = 4  # bytes
SHAPE = (32, 56, 56, 64)
CONVOLUTION_FIRST = "a loop over convolution, norm, relu"
NORM_FIRST = "a loop over norm, relu, convolution"
UNROLLED = "convolution, norm, relu, unrolled"
NOTES = {
    CONVOLUTION_FIRST: "The loop keeps what it carries, the outputs of relu, whatever the policy says.",
    NORM_FIRST: "The loop carries the norm's input, and under the policy keeps nothing else.",
    UNROLLED: "No gain from the policy here: XLA for CPUs drops the barriers that keep recomputation apart, takes the"
    " forward pass's values instead, and copies what JAX marks as kept.",
}


class Row(NamedTuple):
    """What was counted of one norm.

    Attributes:
      norm: one of NORMS.
      policy: whether under the checkpoint policy.
      shape: of an activation, [batch, height, width, channels].
      recorded: bytes of activations that `jax.vjp` of the unrolled chain keeps, in T.
      temporary: bytes that a compiled gradient allocates beside its arguments and results, by program.
    """

    norm: str
    policy: bool
    shape: tuple[int, ...]
    recorded: float
    temporary: dict[str, int]


def measured() -> Iterator[Row]:
    """Every norm without and with the policy, one by one."""
    return (measure(name, policy, SHAPE) for name in NORMS for policy in (False, True))


def measure(name: str, policy: bool, shape: tuple[int, ...]) -> Row:
    """Count one norm.

    Args:
      name: one of NORMS.
      policy: whether to checkpoint.
      shape: of an activation, [batch, height, width, channels], float32.
    """
    norm = NORMS[name]()
    temporary = {title: temporary_bytes(partial(chain, norm), norm, shape) for title, chain in programs(policy).items()}
    return Row(name, policy, shape, recorded(partial(unrolled(policy), norm), norm, shape), temporary)


def recorded(chain: Callable, norm: jaxbn.Normalizer, shape: tuple[int, ...]) -> float:
    """Bytes of activations kept by `jax.vjp` of `chain(x, units) -> (y, moved)`, in T; `shape` is x's."""
    x, units = arguments(norm, shape)
    kept = jax.tree.leaves(jax.eval_shape(lambda x, units: jax.vjp(chain, x, units, has_aux=True)[1], x, units))
    return sum(_bytes(array) for array in kept if array.size >= x.size) / _bytes(x)


def temporary_bytes(chain: Callable, norm: jaxbn.Normalizer, shape: tuple[int, ...]) -> int:
    """Bytes that one compiled gradient of <y, dy> allocates while it runs, y that of `chain(x, units)`."""
    return hlo.temporary_bytes(compile_gradient(chain, *arguments(norm, shape)))


def programs(policy: bool) -> dict[str, Chain]:
    """The chains `(norm, x, units) -> (y, moved)` of which gradients are compiled, by title."""
    return {
        CONVOLUTION_FIRST: loop(convolve_first, policy),
        NORM_FIRST: loop(norm_first, policy),
        UNROLLED: unrolled(policy),
    }


def tabulate(rows: Sequence[Row]) -> list[Table]:
    """What is recorded, then a table a program; shares are of what Flax takes without the policy."""
    peer = next(row for row in rows if row.norm == PEER and not row.policy)
    unit, where = activation_bytes(peer.shape), _where(peer.shape)
    body = [[label(row), f"{row.recorded:.1f}", f"{row.recorded / peer.recorded:.0%}"] for row in rows]
    note = f"{where} Zeros of relu's derivative are among what is recorded; XLA makes them where it uses them."
    tables = [Table("What JAX records of the unrolled chain", ["", "T", "of Flax's"], body, note)]
    for title, whole in peer.temporary.items():
        body = [
            [label(row), f"{found / 1e6:.1f}", f"{found / unit:.1f}", f"{found / whole:.0%}"]
            for row in rows
            for found in (row.temporary[title],)
        ]
        columns = ["", "MB", "T", "of Flax's"]
        tables.append(Table(f"Temporary bytes of one gradient: {title}", columns, body, f"{where} {NOTES[title]}"))
    return tables


def label(row: Row) -> str:
    """The norm of a row, and whether the policy was around it."""
    return f"{row.norm}, under the policy" if row.policy else row.norm


def _where(shape: tuple[int, ...]) -> str:
    size = " x ".join(map(str, shape))
    return f"{BLOCKS} blocks of {size}, float32; compiled for a CPU."


def activation_bytes(shape: tuple[int, ...]) -> int:
    """Of a float32 array of that shape."""
    return FLOAT32 * math.prod(shape)


def _bytes(array: jax.ShapeDtypeStruct) -> int:
    return array.size * array.dtype.itemsize
