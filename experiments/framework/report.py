"""summary.json of a finished run, and the report that joins the committed ones."""

from pathlib import Path

from experiments.errors import UserError
from experiments.framework import record
from experiments.framework.plots import Picture
from experiments.framework.registry import EXPERIMENTS
from experiments.framework.tables import Table, to_markdown
from experiments.framework.verdict import Verdict, effect_in_words

RESULTS = Path(__file__).parents[1] / "results"


def write_summary(directory: Path, verdicts: list[Verdict], tables: list[Table], pictures: list[Picture]) -> None:
    """Write what a run found, as JSON; a number that is not finite becomes null."""
    content = {
        "verdicts": [found._asdict() for found in verdicts],
        "tables": [table._asdict() for table in tables],
        "pictures": [picture._asdict() for picture in pictures],
    }
    record.write_json(directory / "summary.json", record.compact(content))


def write_report(results: Path = RESULTS) -> Path:
    """Build `results`/REPORT.md from the directories in it; UserError if there is no finished run among them."""
    finished = {path.parent.name: experiment_of(path.parent) for path in results.glob("*/summary.json")}
    present = sorted(finished, key=lambda name: (list(EXPERIMENTS).index(finished[name]), name))
    if not present:
        raise UserError(
            f"{results} holds no finished run: python -m experiments run NAME --out {results}/NAME makes one"
        )
    head = "# What the experiments found\n\nBuilt by `python -m experiments report` from the directories beside it."
    path = results / "REPORT.md"
    path.write_text("\n\n".join([head, *(section(results, name) for name in present)]) + "\n")
    return path


def experiment_of(directory: Path) -> str:
    """The experiment that a run's directory belongs to; UserError if there is none of that name."""
    name = record.read_json(directory / "config.json").get("experiment")
    if name not in EXPERIMENTS:
        raise UserError(f"{directory} holds a run of {name!r}, which is no experiment: move it away")
    return name


def section(results: Path, name: str) -> str:
    """The part of the report about the run in the directory `name`, in Markdown."""
    directory = results / name
    config = record.read_json(directory / "config.json")
    summary = record.revive(record.read_json(directory / "summary.json"))
    verdicts = [Verdict(**entry) for entry in summary["verdicts"]]
    parts = [
        f"## {name}",
        EXPERIMENTS[config["experiment"]].claim,
        "| claim | verdict | found |\n| --- | --- | --- |\n" + "\n".join(map(_verdict_row, verdicts)),
        *(to_markdown(Table(**entry)) for entry in summary["tables"]),
        *(f"![{entry['caption']}]({name}/{entry['file']})" for entry in summary["pictures"]),
        "Criteria, fixed before the run:\n\n" + "\n".join(f"- {v.claim} {v.criterion}" for v in verdicts),
        _origin(config),
    ]
    return "\n\n".join(parts)


def _verdict_row(found: Verdict) -> str:
    return f"| {found.claim} | **{found.outcome}** | {found.sentence} {effect_in_words(found)} |"


def _origin(config: dict) -> str:
    origin = config["provenance"]
    return (
        f"`python -m experiments run {config['experiment']} --preset {config['preset']}` at commit"
        f" `{origin['commit'][:12]}` on {origin['hardware']}; jax {origin['versions']['jax']};"
        f" {config['settings']['seeds']} seeds."
    )
