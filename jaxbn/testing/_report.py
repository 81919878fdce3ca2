"""What a check of all laws found, as text and as a Markdown table."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxbn.testing._law import BROKEN, HOLDS, NOT_APPLICABLE, Law, LawResult

_MARKS = {HOLDS: "holds", BROKEN: "**broken**", NOT_APPLICABLE: "–"}


@dataclass(frozen=True)
class Report:
    """Results of all laws for one layer.

    Attributes:
      name: of the layer.
      facts: what was stated, inferred or measured of it, such as "epsilon 1e-05 (measured)".
      outcomes: one `LawResult` for each law, in order.
      hint: what else may explain the broken laws, such as a scope to try; "" where nothing does.
    """

    name: str
    facts: str
    outcomes: Sequence[LawResult]
    hint: str = ""

    @property
    def broken(self) -> list[LawResult]:
        """Results of the laws and promises that do not hold."""
        return [outcome for outcome in self.outcomes if outcome.status == BROKEN]

    @property
    def broken_laws(self) -> list[LawResult]:
        """Results of the laws that do not hold, without the promises."""
        return [outcome for outcome in self.broken if not outcome.law.promise]

    def status(self, law: Law) -> str:
        """`HOLDS`, `BROKEN` or `NOT_APPLICABLE`."""
        return next(outcome.status for outcome in self.outcomes if outcome.law is law)

    def table(self) -> str:
        """One line a law, as text: laws first, then promises."""
        width = max(len(outcome.law.name) for outcome in self.outcomes)
        lines = [f"{self.name}: {self.facts}"]
        for title, outcomes in _groups(self.outcomes):
            lines += [f"  {title}", *(_line(outcome, width) for outcome in outcomes)]
        return "\n".join(lines)

    def failures(self) -> str:
        """Everything known of the broken laws and promises, as text."""
        return "\n\n".join(str(outcome) for outcome in self.broken)

    def __str__(self) -> str:
        summary = "; ".join(_summary(title, outcomes) for title, outcomes in _groups(self.outcomes))
        return "\n\n".join(part for part in (self.table(), self.failures(), self.hint, summary) if part)


def _groups(outcomes: Sequence[LawResult]) -> list[tuple[str, list[LawResult]]]:
    """Laws and promises, each with its title; a group without members is left out."""
    groups = [
        ("laws", [outcome for outcome in outcomes if not outcome.law.promise]),
        ("promises", [outcome for outcome in outcomes if outcome.law.promise]),
    ]
    return [(title, members) for title, members in groups if members]


def _line(outcome: LawResult, width: int) -> str:
    note = outcome.detail if outcome.status == NOT_APPLICABLE else outcome.law.statement
    return f"    {outcome.law.name:{width}}  {outcome.status:6}  {note}"


def _summary(title: str, outcomes: Sequence[LawResult]) -> str:
    holding, broken, other = (sum(o.status == status for o in outcomes) for status in (HOLDS, BROKEN, NOT_APPLICABLE))
    verb = "hold" if title == "laws" else "kept"
    return f"{holding} {title} {verb}, {broken} broken, {other} not applicable"


def markdown(reports: Sequence[Report]) -> str:
    """A table with laws down, then promises, and layers across."""
    head = ["law", *(report.name for report in reports)]
    rows = [head, ["---"] * len(head)]
    for title, outcomes in _groups(reports[0].outcomes):
        laws = [outcome.law for outcome in outcomes]
        if title == "promises":
            rows.append(["*promises of this library*", *([""] * len(reports))])
        rows += [[f"`{law.name}`", *(_MARKS[report.status(law)] for report in reports)] for law in laws]
        rows.append([f"{title} broken / applicable", *(_count(report, laws) for report in reports)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _count(report: Report, laws: Sequence[Law]) -> str:
    statuses = [report.status(law) for law in laws]
    return f"{statuses.count(BROKEN)} / {len(statuses) - statuses.count(NOT_APPLICABLE)}"
