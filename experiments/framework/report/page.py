"""The report as one HTML page that needs no network: pictures, styles and script are inside."""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markdown_it import MarkdownIt
from markupsafe import Markup

from experiments.framework import registry
from experiments.framework.report import drawing, words
from experiments.framework.report.collect import Collection, Run
from experiments.framework.report.holm import survivors
from experiments.framework.tables import Table
from experiments.framework.verdict import (
    IN_PART,
    SUPPORTED,
    Cell,
    Verdict,
    cell_in_words,
    effect_in_words,
    outcome_in_words,
)

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Line:
    """A claim as the page shows it: `place` is its number among all, `survives` what Holm's correction leaves of it."""

    run: Run
    number: int
    place: int
    survives: bool | None

    @property
    def verdict(self) -> Verdict:
        """As judged."""
        return self.run.verdicts[self.number]

    @property
    def anchor(self) -> str:
        """The claim's place in its experiment."""
        return f"{self.run.name}-{self.number + 1}"

    @property
    def claim(self) -> str:
        """The sentence as it is understood alone."""
        return words.claim_of(self.run, self.verdict)

    @property
    def source(self) -> str:
        """Where it was claimed."""
        return words.source_of(self.run, self.verdict)

    @property
    def work(self) -> str:
        """The work in which it was claimed, to filter and sort by."""
        return words.work_of(self.source)

    @property
    def beyond(self) -> float:
        """For sorting, see `drawing.beyond`; a number that JSON knows."""
        return round(min(max(drawing.beyond(self.verdict), -1e9), 1e9), 6)

    @property
    def corrected(self) -> str:
        """What Holm's correction leaves of a claim that held, as a sentence; empty where there is nothing to say."""
        if self.survives is None or self.verdict.outcome not in (SUPPORTED, IN_PART):
            return ""
        return f" {'Survives' if self.survives else 'Does not survive'} Holm’s correction over all claims."

    @property
    def by_strength(self) -> list[Cell]:
        """The cells of the claim, those in which it holds least first."""
        falls = self.verdict.kind in ("below", "exact")
        cells = [cell for cell in self.verdict.cells if math.isfinite(cell.effect)]
        return sorted(cells, key=lambda cell: -cell.effect if falls else cell.effect)


def page_of(collection: Collection) -> str:
    """The page."""
    lines = lines_of(collection.runs)
    verdicts = [line.verdict for line in lines]
    return _environment().get_template("page.html.jinja").render(
        collection=collection,
        lines=lines,
        by_run={run.name: [line for line in lines if line.run is run] for run in collection.runs},
        at={(line.run.name, line.number): line for line in lines},
        counts=words.counts(verdicts),
        fixed=words.all_fixed_in_words(collection.runs),
        together=words.together_in_words(verdicts) if verdicts else "",
        works=sorted({line.work for line in lines}, key=str.casefold),
        themes=words.themes_of(collection.runs),
        by_theme=words.by_theme(collection.runs),
        surprises=words.surprises(collection.runs),
        failures=words.failures(collection.runs),
        disputes=words.disputes(collection.runs),
        questions=words.reader_questions(collection.runs),
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
    )  # fmt: skip


def lines_of(runs: Sequence[Run]) -> list[Line]:
    """Every claim of every run, with what Holm's correction over all of them leaves."""
    places = [(run, number) for run in runs for number in range(len(run.verdicts))]
    survive = survivors([run.verdicts[number] for run, number in places])
    return [Line(run, number, place, survive[place]) for place, (run, number) in enumerate(places)]


def embedded(run: Run, file: str) -> str:
    """A picture of a run as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode((run.directory / file).read_bytes()).decode()


def effect_of(found: Verdict) -> str:
    """The effect in words, of which no line breaks within "n = 5"."""
    return effect_in_words(found).replace("n = ", "n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")


def size_of(run: Run, file: str) -> tuple[int, int]:
    """Width and height of a PNG in pixels, so that the page does not move when it is shown."""
    head = (run.directory / file).read_bytes()[16:24]
    return int.from_bytes(head[:4], "big"), int.from_bytes(head[4:], "big")


def validation_of(run: Run) -> Table | None:
    """Validation beside test accuracy, where both were measured."""
    held = (run.summary.get("protocol") or {}).get("validation")
    return Table(**held) if held else None


def protocol_of(run: Run) -> Markup:
    """How the experiment goes, as its file says, as HTML."""
    said = "\n\n".join(registry.protocol(run.config["experiment"]))
    return Markup(MarkdownIt("commonmark", {"html": False}).render(said))


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    shown = (
        *(drawing.drawn, drawing.legend_mark, words.threshold_in_words, embedded, size_of, validation_of),
        *(cell_in_words, effect_of, outcome_in_words, protocol_of),
        *(words.answer_of, words.command_of, words.fixed_in_words, words.interval_in_words, words.origin_of),
        *(words.citation_of, words.protocol_in_words, words.failure_in_words, words.count, words.conclusion_of),
    )
    environment.globals |= {function.__name__: function for function in shown}
    constants = {"CLASSES": drawing.CLASSES, "SHORT": words.SHORT, "MEANING": words.MEANING, "TITLE": words.TITLE}
    environment.globals |= {**constants, "INTERVALS": words.INTERVALS, "OUTCOMES": words.OUTCOMES, "TERMS": words.TERMS}
    return environment
