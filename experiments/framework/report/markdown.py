"""The report as Markdown, for a code host, and the list of what was found in the top README."""

from collections.abc import Sequence

from experiments.framework import registry
from experiments.framework.report import words
from experiments.framework.report.collect import Collection, Run
from experiments.framework.tables import Table, to_markdown
from experiments.framework.verdict import (
    IN_PART,
    SUPPORTED,
    Cell,
    Verdict,
    cell_in_words,
    effect_in_words,
    outcome_in_words,
)

FOUND = "<!-- found: written by `python -m experiments report` -->", "<!-- /found -->"


def report_of(collection: Collection) -> str:
    """The whole report."""
    return "\n\n".join([*_head(collection), *map(_section, collection.runs)]) + "\n"


def with_found(text: str, collection: Collection) -> str:
    """A README with a line for each theme between its two marks: its experiments, and how many of their claims held."""
    begin, end = FOUND
    first, last = text.index(begin) + len(begin), text.index(end)
    lines = [f"{_counted(collection.runs)} Beside each experiment, how many of its claims held, at least in part:", ""]
    for theme in [*words.themes_of(collection.runs), ""]:
        runs = [run for run in collection.runs if run.experiment.theme == theme]
        lines += [f"- {theme or 'Others'}: {', '.join(map(_held, runs))}"] if runs else []
    return "\n".join([text[:first], *lines, text[last:]])


def _held(run: Run) -> str:
    """A link to a run, and how many of its claims held."""
    counts = words.counts(run.verdicts)
    held = f"{counts[SUPPORTED] + counts[IN_PART]} of {len(run.verdicts)}"
    return f"[{run.name}](experiments/results/README.md#{run.name}) {held}"


def _counted(runs: Sequence[Run]) -> str:
    """How many claims there are, and what became of them."""
    verdicts = [verdict for run in runs for verdict in run.verdicts]
    found = ", ".join(f"{number} {words.SHORT[outcome]}" for outcome, number in words.counts(verdicts).items())
    return f"**Of {words.count(len(verdicts), 'claim')}: {found}.**"


def _head(collection: Collection) -> list[str]:
    runs = collection.runs
    verdicts = [verdict for run in runs for verdict in run.verdicts]
    return [
        f"# {words.TITLE}",
        "Built by `python -m experiments report` from the directories beside it. [report.html](report.html) says the"
        " same on one page with a map of all claims to filter and sort; download it and open it in a browser.",
        *_notes(collection),
        f"{_counted(runs)} {words.together_in_words(verdicts)} {words.INTERVALS}",
        *_claims(runs),
        *_surprises(runs),
        *_disputes(runs),
        *_questions(runs),
    ]


def _notes(collection: Collection) -> list[str]:
    return ["> [!WARNING]\n" + "\n".join(f"> - {line}" for line in collection.troubles)] if collection.troubles else []


def _claims(runs: Sequence[Run]) -> list[str]:
    rows = [
        [f"[{run.name}](#{run.name})", verdict.claim, f"**{words.SHORT[verdict.outcome]}**", effect_in_words(verdict)]
        for run in runs
        for verdict in run.verdicts
    ]
    return [_table(["experiment", "claim", "verdict", "effect"], rows)] if rows else []


def _surprises(runs: Sequence[Run]) -> list[str]:
    lines = []
    for run, number in words.surprises(runs):
        verdict = run.verdicts[number]
        evidence = f"{words.surprise_in_words(verdict)} {verdict.found} {effect_in_words(verdict)}"
        lines.append(f'- "{verdict.claim}" ([{run.name}](#{run.name})) {evidence}')
    return ["## What surprised us", "\n".join(lines)] if lines else []


def _disputes(runs: Sequence[Run]) -> list[str]:
    parts = []
    for topic, sides in words.disputes(runs).items():
        rows = [_side(run, run.verdicts[number]) for run, number in sides]
        parts += [f"**{topic}**", _table(["claim", "source", "verdict", "measured on"], rows)]
    return ["## Claims that contradict each other", *parts] if parts else []


def _side(run: Run, verdict: Verdict) -> list[str]:
    return [
        verdict.claim,
        words.source_of(run, verdict),
        words.SHORT[verdict.outcome],
        words.measured_in_words(run, verdict),
    ]


def _questions(runs: Sequence[Run]) -> list[str]:
    parts = [f"**{asked}** {answer} ([{run.name}](#{run.name}))" for run, asked, answer in words.reader_questions(runs)]
    return ["## Questions that readers ask", *parts] if parts else []


def _section(run: Run) -> str:
    """The part about one run."""
    summary, protocol = run.summary, words.protocol_in_words(run)
    validation = (summary.get("protocol") or {}).get("validation")
    parts = [
        f"## {run.name}",
        f"**{summary['question']}** {words.answer_of(run)} Source: {run.experiment.citation or summary['source']}.",
        *(f"> **Stale**: {reason}" for reason in run.stale),
        _table(["claim", "verdict", "found"], [_verdict_row(verdict) for verdict in run.verdicts]),
        *(f"![{entry['caption']}]({run.name}/{entry['file']})" for entry in summary["pictures"]),
        *(to_markdown(_escaped(table)) for table in run.tables),
        *([f"What differs from the source: {summary['differs']}"] if summary["differs"] else []),
        "Criteria:\n\n" + "\n".join(f"- {verdict.claim} {verdict.criterion}" for verdict in run.verdicts),
        *_cells(run.verdicts),
        *([to_markdown(_escaped(Table(**validation)))] if validation else []),
        f"### Protocol of {run.name}",
        *registry.protocol(run.config["experiment"]),
        *(["\n".join(f"- {name}: {said}" for name, said in protocol.items())] if protocol else []),
        _emphasized(words.fixed_in_words(run)),
        f"`{words.command_of(run)}`\n\n"
        + "\n".join(f"- {name}: {said}" for name, said in words.origin_of(run).items()),
    ]
    return "\n\n".join(parts)


def _emphasized(sentence: str) -> str:
    """The part before the colon in bold, where it is a warning."""
    head, rest = sentence.split(":", 1)
    return f"**{head}**:{rest}" if head.startswith("Not") else sentence


def _verdict_row(found: Verdict) -> list[str]:
    source = f" ({found.source})" if found.source else ""
    return [f"{found.claim}{source}", f"**{outcome_in_words(found)}**", f"{found.found} {effect_in_words(found)}"]


def _cells(verdicts: Sequence[Verdict]) -> list[str]:
    """The effect in every cell, where a claim has several."""
    rows = [
        [found.claim, cell_in_words(cell), _effect_of(cell), cell.outcome]
        for found in verdicts
        if len(found.cells) > 1
        for cell in found.cells
    ]
    title = "**The effect in every cell** (with its own 95% interval)"
    return [title, _table(["claim", "cell", "effect", "claim holds there"], rows)] if rows else []


def _effect_of(cell: Cell) -> str:
    return f"{cell.effect:.3g} ({words.interval_in_words(cell.low, cell.high)})"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_cell(entry) for entry in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(table: Table) -> Table:
    return table._replace(
        columns=[_cell(name) for name in table.columns], rows=[[_cell(entry) for entry in row] for row in table.rows]
    )


def _cell(text: str) -> str:
    """Text that ends no cell and no row."""
    return text.replace("|", "\\|").replace("\n", " ")
