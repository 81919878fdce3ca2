"""The switches of `experiments.training.disturbed`: each kind against the library's own normalizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from experiments.training import disturbed

X = 3 + 2 * jax.random.normal(jax.random.key(0), (4000, 3))


def variables(kind: dict) -> dict:
    found = disturbed.DISTURBED.init(jax.random.key(1), X)
    kind = {name: jnp.float32(value) for name, value in kind.items()}
    return {**found, "batch_stats": {**found["batch_stats"], **kind}}


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_is_the_librarys(train):
    ours = variables(disturbed.NORM)
    theirs = {"params": ours["params"], "batch_stats": ours["batch_stats"]["norm"]}
    y, stats = disturbed.DISTURBED.apply(ours, X, train=train)
    expected, moved = disturbed.BATCH_NORM.apply(theirs, X, train=train)
    np.testing.assert_array_equal(y, expected)
    jax.tree.map(np.testing.assert_array_equal, stats["norm"], moved)


def test_plain_adds_a_bias_alone():
    ours = variables(disturbed.PLAIN)
    ours["params"]["bias"] = jnp.arange(3.0)
    np.testing.assert_array_equal(disturbed.DISTURBED.apply(ours, X, train=True)[0], X + jnp.arange(3.0)[None])


def test_noise_is_distributed_as_the_librarys():
    y = jax.random.normal(jax.random.key(2), (1000, 200))
    ours = disturbed.noise(jax.random.key(3), y)
    noisy = jaxbn.noisy(jaxbn.identity())
    theirs, _ = noisy.apply({"params": {}, "batch_stats": {}}, y, train=True, rng=jax.random.key(4))
    # Of 200 units, whose means and deviations are drawn: their mean, deviation and largest value.
    for measure in (jnp.mean, jnp.std):
        a, b = (np.sort(measure(noised, axis=0)) for noised in (ours, theirs))
        np.testing.assert_allclose(a, b, atol=0.12)  # quantiles of 200 draws from a range of 1


def test_noise_is_new_at_every_step_and_absent_at_test_time():
    first = variables(disturbed.NOISY)
    y, stats = disturbed.DISTURBED.apply(first, X, train=True)
    again, _ = disturbed.DISTURBED.apply(first, X, train=True)
    other, _ = disturbed.DISTURBED.apply(
        {**first, "batch_stats": {**stats, "norm": first["batch_stats"]["norm"]}}, X, train=True
    )
    np.testing.assert_array_equal(y, again)
    assert float(jnp.mean(jnp.abs(other - y))) > 0.05
    at_test = disturbed.DISTURBED.apply(first, X, train=False)[0]
    np.testing.assert_array_equal(at_test, disturbed.DISTURBED.apply(variables(disturbed.NORM), X, train=False)[0])
