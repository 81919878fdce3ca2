"""`experiments.training.adaptation` against the library's own measurements, layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbn
from experiments.training import adaptation, data, fine_tuning, models

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


def test_fine_tuning_ends_with_exact_statistics_where_a_run_says_so(trained):
    images = np.asarray(255 * IMAGES, np.uint8)
    arrays = {"train_images": images.reshape(12, -1), "train_labels": np.zeros(12, int), "test_images": images}
    arrays = jax.tree.map(jnp.asarray, arrays)
    numbers = {"frozen": [0, 0], "of_target": [0, 0], "exact": [0, 1], "rate": [0.1, 0.1]}
    runs = {name: jnp.asarray(values, jnp.float32) for name, values in numbers.items()}
    tuning = fine_tuning.fine_tuning(build, NORM, lambda run: optax.sgd(run["rate"]))
    states = tuning.begin(runs, jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), trained), arrays)
    found = tuning.finish(runs, states, arrays)["variables"]["batch_stats"]
    exact = adaptation.adapted(build, NORM, trained, data.pixels(jnp.asarray(images)), jnp.ones(12, bool), 0)
    for number, expected in enumerate([trained, exact]):
        ended = adaptation.melt({"batch_stats": jax.tree.map(lambda leaf, n=number: leaf[n], found)})["batch_stats"]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ended, expected["batch_stats"])
