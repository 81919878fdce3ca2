"""Holm's correction: which of many claims hold when all of them are tested together."""

from collections.abc import Sequence

from experiments.framework.verdict import CONFIDENCE, IN_PART, SUPPORTED, Verdict

# A claim has one side, and is supported if the end of a two-sided interval lies there.
LEVEL = (1 - CONFIDENCE) / 2


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given.

    The i-th smallest of n (from 0) is multiplied by n - i; none gets below one that was smaller. S. Holm, A simple
    sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6, 1979.
    """
    order = sorted(range(len(p_values)), key=lambda number: p_values[number])
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, number in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[number]))
        adjusted[number] = largest
    return adjusted


def survivors(verdicts: Sequence[Verdict]) -> list[bool | None]:
    """Whether each claim that held, at least in part, still holds after the correction over all; None if not tested.

    Claims that are exact, and those of one seed, have no p-value and are not tested.
    """
    tested = [number for number, found in enumerate(verdicts) if found.p_value is not None]
    adjusted = holm([verdicts[number].p_value or 0.0 for number in tested])
    survive: list[bool | None] = [None] * len(verdicts)
    for number, p_value in zip(tested, adjusted, strict=True):
        survive[number] = verdicts[number].outcome in (SUPPORTED, IN_PART) and p_value <= LEVEL
    return survive
