"""Layer, instance, group, root-mean-square and filter response norm against float64, Flax and each other."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from normalizers import KEY, QUICK, draw, in_training

from jaxbn import variants

X = draw(0, (4, 3, 5, 6))
HARD = draw(1, (4, 3, 5, 6), offset=2e6)  # |mean| / std = 1e6.
LARGE = 1e18 * draw(2, (4, 3, 5, 6))
LAYER, INSTANCE, GROUP = variants.layer_norm(), variants.instance_norm(), variants.group_norm(2)
# A few roundings of float32, relative to outputs of size one.
CLOSE = {"rtol": 2e-6, "atol": 2e-6}


@functools.cache
def compiled(norm):
    return jax.jit(functools.partial(norm.apply, train=True), compiler_options=QUICK)


def outputs(norm, x, dtype=None):
    """y with scale and bias off their initial values, and these."""
    variables = in_training(norm, x)
    y, _ = compiled(norm)(variables, x)
    return y, {name: np.asarray(v, np.float64) for name, v in variables["params"].items()}


def run(norm, x, where=None, **params):
    variables = {"params": params, "batch_stats": {}}
    return jax.jit(lambda v, x: norm.apply(v, x, train=True, where=where), compiler_options=QUICK)(variables, x)


def standardized(x, axis, epsilon=1e-5):
    x = np.asarray(x, np.float64)
    return (x - x.mean(axis, keepdims=True)) / np.sqrt(x.var(axis, keepdims=True) + epsilon)


def over_root_mean_square(x, axis, epsilon):
    x = np.asarray(x, np.float64)
    return x / np.sqrt(np.mean(x**2, axis, keepdims=True) + epsilon)


@pytest.mark.parametrize("x", [X, HARD, LARGE], ids=["plain", "far from zero", "large"])
def test_layer_norm_is_equation_4_in_float64(x):
    y, params = outputs(LAYER, x)
    np.testing.assert_allclose(y, params["scale"] * standardized(x, -1) + params["bias"], **CLOSE)


def test_layer_norm_equals_flax_for_several_axes():
    norm = variants.layer_norm(axis=(-1, -2), feature_axis=-1, epsilon=1e-3)
    y, params = outputs(norm, X)
    flax = nn.LayerNorm(epsilon=1e-3, reduction_axes=(-1, -2), feature_axes=-1)
    np.testing.assert_allclose(y, flax.apply({"params": params}, X), **CLOSE)


@pytest.mark.parametrize("x", [X, HARD, LARGE], ids=["plain", "far from zero", "large"])
def test_instance_norm_standardizes_each_feature_map_in_float64(x):
    y, params = outputs(INSTANCE, x)
    np.testing.assert_allclose(y, params["scale"] * standardized(x, (1, 2)) + params["bias"], **CLOSE)


def test_instance_norm_takes_channels_first():
    last, params = outputs(variants.instance_norm(), X)
    norm = variants.instance_norm(feature_axis=1)
    first, _ = run(norm, jnp.moveaxis(X, -1, 1), **params)
    np.testing.assert_allclose(jnp.moveaxis(first, 1, -1), last, **CLOSE)


@pytest.mark.parametrize("x", [X, HARD, LARGE], ids=["plain", "far from zero", "large"])
def test_group_norm_is_equation_7_in_float64(x):
    y, params = outputs(GROUP, x)
    expected = standardized(np.asarray(x).reshape(4, 3, 5, 2, 3), (1, 2, 4)).reshape(x.shape)
    np.testing.assert_allclose(y, params["scale"] * expected + params["bias"], **CLOSE)


def test_group_norm_equals_flax():
    y, params = outputs(variants.group_norm(3, epsilon=1e-6), X)
    np.testing.assert_allclose(y, nn.GroupNorm(3).apply({"params": params}, X), **CLOSE)


def test_group_norm_takes_channels_first():
    last, params = outputs(variants.group_norm(3), X)
    norm = variants.group_norm(None, group_size=2, feature_axis=1)
    first, _ = run(norm, jnp.moveaxis(X, -1, 1), **params)
    np.testing.assert_allclose(jnp.moveaxis(first, 1, -1), last, **CLOSE)


def test_group_norm_of_one_group_is_layer_norm_over_everything():
    layer = variants.layer_norm(axis=(1, 2, 3), feature_axis=-1)
    np.testing.assert_allclose(outputs(variants.group_norm(1), X)[0], outputs(layer, X)[0], **CLOSE)


def test_group_norm_of_single_channels_is_instance_norm():
    single = variants.group_norm(None, group_size=1)
    np.testing.assert_allclose(outputs(single, X)[0], outputs(variants.instance_norm(), X)[0], **CLOSE)


@pytest.mark.parametrize("x", [X, HARD, LARGE, 1e-18 * X], ids=["plain", "far from zero", "large", "small"])
def test_rms_norm_is_equation_4_in_float64(x):
    epsilon = 1e-6 if np.abs(x).max() > 1 else 1e-30
    y, params = outputs(variants.rms_norm(epsilon=epsilon), x)
    np.testing.assert_allclose(y, params["scale"] * over_root_mean_square(x, -1, epsilon), **CLOSE)


def test_rms_norm_equals_flax():
    y, params = outputs(variants.rms_norm(), X)
    np.testing.assert_allclose(y, nn.RMSNorm().apply({"params": params}, X), **CLOSE)


def test_gradient_of_rms_norm_survives_large_inputs():
    # In float32 1 / rms**3 of 1e18 is zero; the gradient is -1e-18 times a number of size one.
    x, dy = LARGE[0, 0, 0], jnp.arange(6.0)
    norm = variants.rms_norm(use_scale=False)
    grad = jax.jit(jax.grad(lambda x: jnp.sum(dy * norm.apply({"batch_stats": {}}, x, train=True)[0])))(x)
    wide, rms = np.asarray(x, np.float64), np.sqrt(np.mean(np.asarray(x, np.float64) ** 2))
    expected = (np.arange(6) - wide * np.mean(np.arange(6) * wide) / rms**2) / rms
    np.testing.assert_allclose(grad, expected, rtol=1e-5)


def test_filter_response_norm_is_the_three_equations_of_the_paper():
    y, params = outputs(variants.filter_response_norm(), X)
    expected = params["scale"] * over_root_mean_square(X, (1, 2), 1e-6) + params["bias"]
    np.testing.assert_allclose(y, np.maximum(expected, params["threshold"]), **CLOSE)


def test_filter_response_norm_of_one_position_takes_a_learned_epsilon():
    x = draw(3, (4, 6))
    y, params = outputs(variants.filter_response_norm(learn_epsilon=True, use_threshold=False), x)
    expected = np.asarray(x, np.float64) / np.sqrt(np.asarray(x, np.float64) ** 2 + 1e-6 + np.abs(params["epsilon"]))
    np.testing.assert_allclose(y, params["scale"] * expected + params["bias"], **CLOSE)


@pytest.mark.parametrize(
    ("build", "over"),
    [
        (variants.layer_norm, 3),
        (variants.rms_norm, 3),
        (variants.instance_norm, 1),
        (functools.partial(variants.group_norm, 2), 2),
        (variants.filter_response_norm, 1),
    ],
    ids=["layer", "rms", "instance", "group", "filter response"],
)
def test_statistics_are_pooled_over_shards_of_the_reduced_axis(build, over):
    params = {} if over == 3 else in_training(build(), X)["params"]
    options = {"use_scale": False} | ({"use_bias": False} if build is variants.layer_norm else {})
    plain, pooled = (build(axis_name=name, **(options if over == 3 else {})) for name in (None, "shards"))
    apply = lambda norm, x: norm.apply({"params": params, "batch_stats": {}}, x, train=True)[0]
    parts = jnp.stack(jnp.split(X, {3: 2, 2: 5, 1: 3}[over], axis=over))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(parts):
        return jax.vmap(functools.partial(apply, pooled), axis_name="shards")(parts), apply(plain, X)

    y, expected = both(parts)
    np.testing.assert_allclose(jnp.concatenate(list(y), axis=over), expected, **CLOSE)


def test_masked_positions_leave_instance_norm_to_the_others():
    norm = variants.instance_norm(use_scale=False, use_bias=False)
    y, _ = run(norm, X, where=(np.arange(5) < 3)[:, None])
    np.testing.assert_allclose(y[:, :, :3], standardized(X[:, :, :3], (1, 2)), **CLOSE)


def test_example_that_the_mask_leaves_out_altogether_stays_finite():
    norm = variants.layer_norm(use_scale=False, use_bias=False)
    y, _ = run(norm, X, where=np.zeros((4, 1, 1, 1), bool))
    assert np.all(np.isfinite(y))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: variants.layer_norm(epsilon=-1.0), "epsilon=-1.0"),
        (lambda: outputs(variants.layer_norm(), X[..., :1]), "one value per feature"),
        (lambda: outputs(variants.instance_norm(), X[:, 0, 0]), "one value per feature"),
        (lambda: variants.group_norm(4).init(KEY, X), "does not divide"),
        (lambda: variants.group_norm(4, group_size=2), "expected one of them"),
        (lambda: outputs(variants.filter_response_norm(), X[:, 0, 0]), "learn_epsilon=True"),
        (lambda: run(variants.rms_norm(), X, scale=jnp.ones(5)), r"scale has shape \(5,\)"),
        (lambda: variants.instance_norm(batch_axis=-1).init(KEY, X), "twice"),
    ],
)
def test_refusal_says_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()
