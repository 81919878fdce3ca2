"""The figures of this room's README, made from the committed record.

Each stands between two marks, `<!-- NAME -->` and `<!-- end of NAME -->`. `python -m experiments bench --tables` writes
them; a test says when README and record differ.
"""

import itertools
import re
from collections.abc import Callable
from pathlib import Path

from experiments.aot import record as aot_record
from experiments.bench import accuracy, compile, grid, memory, operation, steps
from experiments.bench.one_layer import BOTH, FORWARD
from experiments.bench.peers import LINEN, OURS
from experiments.bench.record import Measured, origin, read
from experiments.framework.tables import Table, to_markdown

README = Path(__file__).with_name("README.md")
RESULTS = Path(__file__).parents[1] / "results" / "bench"
RECORD = RESULTS / "record.json"
GPU_RECORD = RESULTS / "gpu.json"
AHEAD_OF_TIME = RESULTS / "aot.json"

Record = dict[str, Measured]


def with_figures(text: str) -> str:
    """The README's text, with what the committed record says between the marks."""
    return re.sub(
        r"<!-- (\w+) -->\n.*?<!-- end of \1 -->",
        lambda match: f"<!-- {match[1]} -->\n{FIGURES[match[1]]()}\n<!-- end of {match[1]} -->",
        text,
        flags=re.S,
    )


def _shown(
    name: str, tables: Callable[[list], list[Table]], path: Callable[[], Path] = lambda: RECORD
) -> Callable[[], str]:
    """Tables of one benchmark with where they come from; a sentence where it was not recorded yet."""

    def shown() -> str:
        record = read(path()) if path().exists() else {}
        if name not in record:
            return f"Not recorded yet: `python -m experiments bench {name} --json {path().name}`."
        measured = record[name]
        return "\n\n".join([*map(to_markdown, tables(measured.rows)), origin(measured.provenance, name)])

    return shown


def speed(rows: list[operation.Row]) -> list[Table]:
    """Our layer's time over Flax's and over that of the fastest peer, a row for each shape."""
    kinds = [(dtype, *kind) for dtype in operation.DTYPES for kind in ((FORWARD, False), (BOTH, False), (BOTH, True))]
    columns = ["x", *(f"{dtype}: {mode}{', relu' if relu else ''}" for dtype, mode, relu in kinds)]
    of = {(row.case.shape, row.case.dtype, row.case.mode, row.case.relu): row for row in rows}
    shapes = list(dict.fromkeys(row.case.shape for row in rows))
    body = [[" x ".join(map(str, shape)), *(_over_two(of[shape, *kind]) for kind in kinds)] for shape in shapes]
    means = []
    for kind in kinds:
        some = [of[shape, *kind] for shape in shapes]
        over_flax, over_best = (
            operation.geometric_mean([over(row) for row in some])
            for over in (lambda row: row.ours_over[LINEN], lambda row: row.ours_over[row.best])
        )
        means.append(f"{over_flax:.2f} / {over_best:.2f}")
    note = (
        f"Time over flax.linen's / over that of the fastest peer of each row; below 1 is faster. Medians of"
        f" {operation.ROUNDS} interleaved rounds in one process."
    )
    return [Table("One layer", columns, [*body, ["geometric mean", *means]], note)]


def _over_two(row: operation.Row) -> str:
    return f"{row.ours_over[LINEN]:.2f} / {row.ours_over[row.best]:.2f}"


def step_times(rows: list[steps.Row]) -> list[Table]:
    """Our milliseconds a step, and our time over that with every other layer."""
    names = list(dict.fromkeys(name for row in rows for name in row.seconds if name != OURS))
    body = [
        [
            row.name,
            f"{1e3 * row.seconds[OURS]:.2f}",
            *(f"{row.ours_over[name]:.2f}" if name in row.ours_over else "" for name in names),
        ]
        for row in rows
    ]
    return [Table("A training step, SGD", ["network", "jaxbn, ms", *(f"over {n}" for n in names)], body)]


def kept(rows: list[memory.Row]) -> list[Table]:
    """What the gradient of a loop over blocks allocates, and what JAX records of them written out, in activations."""
    size = memory.activation_bytes(rows[0].shape)
    body = [
        [
            memory.label(row),
            f"{row.recorded:.1f}",
            *(f"{row.temporary[title] / size:.1f}" for title in memory.NOTES),
        ]
        for row in rows
    ]
    note = "In units of one activation; the last columns are temporary bytes of the compiled gradient."
    return [Table("Memory of six blocks", ["norm", "recorded", *memory.NOTES], body, note)]


def ahead_of_time() -> str:
    """What was counted of programs for accelerators."""
    if not AHEAD_OF_TIME.exists():
        return "Not recorded yet: `python -m experiments bench --aot h100:8 --json aot.json`."
    entries = aot_record.read(AHEAD_OF_TIME)
    return "\n\n".join(itertools.chain.from_iterable(aot_record.in_markdown(entry) for entry in entries))


FIGURES: dict[str, Callable[[], str]] = {
    "accuracy": _shown("accuracy", lambda rows: accuracy.tabulate(rows)[:1]),
    "speed": _shown("operation", speed),
    "steps": _shown("steps", step_times),
    "grid": _shown("grid", grid.tabulate),
    "compile": _shown("compile", compile.tabulate),
    "memory": _shown("memory", kept),
    "gpu_speed": _shown("operation", speed, lambda: GPU_RECORD),
    "gpu_steps": _shown("steps", step_times, lambda: GPU_RECORD),
    "accelerators": ahead_of_time,
}
