"""Rates in place of decay, on a loss that does not depend on the size of a row of weights: a Rayleigh quotient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.training import rate_and_decay
from experiments.training.rate_and_decay import ARMS, DECAY, DECAYING, GROWING, HELD, NONE, REPLAYED

RATE, SHRINK, STEPS = 0.5, 0.95, 100


def quotient(w):
    """Of one arm, w: [units, inputs]."""
    return jnp.sum(jnp.sum(w**2 * jnp.arange(w.shape[-1])[None], -1) / jnp.sum(w**2, -1))


@pytest.fixture(scope="module")
def directions():
    """The rows' directions after STEPS, [units, inputs], by arm."""
    with jax.enable_x64(True):
        weights = rate_and_decay.start(0, {"w": np.random.default_rng(0).normal(size=(3, 5))}, ARMS)
        gradient = jax.jit(jax.vmap(jax.grad(quotient)))
        for growing in rate_and_decay.growing_rates(RATE, SHRINK, STEPS):
            weights = rate_and_decay.descend(
                weights,
                {"w": gradient(weights["w"])},
                frozenset({"w"}),
                ARMS,
                *map(jnp.float64, (RATE, SHRINK, growing)),
            )
        w = np.asarray(weights["w"])
        return dict(zip(ARMS, w / np.linalg.norm(w, axis=-1, keepdims=True), strict=True))


@pytest.mark.parametrize(("arm", "reference"), [(GROWING, DECAY), (REPLAYED, DECAY), (HELD, NONE)])
def test_a_replacement_takes_the_same_directions(directions, arm, reference):
    np.testing.assert_allclose(directions[arm], directions[reference], atol=1e-10)  # rounding of 100 steps


def test_decay_takes_other_directions_than_no_decay(directions):
    assert np.abs(directions[DECAY] - directions[NONE]).max() > 1e-3


def test_a_leaf_that_is_not_free_has_one_rate_and_decays_where_the_arm_does():
    ones = {"w": jnp.ones((len(ARMS), 2, 3))}
    moved = rate_and_decay.descend(ones, ones, frozenset(), ARMS, *map(jnp.float32, (0.25, 0.5, 9)))["w"]
    np.testing.assert_array_equal(moved[:, 0, 0], [0.25 if arm in DECAYING else 0.75 for arm in ARMS])


def test_the_growing_rate_leaves_float32_where_forecast():
    last = rate_and_decay.last_step_in_range(RATE, SHRINK, np.float32)
    with np.errstate(over="ignore"):
        growing = rate_and_decay.growing_rates(RATE, SHRINK, int(last) + 3).astype(np.float32)
    np.testing.assert_array_equal(np.isfinite(growing), np.arange(len(growing)) <= last)


def test_outputs_are_apart_by_at_most_1_and_wholly_where_not_finite():
    a, b = jnp.array([3.0, 4.0]), jnp.array([jnp.nan, 0.0])
    assert [float(rate_and_decay.apart(a, other)) for other in (a, -a, b)] == [0, 1, 1]
