"""How long a program takes to lower and to compile, and how large it is, with every library's layer.

    python -m experiments bench compile

One layer, twenty times a 3 x 3 convolution, the norm and relu, both with gradients, and a train step of ResNet-50 with
bfloat16 activations, for the device that is here. All in one process, in an order drawn anew each round, JAX's caches
emptied before each. Lines are those of the compiled program's text; branches are its conditionals and the loops of
which values decide the end: on a GPU the host waits for each.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

import jaxbn
from experiments.aot import programs as aot_programs
from experiments.aot.hlo import parse, text_of
from experiments.bench.peers import OURS, followed_by, installed
from experiments.framework.tables import Table
from experiments.framework.timing import in_turns, ratio
from experiments.training import conv_chain

SHAPE = (32, 56, 56, 64)
BLOCKS = 20
NONE = "no normalization"

Lowerable = tuple[Any, tuple]  # a function with `lower`, as `jax.jit` makes it, and its arguments


class Row(NamedTuple):
    """What was measured of one program.

    Attributes:
      name: of the program.
      lower: median seconds to trace and lower, by library.
      compile: median seconds to compile what was lowered.
      ours_over: median over the rounds of our time for both over a library's.
      lines: of the compiled program's text.
      branches: its conditionals, and its loops of which values decide the end.
    """

    name: str
    lower: dict[str, float]
    compile: dict[str, float]
    ours_over: dict[str, float]
    lines: dict[str, int]
    branches: dict[str, int]


class Built(NamedTuple):
    """One time that a program was lowered and compiled: seconds, lines and branches as in Row."""

    lower: float
    compile: float
    lines: int
    branches: int


def layer(norm: jaxbn.Normalizer) -> Lowerable:
    """One layer with relu: y, the gradients by x and parameters, the new statistics."""
    x = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    variables = jax.eval_shape(lambda key: norm.init(key, x), jax.random.key(0))

    def both(params: Any, batch_stats: Any, x: jax.Array, dy: jax.Array) -> tuple:
        def forward(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
            return norm.apply({"params": params, "batch_stats": batch_stats}, x, train=True)

        y, pull, moved = jax.vjp(forward, params, x, has_aux=True)
        return y, pull(dy), moved

    return jax.jit(both), (variables["params"], variables["batch_stats"], x, x)


def chain(norm: jaxbn.Normalizer) -> Lowerable:
    """BLOCKS convolutions, each with norm and relu, and the gradients."""
    x, units = jax.ShapeDtypeStruct(SHAPE, jnp.float32), [conv_chain.unit_shapes(norm, SHAPE)] * BLOCKS
    return jax.jit(conv_chain.gradient_of(partial(conv_chain.written_out, norm))), (x, units, x)


def resnet50(norm: jaxbn.Normalizer) -> Lowerable:
    """A train step on 32 images of 224 x 224; its relu is the network's, not the norm's."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    return aot_programs.train_step(norm, mesh, "jit", 50, aot_programs.IMAGE)


class CompiledProgram(NamedTuple):
    """What is compiled and how often.

    Attributes:
      build: of a norm.
      fused: whether relu is the norm's.
      rounds: of turns.
    """

    build: Callable[[jaxbn.Normalizer], Lowerable]
    fused: bool
    rounds: int


PROGRAMS = {
    "one layer and relu": CompiledProgram(layer, True, 7),
    f"{BLOCKS} times convolution, norm, relu": CompiledProgram(chain, True, 3),
    "train step of ResNet-50": CompiledProgram(resnet50, False, 2),
}


def measured() -> Iterator[Row]:
    """Every program, one by one."""
    return map(measure, PROGRAMS)


def measure(name: str, rounds: int | None = None) -> Row:
    """Lower and compile one program with every library's layer."""
    program = PROGRAMS[name]
    relu = jax.nn.relu if program.fused else None
    norms = {OURS: jaxbn.batch_norm(activation=relu)}
    norms |= {library: followed_by(norm, relu) for library, norm in {NONE: jaxbn.identity(), **installed()}.items()}
    works = {library: partial(build, program.build, norm) for library, norm in norms.items()}
    found = in_turns(works, rounds or program.rounds)
    both = {library: np.array([one.lower + one.compile for one in some]) for library, some in found.items()}
    return Row(
        name,
        {library: float(np.median([one.lower for one in some])) for library, some in found.items()},
        {library: float(np.median([one.compile for one in some])) for library, some in found.items()},
        {library: ratio(both[OURS], values) for library, values in both.items()},
        {library: some[0].lines for library, some in found.items()},
        {library: some[0].branches for library, some in found.items()},
    )


def build(program: Callable[[jaxbn.Normalizer], Lowerable], norm: jaxbn.Normalizer) -> Built:
    """Lower and compile once, from nothing."""
    jax.clear_caches()
    function, arguments = program(norm)
    began = time.perf_counter()
    lowered = function.lower(*arguments)
    halfway = time.perf_counter()
    compiled = lowered.compile()
    ended = time.perf_counter()
    text = text_of(compiled)
    return Built(halfway - began, ended - halfway, len(text.splitlines()), parse(text).branches())


def tabulate(rows: Sequence[Row]) -> list[Table]:
    """One table a program; all figures beside every library's."""
    columns = ["norm", "lower, s", "compile, s", "jaxbn / this", "lines", "jaxbn's lines / this", "branches"]
    tables = []
    for row in rows:
        body = [
            [
                library,
                f"{row.lower[library]:.2f}",
                f"{row.compile[library]:.2f}",
                f"{row.ours_over[library]:.2f}",
                str(row.lines[library]),
                f"{row.lines[OURS] / row.lines[library]:.2f}",
                str(row.branches[library]),
            ]
            for library in row.lines
        ]
        tables.append(Table(f"To compile: {row.name}", columns, body))
    return tables
