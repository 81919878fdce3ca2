"""Which params an arm of `affine_only` trains."""

import jax
import numpy as np
import pytest

from experiments import affine_only
from experiments.affine_only import AFFINE, ALL, LAST, RANDOM

PARAMS = {
    "stem": {"kernel": np.ones((3, 3, 1, 4)), "norm": {"scale": np.ones(4), "bias": np.ones(4)}},
    "block": {"kernel": np.ones((3, 3, 4, 8)), "norm": {"scale": np.ones(8), "bias": np.ones(8)}},
    "head": {"kernel": np.ones((8, 10)), "bias": np.ones(10)},
}


def count(arm, seed=0):
    return sum(leaf.sum() for leaf in jax.tree.leaves(affine_only.marks_of(arm, seed, PARAMS)))


@pytest.mark.parametrize(("arm", "expected"), [(ALL, 36 + 288 + 24 + 90), (AFFINE, 24), (RANDOM, 24), (LAST, 90)])
def test_number_of_trained_params(arm, expected):
    assert count(arm) == expected


def test_every_filter_has_two_random_weights_and_every_seed_others():
    first, second = (affine_only.marks_of(RANDOM, seed, PARAMS)["block"]["kernel"] for seed in (0, 1))
    np.testing.assert_array_equal(first.sum((0, 1, 2)), affine_only.PER_FILTER)
    assert (first != second).any()
