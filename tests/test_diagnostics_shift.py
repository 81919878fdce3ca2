"""Shift of distributions that were shifted on purpose, and of gradients that are known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from jaxbn.diagnostics import covariate_shift, gradient_shift
from jaxbn.training import LossOutput

ROUNDING = 1e-5  # Tens of roundings of float32.
X = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)


def affine(variables, batch, rng, tap):
    """Taps `scale x + bias`."""
    params = variables["params"]
    h = tap("h", params["scale"][None] * batch + params["bias"][None])
    return LossOutput(jnp.sum(h), h.size, {})


def shift(scale, bias):
    before = {"params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)}}
    after = {"params": {"scale": jnp.full(3, float(scale)), "bias": jnp.full(3, float(bias))}}
    return covariate_shift(affine, before, after, jnp.asarray(X))["h"]


def test_nothing_moves_where_nothing_moved():
    found = shift(1, 0)
    np.testing.assert_allclose(found.mean_before, X.mean(0), atol=ROUNDING)
    np.testing.assert_allclose(found.var_before, X.var(0), rtol=ROUNDING)
    for name in ("mean_shift", "log_std_ratio", "distance"):
        np.testing.assert_array_equal(getattr(found, name), 0)


def test_a_shift_by_a_constant():
    found = shift(1, 2)
    for name in ("mean_shift", "distance"):
        np.testing.assert_allclose(getattr(found, name), 2 / X.std(0), rtol=ROUNDING)
    np.testing.assert_allclose(found.log_std_ratio, 0, atol=ROUNDING)


def test_a_change_of_scale():
    found = shift(3, 0)
    np.testing.assert_allclose(found.mean_after, 3 * X.mean(0), atol=ROUNDING)
    np.testing.assert_allclose(found.var_after, 9 * X.var(0), rtol=ROUNDING)
    np.testing.assert_allclose(found.log_std_ratio, np.log(3), rtol=ROUNDING)
    # Sorted values keep their order, and each moves by twice its size.
    np.testing.assert_allclose(found.distance, 2 * np.abs(X).mean(0) / X.std(0), rtol=ROUNDING)


def test_a_change_of_shape_alone_has_a_distance():
    # Mirrored values have another distribution, but for the mean the same moments.
    skew = np.exp(X - X.max()) - np.exp(X - X.max()).mean(0)
    before = {"params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)}}
    after = {"params": {"scale": -jnp.ones(3), "bias": jnp.zeros(3)}}
    found = covariate_shift(affine, before, after, jnp.asarray(skew))["h"]
    np.testing.assert_allclose(found.mean_shift, 0, atol=ROUNDING)
    np.testing.assert_allclose(found.log_std_ratio, 0, atol=ROUNDING)
    mirrored = np.abs(np.sort(skew, axis=0) + np.sort(skew, axis=0)[::-1]).mean(0)
    np.testing.assert_allclose(found.distance, mirrored / skew.std(0), rtol=10 * ROUNDING)


def test_leading_axes_count_as_examples():
    variables = [{"params": {"scale": jnp.ones(3), "bias": jnp.full(3, bias)}} for bias in (0.0, 1.0)]

    def in_space(variables, batch, rng, tap):
        return affine(variables, batch, rng, lambda name, h: tap(name, h.reshape(5, 10, 3)).reshape(50, 3))

    flat, images = (covariate_shift(loss, *variables, jnp.asarray(X)) for loss in (affine, in_space))
    jax.tree.map(np.testing.assert_array_equal, flat, images)


def product(variables, batch, rng):
    """`a . (b * c) + (a.a + b.b + c.c) / 2` of three layers with two weights each."""
    a, b, c = jax.tree.leaves(variables["params"])
    return LossOutput(a @ (b * c) + 0.5 * (a @ a + b @ b + c @ c), 1, {})


BEFORE = {"a": jnp.array([1.0, 2.0]), "b": {"x": jnp.array([3.0, -1.0])}, "c": {"x": jnp.array([0.5, 1.0])}}
AFTER = {"a": jnp.array([2.0, 2.0]), "b": {"x": jnp.array([1.0, -1.0])}, "c": {"x": jnp.array([9.0, 9.0])}}


@pytest.mark.parametrize("layers", [("a", "b", "c"), (["a"], ("b/x",), "c")])
def test_gradients_of_a_product_shift_with_the_layers_below(layers):
    found = gradient_shift(product, {"params": BEFORE}, AFTER, None, layers=layers)
    own = np.stack(jax.tree.leaves(BEFORE))
    old = np.array([[1.5, -1.0], [0.5, 2.0], [3.0, -2.0]]) + own  # b c, a c, a b
    new = np.array([[1.5, -1.0], [1.0, 2.0], [2.0, -2.0]]) + own  # b c, a' c, a' b'
    np.testing.assert_allclose(found.norm, np.linalg.norm(old, axis=1), rtol=ROUNDING)
    np.testing.assert_allclose(found.norm_after, np.linalg.norm(new, axis=1), rtol=ROUNDING)
    np.testing.assert_allclose(found.distance, np.linalg.norm(np.subtract(new, old), axis=1), rtol=ROUNDING)
    cosines = np.sum(np.multiply(old, new), axis=1) / np.linalg.norm(old, axis=1) / np.linalg.norm(new, axis=1)
    np.testing.assert_allclose(found.cosine, cosines, rtol=ROUNDING)


def test_layers_run_from_the_input_in_the_order_given():
    found = gradient_shift(product, {"params": BEFORE}, AFTER, None, layers=("c", "b", "a"))
    assert found.distance[0] == 0
    np.testing.assert_allclose(found.norm_after[2], np.linalg.norm([9.0 + 1, -9.0 + 2]), rtol=ROUNDING)  # b' c' + a


def test_a_layer_above_batch_norm_does_not_notice_the_scale_of_those_below():
    norm = jaxbn.batch_norm(use_scale=False, use_bias=False, epsilon=1e-12)
    shapes = {"low": (3, 4), "high": (4, 2)}
    rng = np.random.default_rng(1)
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    batch_stats = norm.init(jax.random.key(0), jnp.zeros((50, 4)))["batch_stats"]

    def loss(variables, batch, rng, *, normalize):
        h, moved = batch @ variables["params"]["low"], variables["batch_stats"]
        if normalize:
            h, moved = norm.apply({"params": {}, "batch_stats": moved}, h, train=True)
        return LossOutput(jnp.sum(jax.nn.relu(h) @ variables["params"]["high"]), 50, moved)

    variables, after = {"params": params, "batch_stats": batch_stats}, params | {"low": 5 * params["low"]}
    plain, normalized = (
        gradient_shift(
            jax.tree_util.Partial(loss, normalize=flag), variables, after, jnp.asarray(X), layers=("low", "high")
        )
        for flag in (False, True)
    )
    assert normalized.distance[1] <= ROUNDING * normalized.norm[1]
    np.testing.assert_allclose(plain.distance[1], 4 * plain.norm[1], rtol=ROUNDING)
    np.testing.assert_allclose(plain.cosine[1], 1, rtol=ROUNDING)
