"""What a check found, as text and as a Markdown table."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxbn.testing.laws import Law

HOLDS, BROKEN, NOT_APPLICABLE = "holds", "BROKEN", "n/a"
_MARKS = {HOLDS: "holds", BROKEN: "**broken**", NOT_APPLICABLE: "–"}


@dataclass(frozen=True)
class LawResult:
    """What became of one law.

    Attributes:
      law: the law.
      status: `HOLDS`, `BROKEN` or `NOT_APPLICABLE`.
      detail: why: what was expected, what came, the bound; or what the normalizer lacks.
      inputs: of a broken law the smallest failing ones, by name.
    """

    law: Law
    status: str
    detail: str = ""
    inputs: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.status != BROKEN:
            return f"{self.law.name}: {self.status}{f' ({self.detail})' if self.detail else ''}"
        drawn = "\n".join(f"  {line}" for name, value in self.inputs.items() for line in shown(name, value))
        return (
            f"{self.law.name} is broken\n"
            f"  law:    {self.law.statement}\n"
            f"  source: {self.law.source}\n"
            f"  smallest failing input:\n{textwrap.indent(drawn, '  ')}\n"
            f"  {self.detail}\n"
            f"  bound:  {self.law.bound}"
        )


@dataclass(frozen=True)
class Report:
    """Outcomes of all laws for one normalizer.

    Attributes:
      name: of the normalizer.
      facts: what was stated or measured of it, such as "epsilon 1e-05 (measured)".
      outcomes: one for each law, in order.
    """

    name: str
    facts: str
    outcomes: Sequence[LawResult]

    @property
    def broken(self) -> list[LawResult]:
        """The outcomes of broken laws."""
        return [outcome for outcome in self.outcomes if outcome.status == BROKEN]

    def status(self, law: Law) -> str:
        """`HOLDS`, `BROKEN` or `NOT_APPLICABLE`."""
        return next(outcome.status for outcome in self.outcomes if outcome.law is law)

    def table(self) -> str:
        """One line a law, as text."""
        width = max(len(outcome.law.name) for outcome in self.outcomes)
        lines = [f"{self.name}: {self.facts}"]
        for outcome in self.outcomes:
            note = outcome.detail if outcome.status == NOT_APPLICABLE else outcome.law.statement
            lines.append(f"  {outcome.law.name:{width}}  {outcome.status:6}  {note}")
        return "\n".join(lines)

    def failures(self) -> str:
        """Everything known of the broken laws, as text."""
        return "\n\n".join(str(outcome) for outcome in self.broken)

    def __str__(self) -> str:
        counts = [sum(o.status == status for o in self.outcomes) for status in (HOLDS, BROKEN, NOT_APPLICABLE)]
        summary = f"{counts[0]} laws hold, {counts[1]} broken, {counts[2]} not applicable"
        return "\n\n".join(part for part in (self.table(), self.failures(), summary) if part)


def shown(name: str, value: Any) -> list[str]:
    """Lines that show one drawn input."""
    if isinstance(value, tuple) and any(isinstance(part, np.ndarray) for part in value):
        names = name.split("_") if len(name.split("_")) == len(value) else [f"{name}[{i}]" for i in range(len(value))]
        return [line for part, v in zip(names, value, strict=True) for line in shown(part, v)]
    if isinstance(value, list) and any(isinstance(part, np.ndarray) for part in value):
        return [line for i, part in enumerate(value) for line in shown(f"{name}[{i}]", part)]
    if not isinstance(value, np.ndarray):
        return [f"{name} = {value!r}"]
    text = np.array2string(value, separator=", ", floatmode="unique", max_line_width=100)
    first, *rest = f"{name} = {text}".splitlines()
    return [
        f"{first}   # {value.dtype} {list(value.shape)}" if not rest else first,
        *(" " * (len(name) + 3) + r for r in rest),
    ]


def markdown(reports: Sequence[Report]) -> str:
    """Laws down, normalizers across; broken laws with what came under the table."""
    head = ["law", *(report.name for report in reports)]
    rows = [head, ["---"] * len(head)]
    laws = [outcome.law for outcome in reports[0].outcomes]
    rows += [[f"`{law.name}`", *(_MARKS[report.status(law)] for report in reports)] for law in laws]
    rows.append(["broken / applicable", *(_count(report) for report in reports)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _count(report):
    applicable = sum(outcome.status != NOT_APPLICABLE for outcome in report.outcomes)
    return f"{len(report.broken)} / {applicable}"
