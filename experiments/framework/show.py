"""What a user sees of a finished run on the terminal: tables, and a verdict for each claim."""

from collections.abc import Sequence

from rich.console import Console

from experiments.framework.tables import Table, to_rich
from experiments.framework.verdict import (
    IN_PART,
    INCONCLUSIVE,
    NOT_SUPPORTED,
    SUPPORTED,
    Verdict,
    cell_in_words,
    effect_in_words,
    measured,
    outcome_in_words,
)

STYLES = {SUPPORTED: "bold green", IN_PART: "bold cyan", NOT_SUPPORTED: "bold red", INCONCLUSIVE: "bold yellow"}


def show_tables(console: Console, tables: Sequence[Table]) -> None:
    """Print every table."""
    for table in tables:
        console.print()
        console.print(to_rich(table))


def show_verdicts(console: Console, verdicts: Sequence[Verdict]) -> None:
    """Print the verdict of each claim, what was found and measured, the criterion, and the effect in every cell."""
    for found in verdicts:
        console.print()
        console.print(f"[{STYLES[found.outcome]}]{outcome_in_words(found).upper()}[/] {found.claim}", highlight=False)
        rule = found.criterion.removeprefix(f"{measured(found)}; ")
        for line in (found.found, effect_in_words(found), f"Criterion: {rule}"):
            if line:
                console.print(f"  {line}", highlight=False, style="dim" if line.startswith("Criterion") else None)
        if len(found.cells) > 1:
            cells = "; ".join(f"{cell_in_words(cell)}: {cell.effect:.3g}" for cell in found.cells)
            console.print(f"  By cell: {cells}", highlight=False, style="dim")
