"""Running benchmarks: rows that are measured, tables that show them, a record and pictures.

A benchmark is a module with `measured() -> rows`, which yields NamedTuples one by one, `tabulate(rows) -> [Table]` and,
if there is something to see, `draw(rows) -> Figure`.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from rich.console import Console
from rich.status import Status

from experiments.bench.timing import keep_freed_memory
from experiments.errors import UserError
from experiments.framework import registry
from experiments.framework.provenance import commit, hardware, provenance
from experiments.framework.record import write_json
from experiments.framework.tables import to_markdown, to_rich


def run(names: Sequence[str], record: Path | None) -> None:
    """Measure and print tables; if a record is wanted, write it, the tables in Markdown and pictures beside it.

    UserError if `record` cannot be written, before anything is measured.
    """
    modules = {name: registry.load_benchmark(name) for name in names}
    if record is not None and not record.parent.is_dir():
        raise UserError(f"--json {record}: there is no directory {record.parent}; make it first")
    keep_freed_memory()
    console, found, tables, made_from = Console(), {}, [], provenance()
    for name, module in modules.items():
        found[name] = rows = []
        with Status(name, console=console) as status:
            for row in module.measured():
                rows.append(row)
                status.update(f"{name}: {len(rows)} measured")
        shown = module.tabulate(rows)
        tables += shown
        for table in shown:
            console.print(to_rich(table))
        if record is not None:
            plain = {name: [as_json(row) for row in rows] for name, rows in found.items()}
            write_json(record, {"provenance": made_from, "benchmarks": plain})
            made_by = f"{hardware()}; commit {commit()[:12]}; `python -m experiments bench --json FILE`.\n"
            record.with_suffix(".md").write_text("\n\n".join([*map(to_markdown, tables), made_by]))
        if record is not None and hasattr(module, "draw"):
            drawn = module.draw(rows)
            drawn.savefig(record.with_name(f"{record.stem}-{name}.png"), dpi=110, metadata={"Software": None})
            plt.close(drawn)
    console.print(f"{hardware()}; commit {commit()[:12]}")


def as_json(value: object) -> object:
    """NamedTuples as objects, other tuples as lists."""
    if hasattr(value, "_asdict"):
        return as_json(value._asdict())
    if isinstance(value, dict):
        return {key: as_json(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(v) for v in value]
    return value
