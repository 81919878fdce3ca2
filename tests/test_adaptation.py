"""`experiments.training.adaptation` against the library's own measurements, layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from experiments.training import adaptation, models

NORM = jaxbn.batch_norm(decay=0.9, epsilon=1e-5)
IMAGES = jax.random.uniform(jax.random.key(0), (12, 28, 28, 1))
SEEN = jnp.arange(12) < 8


def build(norm):
    layers = [models.conv3x3(3, stride=2, use_bias=True), models.dense(5, use_bias=True)]
    return models.stack(layers, models.dense(10, use_bias=True), norm, jax.nn.relu, models.glorot_weights())


@pytest.fixture(scope="module")
def trained():
    network = build(NORM)
    variables = network.init(jax.random.key(1), IMAGES)
    _, moved = network.apply(variables, 3 * IMAGES, train=True)
    return {**variables, "batch_stats": moved}


def test_statistics_of_the_target_are_those_of_the_population(trained):
    found = adaptation.adapted(build, NORM, trained, IMAGES, SEEN, 0)
    apply = lambda variables, x: build(NORM).apply(variables, x, train=True)[1]
    expected = jaxbn.population_statistics(apply, trained, [IMAGES[:8]], layer_by_layer=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found["batch_stats"], expected)


def test_blend_of_the_first_layer_counts_images(trained):
    found = adaptation.adapted(build, NORM, trained, IMAGES, SEEN, 24)["batch_stats"][0]
    old = trained["batch_stats"][0]
    new = adaptation.adapted(build, NORM, trained, IMAGES, SEEN, 0)["batch_stats"][0]
    for name in ("mean", "var"):
        np.testing.assert_allclose(found[name], 0.75 * old[name] + 0.25 * new[name], rtol=1e-5)


def test_norms_put_in_after_training_have_no_effect():
    network = build(jaxbn.identity())
    variables = network.init(jax.random.key(2), IMAGES)
    found = adaptation.with_norms(build, variables, IMAGES, epsilon=1e-5)
    ours, _ = build(NORM).apply(found, IMAGES, train=False)
    expected, _ = network.apply(variables, IMAGES, train=False)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_freezing_is_the_librarys(trained, frozen):
    network = build(adaptation.freezable(NORM))
    ours, moved = network.apply(adaptation.freeze(trained, frozen), IMAGES, train=True)
    expected, stats = build(jaxbn.frozen(NORM) if frozen else NORM).apply(trained, IMAGES, train=True)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    moved = adaptation.melt({"batch_stats": moved})["batch_stats"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), moved, stats)
