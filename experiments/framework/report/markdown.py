"""The report as Markdown, for a code host, and the list of what was found in the top README."""

from collections.abc import Mapping, Sequence

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


def front_of(collection: Collection) -> str:
    """The first page: all claims, what surprised us, disputes and questions, with a link to the page of every run."""
    runs = collection.runs
    verdicts = [verdict for run in runs for verdict in run.verdicts]
    return _joined(
        f"# {words.TITLE}",
        "Built by `python -m experiments report` from the directories beside it. [report.html](report.html) says the"
        " same on one page with a map of all claims to filter and sort; download it and open it in a browser.",
        *_notes(collection),
        f"{_counted(runs)} {words.together_in_words(verdicts)} {words.INTERVALS}",
        *_surprises(runs),
        *_disputes(runs),
        *_questions(runs),
        *_claims(runs),
    )


def page_of_run(run: Run) -> str:
    """The page of one run, which lies beside its pictures."""
    summary, protocol = run.summary, words.protocol_in_words(run)
    validation = (summary.get("protocol") or {}).get("validation")
    return _joined(
        f"# {run.name}",
        f"**{summary['question']}** {words.answer_of(run)} Source: {words.citation_of(run)}",
        "What the words mean, and all other experiments: [results](../README.md).",
        *(f"> **Stale**: {reason}" for reason in run.stale),
        *(part for entry in summary["pictures"] for part in _picture(entry)),
        "## Claims",
        _table(["claim", "verdict", "found"], [_verdict_row(verdict) for verdict in run.verdicts]),
        "## Figures",
        *(to_markdown(_escaped(table)) for table in run.tables),
        *([to_markdown(_escaped(Table(**validation)))] if validation else []),
        "## Protocol",
        *registry.protocol(run.config["experiment"]),
        *([f"What differs from the source: {summary['differs']}"] if summary["differs"] else []),
        *([_facts(protocol)] if protocol else []),
        "Criteria:\n\n" + "\n".join(f"- {verdict.claim} {verdict.criterion}" for verdict in run.verdicts),
        _emphasized(words.fixed_in_words(run)),
        *_cells(run.verdicts),
        "## Run it again",
        f"`{words.command_of(run)}`",
        _facts(words.origin_of(run)),
    )


def with_found(text: str, collection: Collection) -> str:
    """A README with a line for each theme between its two marks: its experiments, and how many of their claims held."""
    begin, end = FOUND
    first, last = text.index(begin) + len(begin), text.index(end)
    lines = [f"{_counted(collection.runs)} Beside each experiment, how many of its claims held, at least in part:", ""]
    for theme, runs in words.by_theme(collection.runs).items():
        lines.append(f"- {theme or 'Others'}: {', '.join(map(_held, runs))}")
    return "\n".join([text[:first], *lines, text[last:]])


def _held(run: Run) -> str:
    """A link to a run, and how many of its claims held."""
    counts = words.counts(run.verdicts)
    held = f"{counts[SUPPORTED] + counts[IN_PART]} of {len(run.verdicts)}"
    return f"[{run.name}](experiments/results/{run.name}/README.md) {held}"


def _counted(runs: Sequence[Run]) -> str:
    """How many claims there are, and what became of them."""
    verdicts = [verdict for run in runs for verdict in run.verdicts]
    found = ", ".join(f"{number} {words.SHORT[outcome]}" for outcome, number in words.counts(verdicts).items())
    return f"**Of {words.count(len(verdicts), 'claim')}: {found}.**"


def _joined(*parts: str) -> str:
    """Parts of a page, each a block of its own."""
    return "\n\n".join(parts) + "\n"


def _facts(facts: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {said}" for name, said in facts.items())


def _notes(collection: Collection) -> list[str]:
    return ["> [!WARNING]\n" + "\n".join(f"> - {line}" for line in collection.troubles)] if collection.troubles else []


def _link(run: Run) -> str:
    return f"[{run.name}]({run.name}/README.md)"


def _claims(runs: Sequence[Run]) -> list[str]:
    parts = []
    for run in runs:
        rows = [
            [words.claim_of(run, verdict), f"**{words.SHORT[verdict.outcome]}**", effect_in_words(verdict)]
            for verdict in run.verdicts
        ]
        parts += [f"### {_link(run)}: {run.summary['question']}", words.answer_of(run)]
        parts += [_table(["claim", "verdict", "effect"], rows)] if rows else []
    return ["## All claims", "What the words mean:", _facts(words.TERMS), *parts] if parts else []


def _surprises(runs: Sequence[Run]) -> list[str]:
    lines = [f"- {told} ({_link(run)})" for run, told in words.surprises(runs)]
    return ["## What surprised us", "\n".join(lines)] if lines else []


def _disputes(runs: Sequence[Run]) -> list[str]:
    parts = []
    for topic, sides in words.disputes(runs).items():
        rows = [_side(run, run.verdicts[number]) for run, number in sides]
        parts += [f"**{topic}** {words.conclusion_of(topic)}".strip()]
        parts += [_table(["claim", "source", "verdict", "measured", "in"], rows)]
    return ["## Claims that contradict each other", *parts] if parts else []


def _side(run: Run, verdict: Verdict) -> list[str]:
    return [
        words.claim_of(run, verdict),
        words.source_of(run, verdict),
        words.SHORT[verdict.outcome],
        effect_in_words(verdict),
        _link(run),
    ]


def _questions(runs: Sequence[Run]) -> list[str]:
    parts = []
    for topic, questions in words.reader_questions(runs).items():
        parts.append(f"### {topic}")
        for question, answers in questions.items():
            parts += [f"**{question}** " + " ".join(f"{answer} ({_link(run)})" for run, answer in answers)]
    return ["## Questions that readers ask", *parts] if parts else []


def _picture(entry: Mapping[str, str]) -> list[str]:
    """A picture and its caption."""
    return [f"![{entry.get('title') or entry['caption']}]({entry['file']})", f"*{entry['caption']}*"]


def _emphasized(sentence: str) -> str:
    """The part before the colon in bold, where it is a warning."""
    head, rest = sentence.split(":", 1)
    return f"**{head}**:{rest}" if head.startswith("Not") else sentence


def _verdict_row(found: Verdict) -> list[str]:
    source = f" ({found.source})" if found.source else ""
    effect = f"{found.found} {effect_in_words(found)}".lstrip()
    return [f"{found.claim}{source}", f"**{outcome_in_words(found)}**", effect]


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
