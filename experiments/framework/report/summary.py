"""summary.json: what a run found, and by which protocol."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.framework.experiment import Drawn, Experiment
from experiments.framework.files import compact, read_json, revive, write_json
from experiments.framework.tables import Table
from experiments.framework.verdict import Cell, Verdict

SUMMARY = "summary.json"
WORDS = ("title", "question", "source", "differs")


def write_summary(
    directory: Path,
    experiment: Experiment,
    verdicts: Sequence[Verdict],
    tables: Sequence[Table],
    pictures: Sequence[Drawn],
    protocol: dict[str, Any] | None = None,
) -> None:
    """Write what a run found, as JSON; a number that is not finite becomes null.

    Args:
      directory: the run's.
      experiment: whose words are kept with the result.
      verdicts: one for each claim.
      tables: of the experiment.
      pictures: of the experiment; only their names and words are kept.
      protocol: as `experiments.framework.protocol.protocol_of` has it.
    """
    content = {
        **{name: getattr(experiment, name) for name in WORDS},
        "verdicts": [{**found._asdict(), "cells": [cell._asdict() for cell in found.cells]} for found in verdicts],
        "tables": [table._asdict() for table in tables],
        "pictures": [{"file": one.file, "title": one.title, "caption": one.caption} for one in pictures],
        "protocol": protocol or {},
    }
    write_json(directory / SUMMARY, compact(content))


def read_verdicts(directory: Path) -> list[Verdict]:
    """The verdicts of a finished run."""
    return verdicts_in(read_json(directory / SUMMARY))


def verdicts_in(summary: dict) -> list[Verdict]:
    """The verdicts that a summary holds."""
    found = []
    for entry in summary["verdicts"]:
        none = {name: entry[name] for name in ("needed", "p_value")}  # where null is no number that was not finite
        entry = {**revive(entry), **none}
        found.append(Verdict(**{**entry, "cells": [Cell(**cell) for cell in entry["cells"]]}))
    return found
