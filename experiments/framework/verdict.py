"""Judging a claim: an interval over seeds against the threshold that was fixed, and the same for every cell."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xarray as xr
from scipy import stats

from experiments.framework.claim import Claim

SUPPORTED = "supported"
IN_PART = "supported in part"
NOT_SUPPORTED = "not supported"
INCONCLUSIVE = "inconclusive"

CONFIDENCE = 0.95
MOST_SEEDS = 10  # more would have to be planned for
MOST_TOLD = 1000  # a larger number of seeds says no more than that the effect lies at the threshold
BARE = ("of test accuracy", "relative")  # units that what is measured names already


class Interval(NamedTuple):
    """A mean and its confidence interval; infinite ends where a single value gives none."""

    mean: float
    low: float
    high: float


class Cell(NamedTuple):
    """The effect in one cell: `where` says which, as {axis: value}."""

    where: dict[str, object]
    effect: float
    low: float
    high: float
    outcome: str


class Verdict(NamedTuple):
    """One claim, judged. `effect`, `low`, `high` and `threshold` are in `unit`."""

    claim: str
    outcome: str  # SUPPORTED, IN_PART, NOT_SUPPORTED or INCONCLUSIVE
    kind: str  # a key of `claim.KINDS`
    effect: float
    low: float
    high: float
    unit: str
    threshold: float
    criterion: str
    found: str  # the figures behind the effect, in a sentence; may be empty
    count: int  # number of seeds (or other repetitions)
    needed: int | None  # if inconclusive: the number of seeds that would decide it, going by these
    cells: list[Cell]
    ratio: bool
    source: str
    p_value: float | None  # of the hypothesis that the claim is false; None where no interval is taken


def judge(claim: Claim, results: xr.Dataset) -> Verdict:
    """Hold the effect against the claim's threshold: averaged over cells for every seed, and cell by cell."""
    effect = claim.effect(results)
    if claim.over not in effect.dims:
        raise ValueError(
            f"the effect of {claim.sentence!r} has axes {effect.dims}; expected {claim.over!r} among them."
        )
    axes = [name for name in effect.dims if name != claim.over]
    by_cell = effect.transpose(*axes, claim.over)
    table = np.asarray(by_cell.values, np.float64).reshape(-1, by_cell.sizes[claim.over])
    places = [dict(zip(axes, index, strict=True)) for index in np.ndindex(*(by_cell.sizes[a] for a in axes))]
    known = [number for number, values in enumerate(table) if not np.isnan(values).any()]
    cells = [_cell(claim, by_cell, places[number], table[number]) for number in known] if axes else []
    found = claim.in_figures(results)
    if not known:
        nothing = np.full(by_cell.sizes[claim.over], np.nan)
        return _verdict(claim, nothing, [], found + " No cell in which the effect can be measured.")
    return _verdict(claim, _mean(claim, table[known], 0), cells, found)


def _cell(claim, array, place, values) -> Cell:
    named = {axis: array[axis].values[index].item() for axis, index in place.items() if axis in array.coords}
    interval = _interval(claim, values)
    return Cell(named, *interval, decide(claim, interval, values))


def _verdict(claim, values, cells, found) -> Verdict:
    interval = _interval(claim, values)
    outcome = decide(claim, interval, values)
    if outcome == SUPPORTED and any(cell.outcome != SUPPORTED for cell in cells):
        outcome = IN_PART
    if claim.kind == "exact" and cells:  # the mean over cells would hide the largest
        worst = max(cells, key=lambda cell: abs(cell.high))
        interval = Interval(*worst[1:4])
        outcome = SUPPORTED if all(cell.outcome == SUPPORTED for cell in cells) else NOT_SUPPORTED
    needed = seeds_needed(claim, values) if outcome == INCONCLUSIVE else None
    fixed = claim.unit, float(claim.threshold), claim.criterion
    judged = found.strip(), len(values), needed, cells, claim.ratio, claim.source
    return Verdict(claim.sentence, outcome, claim.kind, *interval, *fixed, *judged, p_value(claim, values))


def decide(claim: Claim, interval: Interval, values: np.ndarray) -> str:
    """Supported if all of the interval is where the claim says, not if none of it is, else inconclusive."""
    _, low, high = interval
    limit = claim.threshold
    if claim.kind == "exact":
        return SUPPORTED if np.all(np.abs(values) <= limit) else NOT_SUPPORTED
    if math.isnan(interval.mean):
        return INCONCLUSIVE
    if claim.kind == "above":
        return SUPPORTED if low > limit else NOT_SUPPORTED if high <= limit else INCONCLUSIVE
    if claim.kind == "below":
        return SUPPORTED if high < limit else NOT_SUPPORTED if low >= limit else INCONCLUSIVE
    first, last = (1 / (1 + limit), 1 + limit) if claim.ratio else (-limit, limit)
    inside, outside = first < low and high < last, high <= first or last <= low
    return SUPPORTED if inside else NOT_SUPPORTED if outside else INCONCLUSIVE


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Student's t interval of the mean of independent `values` (one per seed)."""
    values = np.asarray(values, np.float64)
    mean = float(values.mean())
    if len(values) < 2 or not np.isfinite(values).all():
        return Interval(mean, -math.inf, math.inf)
    half = stats.t.ppf(0.5 + confidence / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return Interval(mean, mean - float(half), mean + float(half))


def ratio_interval(ratios: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The geometric mean of positive `ratios` and its interval: the t interval of their logarithms."""
    logs = interval(np.log(np.asarray(ratios, np.float64)), confidence)
    return Interval(*(math.inf if bound == math.inf else math.exp(bound) for bound in logs))


def _interval(claim, values) -> Interval:
    if claim.kind == "exact":
        largest = float(np.max(np.abs(values)))
        return Interval(largest, float(np.min(np.abs(values))), largest)
    return (ratio_interval if claim.ratio else interval)(values)


def _mean(claim, table, axis):
    return np.exp(np.mean(np.log(table), axis)) if claim.ratio else np.mean(table, axis)


def _scaled(claim, values) -> tuple[np.ndarray, float, float]:
    """Values, threshold and the value of no effect on the scale on which they are averaged."""
    values = np.asarray(values, np.float64)
    limit = claim.neutral + claim.threshold if claim.kind == "equal" else claim.threshold
    return (np.log(values), math.log(limit), 0.0) if claim.ratio else (values, limit, 0.0)


def p_value(claim: Claim, values: np.ndarray) -> float | None:
    """One-sided t test of the mean against the threshold (two one-sided tests for `equal`); None for `exact`."""
    if claim.kind == "exact" or len(values) < 2 or not np.isfinite(values).all():
        return None
    scaled, limit, neutral = _scaled(claim, values)
    deviation = scaled.std(ddof=1) / math.sqrt(len(scaled))

    def beyond(distance: float) -> float:
        if deviation == 0:
            return 0.0 if distance > 0 else 1.0
        return float(stats.t.sf(distance / deviation, len(scaled) - 1))

    if claim.kind == "above":
        return beyond(scaled.mean() - limit)
    if claim.kind == "below":
        return beyond(limit - scaled.mean())
    return max(beyond(limit - scaled.mean()), beyond(scaled.mean() - (2 * neutral - limit)))


def seeds_for(claim: Claim, values: np.ndarray) -> int:
    """Seeds with which the interval gets as narrow as the claim's precision, going by the deviation of a pilot.

    The mean of the pilot plays no part. At least 3.
    """
    scaled, limit, neutral = _scaled(claim, values)
    goal = claim.precision or abs(limit - neutral) / 2
    if not goal:
        raise ValueError(f"{claim.sentence!r} has no effect as its threshold: give the claim a precision.")
    return _seeds_with_half_width(float(scaled.std(ddof=1)), goal, 3)


def seeds_needed(claim: Claim, values: np.ndarray) -> int | None:
    """Seeds with which the interval would no longer reach the threshold, were mean and deviation to stay."""
    if not np.isfinite(values).all() or len(values) < 2:
        return None
    scaled, limit, _ = _scaled(claim, values)
    mean = abs(scaled.mean()) if claim.kind == "equal" else scaled.mean()
    distance = abs(float(mean) - limit)
    return _seeds_with_half_width(float(scaled.std(ddof=1)), distance, len(values) + 1) if distance else None


def _seeds_with_half_width(deviation, goal, least) -> int:
    """The smallest count whose t interval is no wider than twice the goal."""
    low, high = least - 1, least
    while high < 10**6 and stats.t.ppf(0.5 + CONFIDENCE / 2, high - 1) * deviation / math.sqrt(high) > goal:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        wide = stats.t.ppf(0.5 + CONFIDENCE / 2, middle - 1) * deviation / math.sqrt(middle) > goal
        low, high = (middle, high) if wide else (low, middle)
    return high


def outcome_in_words(found: Verdict) -> str:
    """The outcome, in how many cells the claim holds, and what would decide it."""
    words = found.outcome
    if len(found.cells) > 1:
        held = sum(cell.outcome == SUPPORTED for cell in found.cells)
        words += f", in {held} of {len(found.cells)} cells" if held or words != IN_PART else ": on average, in no cell"
    if math.isnan(found.effect):
        return f"{words}: it could not be measured"
    if found.needed:
        count = f"about {found.needed}" if found.needed <= MOST_TOLD else f"more than {MOST_TOLD:,}"
        words += f", would need {count} {'seeds' if found.count != 1 else 'seeds, not one'}"
    return words


def measured(found: Verdict) -> str:
    """What was measured, in words: the criterion without its rule."""
    return found.criterion.rsplit("; supported if ", 1)[0]


def effect_in_words(found: Verdict) -> str:
    """What was measured, the effect, its interval and the number of values behind it."""
    if math.isnan(found.effect):
        return f"{measured(found)}: could not be measured."
    unit = "" if found.ratio or found.unit in BARE else f" {found.unit}"
    if found.kind == "exact":
        return f"{measured(found)}: at most {found.effect:.2g}{unit} (n = {found.count})."
    known = math.isfinite(found.low) and math.isfinite(found.high)
    bounds = f"95% interval {found.low:.3g} to {found.high:.3g}" if known else "no interval"
    return f"{measured(found)} = {found.effect:.3g}{unit} ({bounds}, n = {found.count})."


def cell_in_words(cell: Cell) -> str:
    """Which cell it is: "sigmoid, rate 1"."""
    return ", ".join(v if isinstance(v, str) else f"{axis} {v:g}" for axis, v in cell.where.items())
