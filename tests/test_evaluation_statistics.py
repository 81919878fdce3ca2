"""Statistics of a trained network after training, and the book's LeNet whose convolutions are products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from experiments.training import book_lenet, models
from experiments.training import evaluation_statistics as statistics

IMAGES = np.random.default_rng(0).integers(0, 256, (24, 4, 4, 1)).astype(np.uint8)
LABELS = np.arange(24) % 3
PIXELS = jnp.asarray(IMAGES, jnp.float32) / 255


def network(decay=0.0):
    norm = jaxbn.batch_norm(decay=decay)
    return models.mlp((5, 5), norm, use_bias=False, activation=jax.nn.relu, weights=models.glorot_weights(), classes=3)


def test_running_averages_of_every_decay_are_those_of_batch_norm():
    kept = statistics.with_decays(network(), (0.9, 0.5))
    variables = kept.init(jax.random.key(0), PIXELS)
    alone = {decay: network(decay).init(jax.random.key(0), PIXELS) for decay in (0.9, 0.5)}
    for batch in (PIXELS[:8], PIXELS[8:]):
        logits, stats = kept.apply(variables, batch, train=True)
        variables = {**variables, "batch_stats": stats}
        for decay, own in alone.items():
            expected, moved = network(decay).apply(own, batch, train=True)
            np.testing.assert_allclose(logits, expected, rtol=1e-6)
            alone[decay] = {**own, "batch_stats": moved}
    for place, own in enumerate(alone.values()):
        jax.tree.map(lambda v, w, i=place: np.testing.assert_allclose(v[i], w, rtol=1e-5), stats, own["batch_stats"])
    logits, _ = kept.apply(variables, PIXELS, train=False)
    np.testing.assert_allclose(logits, network().apply(alone[0.9], PIXELS, train=False)[0], rtol=1e-5)


def test_pooled_batches_are_the_population_of_one_pass():
    variables = network().init(jax.random.key(0), PIXELS)
    images, labels = statistics.random_batches(jnp.asarray(IMAGES), jnp.asarray(LABELS), 6)
    assert sorted(np.asarray(labels).ravel()) == sorted(LABELS)
    stats, right = statistics.by_batch(network().apply, variables["params"], variables["batch_stats"], images, labels)
    batches = [batch.astype(np.float32) / 255 for batch in images]
    apply = lambda variables, x: network().apply(variables, x, train=True)[1]
    exact = jaxbn.population_statistics(apply, variables, batches)
    jax.tree.map(lambda v, w: np.testing.assert_allclose(v, w, rtol=1e-5, atol=1e-6), statistics.pooled(stats), exact)
    logits, _ = network().apply(variables, batches[1], train=True)
    assert right[1] == pytest.approx(np.mean(np.argmax(logits, -1) == labels[1]))


def test_the_average_at_rest_is_the_recursion():
    batches = np.random.default_rng(1).normal(size=(7, 3)).astype(np.float32)
    expected = start = np.ones(3, np.float32)
    for batch in batches:
        expected = 0.9 * expected + 0.1 * batch
    np.testing.assert_allclose(statistics.averaged(batches, 0.9, start), expected, rtol=1e-5)


@pytest.mark.parametrize("padding", [0, 2])
def test_a_convolution_of_the_books_lenet_is_a_convolution(padding):
    layer = book_lenet.convolution(6, padding=padding, use_bias=True)
    x = np.random.default_rng(2).normal(size=(3, 2, 9, 8)).astype(np.float32)  # [channels, batch, height, width]
    kernel = np.random.default_rng(3).normal(size=layer.kernel_shape(x.shape)).astype(np.float32)
    assert kernel.shape == (5, 5, 3, 6)
    weights = {"kernel": kernel, "bias": np.arange(6.0, dtype=np.float32)}
    numbers = ("CNHW", "HWIO", "CNHW")
    expected = jax.lax.conv_general_dilated(x, kernel, (1, 1), [(padding, padding)] * 2, dimension_numbers=numbers)
    found = layer.apply(weights, jnp.asarray(x))
    np.testing.assert_allclose(found, expected + weights["bias"].reshape(-1, 1, 1, 1), rtol=1e-4, atol=1e-4)


def test_the_books_lenet_has_its_parameters():
    plain = book_lenet.lenet(jaxbn.identity(), padding=2, use_bias=True)
    shapes = jax.eval_shape(plain.init, jax.random.key(0), jax.ShapeDtypeStruct((2, 28, 28, 1), jnp.float32))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == 61_706
