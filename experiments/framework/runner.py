"""Running one experiment from its settings to its pictures."""

from pathlib import Path
from types import ModuleType

from rich.console import Console

from experiments.framework.display import progress, show_tables, show_verdicts
from experiments.framework.provenance import provenance
from experiments.framework.record import open_record
from experiments.framework.report import write_summary
from experiments.training import data


def run_experiment(module: ModuleType, name: str, preset: str, settings: dict, directory: Path) -> None:
    """Run the experiment in `directory` or continue it there, then judge, draw and print it.

    A finished run is not trained again: its rows are judged, drawn and printed anew.
    """
    config = {"experiment": name, "preset": preset, "settings": settings, "provenance": provenance()}
    if "data" in settings and not (directory / "summary.json").exists():
        data.load(settings["data"])  # before a directory is made that could not be used
    record = open_record(directory, config)
    console = Console()
    console.print(f"{name}, preset {preset}, {settings['seeds']} seeds, in {directory}", highlight=False)
    if not record.finished:
        with progress(console) as track:
            module.run(settings, record, track)
        record.close()
    rows = record.rows()
    verdicts, tables = module.judge(settings, rows), module.tabulate(settings, rows)
    pictures = module.draw(settings, rows, directory)
    write_summary(directory, verdicts, tables, pictures)
    show_tables(console, tables)
    show_verdicts(console, verdicts)
    console.print(f"\nPictures: {', '.join(str(directory / picture.file) for picture in pictures)}", highlight=False)
