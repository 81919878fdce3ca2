"""summary.json of a finished run, and the report that joins the committed ones."""

from collections.abc import Sequence
from pathlib import Path

from experiments.errors import UserError
from experiments.framework import record, registry
from experiments.framework.claim import fingerprint
from experiments.framework.experiment import Drawn, Experiment
from experiments.framework.tables import Table, to_markdown
from experiments.framework.verdict import (
    IN_PART,
    INCONCLUSIVE,
    NOT_SUPPORTED,
    SUPPORTED,
    Cell,
    Verdict,
    cell_in_words,
    effect_in_words,
    outcome_in_words,
)

RESULTS = Path(__file__).parents[1] / "results"
REPORT = "README.md"
README = Path(__file__).parents[2] / "README.md"
FOUND = "<!-- found: written by `python -m experiments report` -->", "<!-- /found -->"
OUTCOMES = (SUPPORTED, IN_PART, NOT_SUPPORTED, INCONCLUSIVE)


def write_summary(
    directory: Path,
    experiment: Experiment,
    verdicts: Sequence[Verdict],
    tables: Sequence[Table],
    pictures: Sequence[Drawn],
) -> None:
    """Write what a run found, as JSON; a number that is not finite becomes null."""
    about = {name: getattr(experiment, name) for name in ("title", "question", "source", "differs")}
    content = {
        **about,
        "verdicts": [{**found._asdict(), "cells": [cell._asdict() for cell in found.cells]} for found in verdicts],
        "tables": [table._asdict() for table in tables],
        "pictures": [{"file": picture.file, "caption": picture.caption} for picture in pictures],
    }
    record.write_json(directory / "summary.json", record.compact(content))


def read_verdicts(directory: Path) -> list[Verdict]:
    """The verdicts of a finished run."""
    summary = record.revive(record.read_json(directory / "summary.json"))
    found = []
    for entry in summary["verdicts"]:
        known = {name: None if v != v else v for name, v in entry.items() if name in ("needed", "p_value")}
        found.append(Verdict(**{**entry, **known, "cells": [Cell(**cell) for cell in entry["cells"]]}))
    return found


def present_in(results: Path) -> list[str]:
    """The directories of finished runs, in the order of the registry; UserError if there is none."""
    finished = {path.parent.name: experiment_of(path.parent) for path in results.glob("*/summary.json")}
    if not finished:
        raise UserError(
            f"{results} holds no finished run: python -m experiments run NAME --out {results}/NAME makes one"
        )
    return sorted(finished, key=lambda name: (registry.EXPERIMENTS.index(finished[name]), name))


def write_report(results: Path = RESULTS, readme: Path | None = README) -> Path:
    """Build the report in `results` from the directories in it, and the list of what was found in the top README."""
    path = results / REPORT
    path.write_text(report_of(results))
    if readme is not None:
        readme.write_text(with_found(readme.read_text(), results))
    return path


def report_of(results: Path) -> str:
    """The report in Markdown."""
    head = "# What the experiments found\n\nBuilt by `python -m experiments report` from the directories beside it."
    return "\n\n".join([head, *(section(results, name) for name in present_in(results))]) + "\n"


def with_found(text: str, results: Path) -> str:
    """A README with a line for each finished run between its two marks."""
    begin, end = FOUND
    first, last = text.index(begin) + len(begin), text.index(end)
    lines = "\n".join(line_of(results, name) for name in present_in(results))
    return f"{text[:first]}\n{lines}\n{text[last:]}"


def line_of(results: Path, name: str) -> str:
    """The question of a run and how many of its claims held."""
    summary = record.read_json(results / name / "summary.json")
    outcomes = [verdict["outcome"] for verdict in summary["verdicts"]]
    counts = [f"{outcomes.count(outcome)} {outcome}" for outcome in OUTCOMES if outcome in outcomes]
    claims = f"{len(outcomes)} claim{'s' * (len(outcomes) != 1)}: {', '.join(counts)}"
    return f"- [{name}](experiments/results/README.md#{name}): {summary['question']} {claims}."


def experiment_of(directory: Path) -> str:
    """The experiment that a run's directory belongs to; UserError if there is none of that name."""
    name = record.read_json(directory / "config.json").get("experiment")
    if name not in registry.EXPERIMENTS:
        raise UserError(f"{directory} holds a run of {name!r}, which is no experiment: move it away")
    return name


def section(results: Path, name: str) -> str:
    """The part of the report about the run in the directory `name`, in Markdown."""
    directory = results / name
    config = record.read_json(directory / "config.json")
    summary = record.revive(record.read_json(directory / "summary.json"))
    verdicts = read_verdicts(directory)
    parts = [
        f"## {name}",
        f"{summary['question']} Source: {summary['source']}.",
        "| claim | verdict | found |\n| --- | --- | --- |\n" + "\n".join(map(_verdict_row, verdicts)),
        *(f"![{entry['caption']}]({name}/{entry['file']})" for entry in summary["pictures"]),
        *(to_markdown(Table(**entry)) for entry in summary["tables"]),
        *([f"What differs from the source: {summary['differs']}"] if summary["differs"] else []),
        "Criteria:\n\n" + "\n".join(f"- {v.claim} {v.criterion}" for v in verdicts),
        *_cells(verdicts),
        fixed_in_words(config),
        origin_in_words(config),
    ]
    return "\n\n".join(parts)


def _verdict_row(found: Verdict) -> str:
    source = f" ({found.source})" if found.source else ""
    return f"| {found.claim}{source} | **{outcome_in_words(found)}** | {found.found} {effect_in_words(found)} |"


def _cells(verdicts: Sequence[Verdict]) -> list[str]:
    """The effect in every cell, where a claim has several."""
    rows = [
        f"| {found.claim} | {cell_in_words(cell)} | {cell.effect:.3g} ({cell.low:.3g} to {cell.high:.3g})"
        f" | {cell.outcome} |"
        for found in verdicts
        if len(found.cells) > 1
        for cell in found.cells
    ]
    head = "**The effect in every cell** (with its own 95% interval)\n\n| claim | cell | effect | claim holds there |"
    return [head + "\n| --- | --- | ---: | --- |\n" + "\n".join(rows)] if rows else []


def fixed_in_words(config: dict) -> str:
    """Whether the claims stood in a commit before the run, and whether they are the same today."""
    claims = config["claims"]
    words = (
        f"The claims were fixed before the run: SHA-256 `{claims['sha256'][:16]}`, in the commit below."
        if claims["fixed_before_the_run"]
        else "**Not fixed before the run**: no commit holds the claims as they were when it started."
    )
    today = fingerprint(registry.load(config["experiment"]).claims)
    return words if today == claims["sha256"] else f"{words} **The claims have changed since** (`{today[:16]}` today)."


def origin_in_words(config: dict) -> str:
    """The command, commit, hardware and versions behind a result."""
    origin = config["provenance"]
    return (
        f"`python -m experiments run {config['experiment']} --preset {config['preset']}` at commit"
        f" `{origin['commit'][:12]}` on {origin['hardware']}; jax {origin['versions']['jax']};"
        f" {config['settings']['seeds']} seeds."
    )
