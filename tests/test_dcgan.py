"""The GAN's layers and gradients against JAX's own, and the distance between sets of features in closed form."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.framework.thumbnails import pack, unpack
from experiments.training import adversarial, feature_distance

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def kernel_of(flat, features):
    """A kernel [16 channels, features] as XLA has it: its rows go over cells of 2 x 2, and pixels in each."""
    cells = flat.reshape(2, 2, 2, 2, -1, features)  # cell's row and column, pixel's row and column, channel
    return cells.transpose(0, 2, 1, 3, 4, 5).reshape(4, 4, -1, features)


def test_halving_is_a_convolution_with_stride_2():
    x, flat = draw(2, 8, 8, 3), draw(48, 5, seed=1)
    padding = ((1, 1), (1, 1))
    expected = jax.lax.conv_general_dilated(x, kernel_of(flat, 5), (2, 2), padding, dimension_numbers=DIMENSIONS)
    np.testing.assert_allclose(adversarial.halve(flat, x), expected, atol=1e-4)  # sums of 48 products in float32


def test_doubling_is_the_transpose_of_halving():
    small, large, flat = draw(2, 4, 4, 5), draw(2, 8, 8, 3, seed=1), draw(48, 5, seed=2)
    there, back = jnp.vdot(adversarial.halve(flat, large), small), jnp.vdot(large, adversarial.double(flat, small))
    np.testing.assert_allclose(there, back, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [{}, {"generator": True, "discriminator": True, "ends": True}])
def test_each_player_descends_its_own_loss(numbers):
    run = adversarial.arm(**numbers, he=True)
    norm = adversarial.normalizer(4)
    variables = adversarial.init({name: jnp.float32(value) for name, value in run.items()}, 1, jax.random.key(0))
    params, stats = variables["params"], variables["batch_stats"]
    real, noise = draw(4, 32, 32, 1), draw(4, adversarial.NOISE, seed=1)

    def loss(of, player, own):
        every = {**params, player: own}
        made, _ = adversarial.generate(norm, run, (every["generator"], stats["generator"]), noise, train=True)
        judged = every["discriminator"], stats["discriminator"]
        return of(adversarial.judge(norm, run, judged, jnp.concatenate([real, made]))[0])

    found, _, losses = adversarial.descent(norm, run, params, stats, real, noise)
    of = {"generator": adversarial.generator_loss, "discriminator": adversarial.discriminator_loss}
    for number, player in enumerate(adversarial.PLAYERS):
        value, gradient = jax.value_and_grad(partial(loss, of[player], player))(params[player])
        np.testing.assert_allclose(losses[number], value, rtol=1e-5)
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4), found[player], gradient)


def test_images_come_back_from_what_the_generator_makes():
    images = jax.random.uniform(jax.random.key(0), (2, 28, 28, 1))
    assert adversarial.as_images(images).shape == (2, 32, 32, 1)
    np.testing.assert_allclose(adversarial.as_digits(adversarial.as_images(images)), images, atol=1e-6)


def test_distance_of_shifted_features_is_the_squared_shift():
    features = np.random.default_rng(0).normal(size=(50, 4))
    shift = np.array([1.0, 2.0, 0.0, 0.0])
    assert feature_distance.frechet_distance(features, features + shift) == pytest.approx(5, abs=1e-9)


def test_distance_of_scaled_features_is_that_of_their_deviations():
    features = np.random.default_rng(0).normal(size=(50, 4))
    features -= features.mean(0)
    expected = np.trace(np.cov(features, rowvar=False))  # (2 - 1)^2 times the variance
    assert feature_distance.frechet_distance(features, 2 * features) == pytest.approx(expected, abs=1e-9)
    assert feature_distance.variety(2 * features, features) == pytest.approx(4)


def test_only_digits_that_the_classifier_is_sure_of_often_enough_count():
    probabilities = np.full((100, 3), 0.01)
    probabilities[:97, 0] = 0.98  # often
    probabilities[97:98, 1] = 0.98  # too rarely
    probabilities[98:, 2] = 0.85  # not sure
    assert feature_distance.digits_found(probabilities) == 1
    assert feature_distance.sure_of(probabilities) == pytest.approx(0.98)


def test_packed_images_come_back_in_sixteen_shades():
    images = np.random.default_rng(0).random((3, 28, 28))
    np.testing.assert_allclose(unpack(pack(images), (28, 28)), images, atol=0.5 / 15 + 1e-9)
