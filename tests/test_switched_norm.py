"""The normalizer whose kind is a number of the run, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from experiments.training.switched_norm import EPSILON, freeze, kind, switched

X = np.random.default_rng(0).normal(1.0, 2.0, (8, 3, 3, 4)).astype(np.float32)
OTHER = 3 * X + 1
AXES = (0, 1, 2)
NORMS = {
    "l1": np.abs(X).mean(AXES),
    "l2": np.sqrt((X**2).mean(AXES)),
    "l-infinity": np.abs(X).max(AXES),
}


def after_batches(run, *batches):
    """The outputs for the last of some training batches, and the variables after it."""
    norm = switched(run)
    variables = norm.init(jax.random.key(0), jnp.asarray(X))
    for batch in batches:
        y, stats = norm.apply(variables, jnp.asarray(batch), train=True)
        variables = {**variables, "batch_stats": stats}
    return y, variables


def test_dividing_by_the_standard_deviation_is_batch_norm():
    norm = jaxbn.batch_norm(epsilon=EPSILON)
    expected, _ = norm.apply(norm.init(jax.random.key(0), jnp.asarray(X)), jnp.asarray(X), train=True)
    y, variables = after_batches(kind(), X)
    np.testing.assert_allclose(y, expected, atol=1e-5)  # float32, another order of sums
    np.testing.assert_allclose(variables["batch_stats"]["spread"], 0, atol=1e-5)


@pytest.mark.parametrize("size", NORMS)
def test_a_p_norm_is_taken_before_the_mean_is_subtracted(size):
    y, _ = after_batches(kind(size), X)
    np.testing.assert_allclose(y, (X - X.mean(AXES)) / NORMS[size], atol=1e-4)  # epsilon


def test_frozen_statistics_are_those_of_the_first_batch():
    y, _ = after_batches(kind(frozen=True), X, OTHER)
    np.testing.assert_allclose(y, (OTHER - X.mean(AXES)) / X.std(AXES), atol=1e-4)


def test_no_gradient_flows_through_frozen_statistics():
    def total(x, run):
        norm = switched(run)
        return jnp.sum(norm.apply(norm.init(jax.random.key(0), x), x, train=True)[0])

    frozen = jax.grad(total)(jnp.asarray(X), kind(frozen=True))
    np.testing.assert_allclose(frozen, np.broadcast_to(1 / X.std(AXES), X.shape), rtol=1e-4)
    np.testing.assert_allclose(jax.grad(total)(jnp.asarray(X), kind()), 0, atol=1e-5)


def test_a_plain_layer_changes_nothing_at_first_and_has_no_use_of_its_scale():
    y, variables = after_batches(kind(normalize=False), X, OTHER)
    np.testing.assert_array_equal(y, OTHER)
    norm = switched(kind(normalize=False))

    def total(params):
        return jnp.sum(norm.apply({**variables, "params": params}, jnp.asarray(X), train=True)[0] ** 2)

    np.testing.assert_array_equal(jax.grad(total)(variables["params"])["scale"], 0)


def test_freezing_keeps_the_function_and_stops_the_gradient_of_the_statistics():
    y, variables = after_batches(kind(), X)
    frozen = freeze({**variables, "batch_stats": [variables["batch_stats"]]})
    norm = switched(kind())

    def applied(x):
        return norm.apply({**frozen, "batch_stats": frozen["batch_stats"][0]}, x, train=True)[0]

    np.testing.assert_allclose(applied(jnp.asarray(X)), y, atol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(applied(x)))(jnp.asarray(X))
    np.testing.assert_allclose(gradient, np.broadcast_to(1 / X.std(AXES), X.shape), rtol=1e-4)
