"""Noise in the statistics, and measures of uncertainty, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from experiments.training import models, uncertainty
from experiments.training.noisy_statistics import EPSILON, NOISY, SMALLEST, WHOLE, drop, group_statistics, kind, start

X = np.random.default_rng(0).normal(1.0, 2.0, (64, 3)).astype(np.float32)


def numbers(**choices):
    return {name: jnp.float32(value) for name, value in kind(**choices).items()}


def outputs(x, **choices):
    variables = NOISY.init(jax.random.key(0), jnp.asarray(x))
    stats = {**variables["batch_stats"], "kind": numbers(**choices)}
    return NOISY.apply({**variables, "batch_stats": stats}, jnp.asarray(x), train=True)


@pytest.mark.parametrize("group", [SMALLEST, 16, 64])
def test_a_group_is_a_ghost_batch(group):
    norm = jaxbn.ghost_batch_norm(group, epsilon=EPSILON)
    expected, _ = norm.apply(norm.init(jax.random.key(0), jnp.asarray(X)), jnp.asarray(X), train=True)
    y, stats = outputs(X, group=group)
    np.testing.assert_allclose(y, expected, atol=1e-5)  # float32, another order of sums
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * X.reshape(-1, group, 3).var(1).mean(0), rtol=1e-5)


def test_a_whole_batch_is_one_group():
    np.testing.assert_allclose(outputs(X, group=WHOLE)[0], outputs(X, group=64)[0], atol=1e-6)


def test_drawn_noise_has_the_deviations_of_statistics_of_a_group():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4096, 8)), jnp.float32)
    found = {}
    for drawn in (False, True):
        mean, var = group_statistics(x, numbers(group=16, drawn=drawn), jax.random.key(2))
        found[drawn] = np.std(mean[::4]), np.std(np.log(var[::4])) / 2
    np.testing.assert_allclose(found[True], [16**-0.5, 32**-0.5], rtol=0.05)  # of 2,048 draws
    np.testing.assert_allclose(
        found[False], found[True], rtol=0.1
    )  # that of the logarithm is a bit more in small groups


def test_dropout_keeps_the_mean():
    y = drop(jax.random.key(0), jnp.ones((1000, 100)), jnp.float32(0.25))
    assert set(np.unique(y)) == {0, np.float32(4 / 3)}
    np.testing.assert_allclose(np.mean(np.asarray(y)), 1, atol=0.01)  # 5 deviations: (1/3 / 1e5)^0.5 each
    np.testing.assert_array_equal(drop(jax.random.key(0), jnp.ones((10, 10)), jnp.float32(0)), 1)


def test_noise_changes_from_step_to_step():
    network = models.mlp((8,), NOISY, use_bias=False, activation=jax.nn.relu, weights=models.glorot_weights())
    variables = start(network, kind(dropout=0.5), jax.random.key(0), jnp.asarray(X))
    first, moved = network.apply(variables, jnp.asarray(X), train=True)
    second, _ = network.apply({**variables, "batch_stats": moved}, jnp.asarray(X), train=True)
    again, _ = network.apply(variables, jnp.asarray(X), train=True)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 0.1


def test_measures_of_uncertainty():
    probabilities, labels = jnp.asarray([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7]]), jnp.asarray([0, 1, 1])
    np.testing.assert_allclose(
        uncertainty.log_likelihood(probabilities, labels), np.log([0.9, 0.1, 0.7]).mean(), rtol=1e-6
    )
    np.testing.assert_allclose(uncertainty.calibration_error(probabilities, labels), (0.8 + 0.3) / 3, rtol=1e-5)
    np.testing.assert_allclose(uncertainty.entropy(jnp.asarray([[0.5, 0.5], [1.0, 0.0]])), [np.log(2), 0], atol=1e-6)
    np.testing.assert_allclose(uncertainty.auroc(jnp.asarray([1.0, 2.0]), jnp.asarray([2.0, 3.0])), (0.75 + 1) / 2)


def test_a_temperature_undoes_a_factor():
    logits = jax.random.normal(jax.random.key(0), (4000, 5))
    labels = jax.random.categorical(jax.random.key(1), logits)
    np.testing.assert_allclose(uncertainty.best_temperature(3 * logits, labels), 3, rtol=0.1)  # the grid is 5% apart


def test_monte_carlo_batch_norm_with_one_batch_is_batch_norm_by_it():
    def build(norm):
        return models.mlp((8,), norm, use_bias=False, activation=jax.nn.relu, weights=models.glorot_weights())

    x, key = jnp.asarray(X), jax.random.key(3)
    network = build(jaxbn.batch_norm(decay=0.0))
    variables = network.init(key, x)
    stats = network.apply(variables, x[:16], train=True)[1]
    expected = jax.nn.softmax(network.apply({**variables, "batch_stats": stats}, x, train=False)[0])
    batches = jnp.broadcast_to(x[:16], (3, 16, 3))
    found = uncertainty.monte_carlo_batch_norm(build, variables["params"], batches, x, key)
    np.testing.assert_allclose(found, expected, atol=1e-5)
