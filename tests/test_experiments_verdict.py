import math

import numpy as np
import pytest
from scipy import stats

from experiments.framework.verdict import (
    INCONCLUSIVE,
    NOT_SUPPORTED,
    SUPPORTED,
    Interval,
    decide,
    interval,
    ratio_interval,
    verdict,
)


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


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [(1.1, 2.0, SUPPORTED), (0.9, 2.0, INCONCLUSIVE), (0.5, 1.0, NOT_SUPPORTED), (-math.inf, math.inf, INCONCLUSIVE)],
)
def test_decision_compares_the_whole_interval_with_the_threshold(low, high, outcome):
    assert decide(Interval(1.0, low, high), 1.0) == outcome


@pytest.mark.parametrize("effects", [[5.0], [math.nan, math.nan], [math.inf, 3.0, 4.0]])
@pytest.mark.parametrize("ratio", [False, True])
def test_too_little_to_judge_is_inconclusive(effects, ratio):
    words = {"unit": "", "criterion": "", "sentence": ""}
    assert verdict("", effects, threshold=1.0, ratio=ratio, **words).outcome == INCONCLUSIVE
