"""Steps that were refused since something in them was not finite: what is told of them, and when training gives up."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from jaxbn import training


class Refusals(NamedTuple):
    """The refused steps of a run, or of a part of it.

    Attributes:
      number: how many.
      first: the number of the first, from 1; 0 if there is none.
      parts: what was not finite in them, as `jaxbn.training.nonfinite_parts` names it.
      in_a_row: how many of the last steps were refused, up to the end.
    """

    number: int = 0
    first: int = 0
    parts: tuple[str, ...] = ()
    in_a_row: int = 0

    def after(self, done: int, skipped: np.ndarray, codes: np.ndarray) -> "Refusals":
        """Once further steps have been taken.

        Args:
          done: steps before them.
          skipped: [steps], 1 where a step was refused.
          codes: [steps], the steps' metric "nonfinite".
        """
        refused = np.flatnonzero(skipped)
        if not refused.size:
            return self._replace(in_a_row=0)
        parts = training.nonfinite_parts(int(np.bitwise_or.reduce(codes[refused])))
        accepted = np.flatnonzero(skipped == 0)
        in_a_row = len(skipped) - 1 - accepted[-1] if accepted.size else self.in_a_row + len(skipped)
        return Refusals(
            self.number + int(refused.size),
            self.first or done + int(refused[0]) + 1,
            tuple(dict.fromkeys([*self.parts, *parts])),
            int(in_a_row),
        )

    def to_json(self) -> dict:
        """As a row or the summary has them."""
        return {"count": self.number, "first": self.first, "not_finite": list(self.parts)}

    def __str__(self) -> str:
        steps = "1 step" if self.number == 1 else f"{self.number} steps"
        of = ", ".join(self.parts) or "weight: no example counted"
        return f"{steps} refused, the first at step {self.first} (not finite: {of})"


def together(rows: Iterable[Mapping]) -> Refusals:
    """The refusals of a whole run, from the rows of its intervals."""
    found = Refusals()
    for row in rows:
        of_row = row.get("refused")
        if of_row:
            parts = tuple(dict.fromkeys([*found.parts, *of_row["not_finite"]]))
            found = Refusals(found.number + of_row["count"], found.first or of_row["first"], parts)
    return found
