"""One batch-norm layer against every library that is installed, and against the memory's speed.

    python -m experiments bench operation

Evaluation, forward in training mode, and forward plus backward, with and without relu, from the activations of an MLP
to those of a ResNet, in float32 and bfloat16. All programs of a case run in one process, in turns; what is shown are
medians over the rounds of ratios within a round. The floor is the time of the passes over memory that no program can
save (3 forward: x twice, y once; 8 with the backward pass: x and dy twice, dx once more; 2 in evaluation), at the speed
of a copy of x measured in the same rounds; on a CPU whose caches hold x, a program may beat it. Programs are called one
by one, so that small shapes measure the call too. On accelerators shapes are larger, of a ResNet-50's batch of 128
or 256, which no cache holds, and evaluation is left out.

Columns: the median call of our layer in microseconds; its time over that of Flax's, of the fastest peer and of the
floor; T, the bytes that the compiled program allocates beside arguments and results, in units of x, and Flax's.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from experiments.bench import one_layer
from experiments.bench.compare import compare
from experiments.bench.one_layer import BOTH, EVAL, FORWARD, LayerCall
from experiments.bench.peers import FUSED, LINEN, OURS
from experiments.framework.pictures import LOOK
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
ON_ACCELERATORS = (
    (256, 1024),
    (65536, 1024),
    (128, 56, 56, 256),
    (256, 7, 7, 2048),
)
DTYPES = ("float32", "bfloat16")
KINDS = ((EVAL, False), (FORWARD, False), (BOTH, False), (BOTH, True))
PASSES = {EVAL: 2, FORWARD: 3, BOTH: 8}
ROUNDS = 15
FLOOR = "memory floor"


class Row(NamedTuple):
    """What was measured of one case.

    Attributes:
      case: which.
      seconds: median per call, by library, our own first.
      ours_over: median over the rounds of our time over a library's, the memory floor's among them.
      quartiles: of our seconds.
      temporary: bytes that a compiled program allocates, by library.
    """

    case: LayerCall
    seconds: dict[str, float]
    ours_over: dict[str, float]
    quartiles: tuple[float, float]
    temporary: dict[str, int]

    @property
    def best(self) -> str:
        """The fastest peer."""
        _, *peers = self.seconds
        return min(peers, key=self.seconds.__getitem__)


def cases() -> list[LayerCall]:
    """All that are measured on the platform that is here."""
    on_cpu = jax.default_backend() == "cpu"
    kinds, shapes = (KINDS, SHAPES) if on_cpu else (KINDS[1:], ON_ACCELERATORS)
    return [LayerCall(shape, dtype, *kind) for dtype, kind, shape in itertools.product(DTYPES, kinds, shapes)]


def measured() -> Iterator[Row]:
    """Every case, one by one."""
    return map(measure, cases())


def measure(case: LayerCall, rounds: int = ROUNDS) -> Row:
    """Time one case in all libraries."""
    candidates = one_layer.candidates(case)
    ours = next(iter(candidates))
    floor = {FLOOR: PASSES[case.mode] / 2}  # a copy is two passes
    found = compare({**candidates, FLOOR: one_layer.copy(case)}, ours, rounds, floor)
    seconds = {name: value for name, value in found.seconds.items() if name != FLOOR}
    return Row(case, *found._replace(seconds=seconds))


def geometric_mean(values: Sequence[float]) -> float:
    """The n-th root of the product."""
    return math.exp(sum(map(math.log, values)) / len(values))


def tabulate(rows: Sequence[Row]) -> list[Table]:
    """One table for each dtype and kind of run, with geometric means over the shapes."""
    groups = itertools.groupby(rows, key=lambda row: (row.case.dtype, row.case.mode, row.case.relu))
    return [_table(key, list(group)) for key, group in groups]


def _table(key: tuple[str, str, bool], rows: Sequence[Row]) -> Table:
    dtype, mode, relu = key
    body = [
        [
            shape_in_words(row.case),
            f"{1e6 * row.seconds[next(iter(row.seconds))]:.0f}",
            f"{row.ours_over[LINEN]:.2f}",
            f"{row.ours_over[row.best]:.2f}",
            row.best,
            f"{row.ours_over[FLOOR]:.2f}",
            f"{next(iter(row.temporary.values())) / row.case.bytes:.1f}",
            f"{row.temporary[LINEN] / row.case.bytes:.1f}",
        ]
        for row in rows
    ]
    columns = [[row.ours_over[LINEN] for row in rows], [row.ours_over[row.best] for row in rows]]
    body.append(["geometric mean", "", *(f"{geometric_mean(column):.2f}" for column in columns), "", "", "", ""])
    title = f"{mode}{', relu' if relu else ''}, {dtype}"
    return Table(title, ["x", "us", "/ Flax", "/ best", "best peer", "/ floor", "T", "Flax T"], body)


def shape_in_words(case: LayerCall) -> str:
    """Such as "32x56x56x64"."""
    return "x".join(map(str, case.shape))


def draw(rows: Sequence[Row]) -> Figure:
    """Every library's time over ours, one panel for each dtype and kind of run."""
    ratios = pd.DataFrame(
        [
            {
                "x": shape_in_words(row.case),
                "library": name,
                "time over jaxbn's": 1 / ratio,
                "kind": f"{row.case.mode}{', relu' if row.case.relu else ''}, {row.case.dtype}",
            }
            for row in rows
            for name, ratio in row.ours_over.items()
        ]
    )
    ratios["library"] = ratios["library"].replace(FUSED, OURS)
    with sns.axes_style("ticks", LOOK):
        grid = sns.relplot(
            ratios, x="x", y="time over jaxbn's", hue="library", style="library", col="kind", col_wrap=4, kind="line",
            markers=True, dashes=False, palette="colorblind", height=3, aspect=1.2,
        )  # fmt: skip
    grid.set_titles("{col_name}").set(yscale="log", xlabel="shape of x, features last")
    for ax in grid.axes.flat:
        ax.set_yscale("log", base=2)
        ax.yaxis.set_major_formatter("{x:g}")
        ax.tick_params(axis="x", rotation=60)
    grid.figure.suptitle("How many times as long as jaxbn's layer? Above 1 is slower", y=1.02)
    return grid.figure
