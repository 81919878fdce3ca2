"""One batch-norm layer against every library that is installed, and against the memory's speed.

    python -m experiments bench operation

Evaluation, forward in training mode, and forward plus backward, with and without relu, from the activations of an MLP
to those of a ResNet, in float32 and bfloat16. All programs of a case run in one process, in turns; what is shown are
medians over the rounds of ratios within a round. The floor is the time of the passes over memory that no program can
save (3 forward: x twice, y once; 8 with the backward pass: x and dy twice, dx once more; 2 in evaluation), at the speed
of a copy of x measured in the same rounds; on a CPU whose caches hold x, a program may beat it. Programs are called one
by one, so that small shapes measure the call too.

Columns: the median call of our layer in microseconds; its time over that of Flax's, of the fastest peer and of the
floor; T, the bytes that the compiled program allocates beside arguments and results, in units of x, and Flax's.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments.bench import peers as bench_peers
from experiments.bench.peers import BOTH, EVAL, FORWARD, Case
from experiments.bench.timing import interleaved, ratio
from experiments.framework import plots
from experiments.framework.tables import Table

SHAPES = (
    (60, 100),
    (256, 1024),
    (256, 28, 28, 6),
    (128, 32, 32, 16),
    (32, 56, 56, 64),
    (32, 14, 14, 256),
    (16, 7, 7, 2048),
)
DTYPES = ("float32", "bfloat16")
KINDS = ((EVAL, False), (FORWARD, False), (BOTH, False), (BOTH, True))
PASSES = {EVAL: 2, FORWARD: 3, BOTH: 8}
ROUNDS = 15
FLOOR = "memory floor"
FLAX = "flax.linen"


class Row(NamedTuple):
    """What was measured of one case.

    Attributes:
      case: which.
      seconds: median per call, by library, our own first.
      ours_over: median over the rounds of our time over a library's, the memory floor's among them.
      quartiles: of our seconds.
      temporary: bytes that a compiled program allocates, by library.
    """

    case: Case
    seconds: dict[str, float]
    ours_over: dict[str, float]
    quartiles: tuple[float, float]
    temporary: dict[str, int]

    @property
    def best(self) -> str:
        """The fastest peer."""
        _, *peers = self.seconds
        return min(peers, key=self.seconds.get)


def cases() -> list[Case]:
    """All that are measured."""
    return [Case(shape, dtype, *kind) for dtype, kind, shape in itertools.product(DTYPES, KINDS, SHAPES)]


def measured() -> Iterator[Row]:
    """Every case, one by one."""
    return map(measure, cases())


def measure(case: Case, rounds: int = ROUNDS) -> Row:
    """Time one case in all libraries."""
    programs = bench_peers.programs(case)
    runs = {name: program.run for name, program in programs.items()}
    found = interleaved({**runs, FLOOR: bench_peers.copy(case).run}, rounds)
    jax.clear_caches()
    floor = found.pop(FLOOR) * PASSES[case.mode] / 2
    ours = found[next(iter(found))]
    return Row(
        case,
        {name: float(np.median(values)) for name, values in found.items()},
        {name: ratio(ours, values) for name, values in {**found, FLOOR: floor}.items()},
        tuple(float(v) for v in np.percentile(ours, [25, 75])),
        {name: program.temporary for name, program in programs.items() if program.temporary is not None},
    )


def geometric_mean(values: Sequence[float]) -> float:
    """The n-th root of the product."""
    return math.exp(sum(map(math.log, values)) / len(values))


def tabulate(rows: Sequence[Row]) -> list[Table]:
    """One table for each dtype and kind of run, with geometric means over the shapes."""
    groups = itertools.groupby(rows, key=lambda row: (row.case.dtype, row.case.mode, row.case.relu))
    return [_table(key, list(group)) for key, group in groups]


def _table(key, rows) -> Table:
    dtype, mode, relu = key
    body = [
        [
            _shape(row.case),
            f"{1e6 * row.seconds[next(iter(row.seconds))]:.0f}",
            f"{row.ours_over[FLAX]:.2f}",
            f"{row.ours_over[row.best]:.2f}",
            row.best,
            f"{row.ours_over[FLOOR]:.2f}",
            f"{next(iter(row.temporary.values())) / row.case.bytes:.1f}",
            f"{row.temporary[FLAX] / row.case.bytes:.1f}",
        ]
        for row in rows
    ]
    columns = [[row.ours_over[FLAX] for row in rows], [row.ours_over[row.best] for row in rows]]
    body.append(["geometric mean", "", *(f"{geometric_mean(column):.2f}" for column in columns), "", "", "", ""])
    title = f"{mode}{', relu' if relu else ''}, {dtype}"
    return Table(title, ["x", "us", "/ Flax", "/ best", "best peer", "/ floor", "T", "Flax T"], body)


def _shape(case):
    return "x".join(map(str, case.shape))


def draw(rows: Sequence[Row]) -> Figure:
    """Every library's time over ours, one panel for each dtype and kind of run."""
    groups = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row.case[1:])]
    title = "How many times as long as jaxbn's layer? Above 1 is slower"
    drawn, axes = plots.figure(title, -(-len(groups) // 4), min(4, len(groups)), size=(4.2, 3.6))
    for ax, group in zip(axes.flat, groups, strict=False):
        _, dtype, mode, relu = group[0].case
        for name in dict.fromkeys(name for row in group for name in row.ours_over):
            points = [(number, 1 / row.ours_over[name]) for number, row in enumerate(group) if name in row.ours_over]
            ax.plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=1, label=name)
        ax.set_title(f"{mode}{', relu' if relu else ''}, {dtype}", fontsize=9)
        ax.set_yscale("log", base=2)
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set_xticks(range(len(group)), [_shape(row.case) for row in group], rotation=60, fontsize=7)
    drawn.supylabel("time over jaxbn's, for shapes of x with features last", fontsize=9)
    names = {name: line for ax in axes.flat for line, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    drawn.legend(names.values(), names, loc="outside lower center", ncols=len(names), fontsize=8)
    return drawn
