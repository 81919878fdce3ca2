"""Judging a claim: an effect per seed, its interval, and a threshold stated before the run."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

SUPPORTED = "supported"
NOT_SUPPORTED = "not supported"
INCONCLUSIVE = "inconclusive"


class Interval(NamedTuple):
    """A mean and its confidence interval; infinite ends where a single value gives none."""

    mean: float
    low: float
    high: float


class Verdict(NamedTuple):
    """One claim, judged. `effect`, `low`, `high` and `threshold` are in `unit`."""

    claim: str  # the claim in a sentence
    outcome: str  # SUPPORTED, NOT_SUPPORTED or INCONCLUSIVE
    effect: float
    low: float
    high: float
    unit: str  # "points of accuracy", "times as many steps", ...
    threshold: float
    criterion: str  # the rule, fixed before the run: what is measured, and what counts as support
    sentence: str  # what was found, in a sentence with its figures
    count: int  # number of seeds (or repetitions)


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean of independent `values` (one per seed)."""
    values = np.asarray(values, np.float64)
    mean = float(values.mean())
    if len(values) < 2 or not np.isfinite(values).all():
        return Interval(mean, -math.inf, math.inf)
    half = stats.t.ppf(0.5 + confidence / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return Interval(mean, mean - float(half), mean + float(half))


def ratio_interval(ratios: Sequence[float], confidence: float = 0.95) -> Interval:
    """The geometric mean of positive `ratios` and its interval: the t interval of their logarithms."""
    logs = interval(np.log(np.asarray(ratios, np.float64)), confidence)
    return Interval(*(math.inf if bound == math.inf else math.exp(bound) for bound in logs))


def decide(found: Interval, threshold: float) -> str:
    """Supported if all of the interval lies above the threshold, not if none of it does, else inconclusive."""
    if found.low > threshold:
        return SUPPORTED
    return NOT_SUPPORTED if found.high <= threshold else INCONCLUSIVE


def verdict(
    claim: str,
    effects: Sequence[float],
    *,
    threshold: float,
    unit: str,
    criterion: str,
    sentence: str,
    ratio: bool = False,
) -> Verdict:
    """Judge `claim` by one effect per seed: support means that the 95% interval lies above `threshold`.

    With `ratio=True` the effects are positive ratios, averaged geometrically. Claims of the form "less than" are
    written with the effect turned round, so that larger is always more support. One seed is never enough.
    """
    found = (ratio_interval if ratio else interval)(effects)
    outcome = decide(found, threshold)
    return Verdict(claim, outcome, *found, unit, threshold, criterion, sentence, len(effects))


def effect_in_words(found: Verdict) -> str:
    """The effect, its interval and the number of values behind it."""
    known = math.isfinite(found.low) and math.isfinite(found.high)
    interval_in_words = f"95% interval {found.low:.3g} to {found.high:.3g}" if known else "no interval"
    return (
        f"Effect: {found.effect:.3g} {found.unit}, {interval_in_words}, n = {found.count};"
        f" supported above {found.threshold:g}."
    )
