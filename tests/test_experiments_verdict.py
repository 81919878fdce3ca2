import math

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from experiments.framework.claim import Claim, Compared
from experiments.framework.verdict import (
    IN_PART,
    INCONCLUSIVE,
    NOT_SUPPORTED,
    SUPPORTED,
    Interval,
    interval,
    judge,
    outcome_in_words,
    p_value,
    ratio_interval,
    seeds_for,
    seeds_needed,
)

WORDS = {"measures": "what is measured", "unit": "points"}


def results(values, axes=("seed",)):
    """Results with one array `v` over the axes; axes other than "seed" get their numbers as values."""
    values = np.asarray(values, np.float64)
    coords = {axis: np.arange(values.shape[n]) for n, axis in enumerate(axes) if axis != "seed"}
    return xr.Dataset({"v": (axes, values)}, coords)


def judged(values, axes=("seed",), **claim):
    return judge(Claim("Claim.", lambda r: r.v, **WORDS, **claim), results(values, axes))


def test_interval_is_students_t():
    values = np.array([1.0, 2.0, 4.0, 9.0])
    expected = stats.t.interval(0.95, 3, loc=values.mean(), scale=stats.sem(values))
    np.testing.assert_allclose(interval(values), (4.0, *expected), rtol=1e-12)


def test_one_value_gives_no_interval():
    assert interval([3.0]) == Interval(3.0, -math.inf, math.inf)


def test_ratio_interval_is_symmetric_under_inversion():
    ratios = np.array([1.5, 2.0, 4.0])
    there, back = ratio_interval(ratios), ratio_interval(1 / ratios)
    np.testing.assert_allclose([there.mean * back.mean, there.low * back.high], 1.0, rtol=1e-12)


# Half the width of the interval of (1, 2, 3) is 2.48 around 2.
@pytest.mark.parametrize(
    ("kind", "limit", "outcome"),
    [
        ("above", -0.5, SUPPORTED),
        ("above", 1.0, INCONCLUSIVE),
        ("above", 4.5, NOT_SUPPORTED),
        ("below", 4.5, SUPPORTED),
        ("below", 3.0, INCONCLUSIVE),
        ("below", -0.5, NOT_SUPPORTED),
        ("equal", 4.5, SUPPORTED),
        ("equal", 1.0, INCONCLUSIVE),
        ("exact", 3.0, SUPPORTED),
        ("exact", 2.9, NOT_SUPPORTED),
    ],
)
def test_the_outcome_of_each_kind_of_claim(kind, limit, outcome):
    assert judged([1.0, 2.0, 3.0], **{kind: limit}).outcome == outcome


def test_equal_is_refuted_by_an_interval_outside_the_margin():
    assert judged([5.0, 5.1, 5.2], equal=1.0).outcome == NOT_SUPPORTED


@pytest.mark.parametrize("ratio", [2.0, 0.5])
def test_equal_ratios_are_judged_alike_both_ways(ratio):
    values = np.full((3,), ratio) * (1, 1.01, 1.02) if ratio > 1 else ratio / np.array([1, 1.01, 1.02])
    assert judged(values, equal=0.5, ratio=True).outcome == NOT_SUPPORTED
    assert judged(values, equal=1.5, ratio=True).outcome == SUPPORTED


@pytest.mark.parametrize("effects", [[5.0], [math.nan, math.nan], [math.inf, 3.0, 4.0]])
@pytest.mark.parametrize("ratio", [False, True])
@pytest.mark.parametrize("kind", ["above", "below", "equal"])
def test_too_little_to_judge_is_inconclusive(effects, ratio, kind):
    assert judged(effects, ratio=ratio, **{kind: 1.0}).outcome == INCONCLUSIVE


def test_the_verdict_is_of_the_mean_over_cells_and_every_cell_is_shown():
    found = judged([[0.9, 1.0, 1.1], [0.0, 0.1, -0.1]], ("rate", "seed"), above=0.3)
    assert (found.outcome, found.effect, found.count) == (IN_PART, pytest.approx(0.5), 3)
    assert [(cell.where, cell.outcome) for cell in found.cells] == [
        ({"rate": 0}, SUPPORTED),
        ({"rate": 1}, NOT_SUPPORTED),
    ]
    assert outcome_in_words(found) == "supported in part, in 1 of 2 cells"


def test_cells_are_averaged_seed_by_seed():
    """What two cells of a seed have in common does not count twice, nor does it cancel."""
    found = judged([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]], ("rate", "seed"), above=0.5)
    assert (found.low, found.high) == (1.0, 1.0)


def test_a_cell_with_an_unknown_value_is_left_out():
    found = judged([[0.9, 1.0, 1.1], [0.0, math.nan, 9.0]], ("rate", "seed"), above=0.5)
    assert (found.outcome, found.effect, len(found.cells)) == (SUPPORTED, pytest.approx(1.0), 1)


def test_an_exact_claim_takes_the_largest_of_all_cells():
    found = judged([[0.0, 1e-9], [-3e-7, 0.0]], ("rate", "seed"), exact=1e-8)
    assert (found.outcome, found.effect) == (NOT_SUPPORTED, pytest.approx(3e-7))


def test_an_effect_without_the_repeated_axis_is_refused():
    with pytest.raises(ValueError, match="expected 'round' among them"):
        judged([1.0, 2.0], above=0.0, over="round")


def test_a_claim_has_exactly_one_threshold():
    with pytest.raises(ValueError, match="give exactly one"):
        Claim("Claim.", lambda r: r.v, **WORDS)
    with pytest.raises(ValueError, match="give exactly one"):
        Claim("Claim.", lambda r: r.v, above=1.0, below=2.0, **WORDS)


def test_compared_arms_say_what_they_are_and_what_was_found():
    values = xr.Dataset({"v": (("arm", "seed"), [[1.0, 2.0], [3.0, 6.0]])}, {"arm": ["plain", "batch norm"]})
    gain = Claim("Claim.", Compared(lambda r: r.v), above=0.0, **WORDS)
    assert judge(gain, values).effect == 3.0
    assert gain.criterion.startswith("What is measured: batch norm minus plain;")
    times = Claim("Claim.", Compared(lambda r: r.v, ratio=True), above=1.0, **WORDS)
    assert judge(times, values).effect == pytest.approx(3.0)
    assert judge(times, values).found == "Mean 4.5 (batch norm) against 1.5 (plain)."


@pytest.mark.parametrize("ratio", [False, True])
def test_p_values_fit_the_intervals(ratio):
    values = np.exp([0.3, 0.5, 0.9, 0.4]) if ratio else np.array([0.3, 0.5, 0.9, 0.4])
    for kind, end in (("above", "low"), ("below", "high")):
        edge = getattr(judged(values, ratio=ratio, above=0.1), end)
        claim = Claim("Claim.", lambda r: r.v, ratio=ratio, **{kind: edge}, **WORDS)
        assert p_value(claim, values) == pytest.approx(0.025)


def test_the_planned_number_of_seeds_reaches_the_precision_and_one_less_does_not():
    values, claim = np.array([0.1, 0.3, 0.2, 0.7]), Claim("", lambda r: r.v, above=0.5, precision=0.1, **WORDS)
    n, deviation = seeds_for(claim, values), values.std(ddof=1)

    def half(n):
        return stats.t.ppf(0.975, n - 1) * deviation / math.sqrt(n)

    assert half(n) <= 0.1 < half(n - 1)
    assert seeds_for(claim, values + 5) == n  # the mean plays no part


def test_an_inconclusive_verdict_says_how_many_seeds_would_decide():
    found = judged([0.4, 0.9, 0.6, 0.8], above=0.5)
    assert found.outcome == INCONCLUSIVE
    claim = Claim("", lambda r: r.v, above=0.5, **WORDS)
    assert found.needed == seeds_needed(claim, np.array([0.4, 0.9, 0.6, 0.8])) > 4
    assert f"would need about {found.needed} seeds" in outcome_in_words(found)
