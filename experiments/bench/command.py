"""Running benchmarks: rows that are measured, tables that show them, a record and pictures.

A benchmark is a module with a NamedTuple `Row`, `measured() -> rows`, which yields them one by one, `tabulate(rows) ->
[Table]` and, if there is something to see, `draw(rows) -> Figure`. The README here shows the committed record.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.status import Status

from experiments.bench import record as records
from experiments.bench.figures import GPU_RECORD, README, RECORD, with_figures
from experiments.bench.record import Measured
from experiments.errors import UserError
from experiments.framework import registry
from experiments.framework.pictures import write_png
from experiments.framework.tables import to_rich
from experiments.framework.timing import keep_freed_memory


def run(names: Sequence[str], path: Path | None) -> None:
    """Measure and print tables; if a record is wanted, put them there, the tables in Markdown and pictures beside it.

    What the record holds of other benchmarks stays. UserError if it cannot be written, before anything is measured.
    """
    modules = {name: registry.load_benchmark(name) for name in names}
    record = {} if path is None else open_record(path)
    keep_freed_memory()
    console = Console()
    for name, module in modules.items():
        rows, origin = [], records.provenance_with_peers()
        with Status(name, console=console) as status:
            for row in module.measured():
                rows.append(row)
                status.update(f"{name}: {len(rows)} measured")
        for table in module.tabulate(rows):
            console.print(to_rich(table))
        console.print(records.origin(origin, name), highlight=False)
        if path is not None:
            record[name] = Measured(origin, rows)
            records.write(path, {each: record[each] for each in registry.BENCHMARKS if each in record})
            draw(path, name, rows)


def open_record(path: Path) -> dict[str, Measured]:
    """What the record holds already; its directory is made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        raise UserError(f"--json {path} cannot be written ({error.strerror}): choose another file") from None
    if path.stat().st_size:
        return records.read(path)
    path.unlink()
    return {}


def draw(path: Path, name: str, rows: Sequence) -> None:
    """The benchmark's picture beside the record, if it has one."""
    module = registry.load_benchmark(name)
    if hasattr(module, "draw"):
        write_png(module.draw(rows), path.with_name(f"{path.stem}-{name}.png"), bbox_inches="tight")


def rebuild() -> str:
    """Make the tables, pictures and the README of this room anew from the committed records; what was made."""
    paths = [path for path in (RECORD, GPU_RECORD) if path.exists()]
    for path in paths:
        record = records.read(path)
        records.write(path, record)
        for name, measured in record.items():
            draw(path, name, measured.rows)
    README.write_text(with_figures(README.read_text()))
    return " and ".join(map(str, [README, *(path.with_suffix(".md") for path in paths)]))
