import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from experiments.training import models


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(28, 28), (7, 5), (1, 1), (2, 3)])
def test_conv3x3_is_the_convolution(stride, size):
    x = jax.random.normal(jax.random.key(0), (2, *size, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 4))
    layer = models.conv3x3(4, stride=stride, use_bias=False)
    expected = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    # 27 products of order 1 are summed in another order: a few units of 6e-8.
    np.testing.assert_allclose(layer.apply({"kernel": kernel}, x), expected, atol=1e-5)


def mlp(norm, **keywords):
    weights = models.normal_weights(0.05)
    return models.mlp((5, 4), norm, activation=jax.nn.relu, weights=weights, **keywords)


def test_both_arms_start_from_the_same_weights():
    x = jnp.ones((2, 6))
    plain = mlp(jaxbn.identity(), use_bias=True).init(jax.random.key(0), x)["params"]
    normalized = mlp(jaxbn.batch_norm(), use_bias=False).init(jax.random.key(0), x)["params"]
    for ours, theirs in zip(plain, normalized, strict=True):
        np.testing.assert_array_equal(ours["layer"]["kernel"], theirs["layer"]["kernel"])


def test_only_the_head_has_a_bias_where_the_norm_has_one():
    params = mlp(jaxbn.batch_norm(), use_bias=False).init(jax.random.key(0), jnp.ones((2, 6)))["params"]
    assert ["bias" in param["layer"] for param in params] == [False, False, True]


def test_mlp_is_layer_norm_activation():
    x = jax.random.normal(jax.random.key(1), (3, 6))
    network = mlp(jaxbn.identity(), use_bias=True)
    variables = network.init(jax.random.key(0), x)
    kernels = [param["layer"]["kernel"] for param in variables["params"]]
    expected = np.maximum(np.maximum(x @ kernels[0].T, 0) @ kernels[1].T, 0) @ kernels[2].T
    # Sums of at most 6 products, in another order than numpy's.
    np.testing.assert_allclose(network.apply(variables, x, train=False)[0], expected, rtol=1e-5, atol=1e-8)


def test_training_moves_the_running_statistics_and_testing_does_not():
    x = jax.random.normal(jax.random.key(1), (3, 6))
    network = mlp(jaxbn.batch_norm(), use_bias=False)
    variables = network.init(jax.random.key(0), x)
    _, trained = network.apply(variables, x, train=True)
    _, tested = network.apply(variables, x, train=False)
    assert not np.array_equal(trained[0]["mean"], variables["batch_stats"][0]["mean"])
    np.testing.assert_array_equal(tested[0]["mean"], variables["batch_stats"][0]["mean"])


def test_weights_have_the_asked_deviation():
    kernel = models.cut(models.normal_weights(5.0), jax.random.key(0), [(200, 200)])[0]
    # The deviation of 40,000 draws is known to 1 in 280 (one standard error); four of them.
    np.testing.assert_allclose(np.std(kernel), 5.0, rtol=4 / 280)


def test_glorot_weights_fill_their_range():
    kernel = np.asarray(models.cut(models.glorot_weights(), jax.random.key(0), [(3, 3, 20, 40)])[0])
    limit = np.sqrt(6 / (9 * 60))
    assert limit * 0.99 < np.abs(kernel).max() <= limit


def test_deep_conv_has_nineteen_convolutions_that_end_in_one_pixel():
    network = models.deep_conv(19, jaxbn.identity(), use_bias=True)
    variables = jax.eval_shape(network.init, jax.random.key(0), jnp.ones((2, 28, 28, 1)))
    shapes = [param["layer"]["kernel"].shape for param in variables["params"]]
    assert shapes[:2] == [(3, 3, 1, 4), (3, 3, 4, 8)]
    assert shapes[18:] == [(3, 3, 72, 76), (100, 76), (10, 100)]


@pytest.mark.parametrize("depth", [1, 3])
def test_tower_is_the_mlp_of_its_depth(depth):
    x = jax.random.normal(jax.random.key(1), (8, 6))
    how = dict(use_bias=False, activation=jax.nn.relu, weights=models.normal_weights(0.5))
    tower = models.tower(4, 5, jaxbn.batch_norm(), **how)
    variables = tower.init(jax.random.key(0), x, depth)
    mlp = models.mlp((5,) * depth, jaxbn.batch_norm(), **how)
    same = mlp.init(jax.random.key(0), x)
    below, *above, head = same["params"]
    below["layer"] = variables["params"]["first"]["layer"]
    for number, layer in enumerate(above):
        layer["layer"] = {"kernel": variables["params"]["rest"]["layer"]["kernel"][number]}
    head["layer"] = variables["params"]["head"]
    for train in (True, False):
        ours, theirs = tower.apply(variables, x, train=train)[0], mlp.apply(same, x, train=train)[0]
        # Some roundings of float32 a layer.
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_layers_beyond_the_depth_of_a_tower_get_no_gradient():
    x = jax.random.normal(jax.random.key(1), (8, 6))
    tower = models.tower(
        4, 5, jaxbn.batch_norm(), use_bias=False, activation=jax.nn.relu, weights=models.glorot_weights()
    )
    variables = tower.init(jax.random.key(0), x, 2)
    gradient = jax.grad(lambda params: tower.apply({**variables, "params": params}, x, train=True)[0][:, 0].sum())(
        variables["params"]
    )
    kernel = gradient["rest"]["layer"]["kernel"]
    assert jnp.any(kernel[0] != 0)
    assert not jnp.any(kernel[1:])


def test_a_look_into_networks_finds_what_their_layers_see():
    norm = jaxbn.batch_norm()
    x = jax.random.normal(jax.random.key(1), (8, 6))
    build = lambda norm: mlp(norm, use_bias=False)
    several = jax.vmap(lambda key: build(norm).init(key, x))(jax.random.split(jax.random.key(0), 3))
    first, second = models.look(build, norm, lambda h, y: jnp.stack([h, y]).std(1))(several, x)
    assert (first.shape, second.shape) == ((3, 2, 5), (3, 2, 4))
    kernels = several["params"][0]["layer"]["kernel"]
    np.testing.assert_allclose(first[:, 0], jnp.einsum("ni,rji->rnj", x, kernels).std(1), rtol=1e-5)
    np.testing.assert_allclose(second[:, 1], 1, rtol=0.2)  # small variances feel epsilon
