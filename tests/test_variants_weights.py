"""Mean-only batch norm, weight normalization, and the two predecessors of batch norm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from normalizers import KEY, QUICK, draw, in_training

import jaxbn
from jaxbn import variants

X = draw(0, (12, 4))
KERNEL = draw(1, (3, 3, 5, 4), offset=0.0)
CLOSE = {"rtol": 3e-6, "atol": 3e-6}  # A few roundings of float32 of values of size one.


def train(norm, variables, x):
    return jax.jit(lambda v, x: norm.apply(v, x, train=True), compiler_options=QUICK)(variables, x)


def test_mean_only_subtracts_the_mean_of_the_batch():
    norm = variants.mean_only_batch_norm(decay=0.75)
    variables = in_training(norm, X)
    y, stats = train(norm, variables, X)
    wide = np.asarray(X, np.float64)
    np.testing.assert_allclose(y, wide - wide.mean(0) + np.asarray(variables["params"]["bias"]), **CLOSE)
    np.testing.assert_allclose(stats["mean"], 0.75 * variables["batch_stats"]["mean"] + 0.25 * wide.mean(0), rtol=1e-6)


def test_mean_only_evaluation_subtracts_the_running_mean():
    norm = variants.mean_only_batch_norm(use_bias=False)
    variables = in_training(norm, X)
    y, _ = norm.apply(variables, X, train=False)
    np.testing.assert_allclose(y, X - variables["batch_stats"]["mean"][None], **CLOSE)


def test_mean_only_centres_the_gradient():
    norm = variants.mean_only_batch_norm(use_bias=False)
    dy = draw(2, X.shape)
    variables = norm.init(KEY, X)
    grad = jax.jit(jax.grad(lambda x: jnp.sum(dy * norm.apply(variables, x, train=True)[0])))(X)
    np.testing.assert_allclose(grad, dy - jnp.mean(dy, 0, keepdims=True), **CLOSE)


def test_mean_only_is_exact_far_from_zero():
    x = draw(3, (12, 4), offset=2e6)
    norm = variants.mean_only_batch_norm()
    y, _ = train(norm, norm.init(KEY, x), x)
    np.testing.assert_allclose(y, np.asarray(x, np.float64) - np.mean(np.asarray(x, np.float64), 0), **CLOSE)


def test_one_value_per_feature_is_refused_in_mean_only_training():
    norm = variants.mean_only_batch_norm()
    with pytest.raises(ValueError, match="one value per feature"):
        norm.apply(norm.init(KEY, X[:1]), X[:1], train=True)


@pytest.mark.parametrize("size", [1.0, 1e18, 1e-6])
def test_weight_norm_has_the_norm_that_gain_says(size):
    gain = jnp.array([0.5, 1.0, 2.0, 0.0])
    kernel = variants.weight_norm(size * KERNEL, gain)
    wide = np.asarray(KERNEL, np.float64)
    expected = np.asarray(gain) * wide / np.sqrt(np.sum(wide**2, (0, 1, 2)))
    np.testing.assert_allclose(kernel, expected, rtol=1e-5, atol=1e-7)


def test_weight_norm_undoes_its_split():
    for axis in (-1, 2):
        direction, gain = variants.weight_norm_split(KERNEL, feature_axis=axis)
        np.testing.assert_allclose(variants.weight_norm(direction, gain, feature_axis=axis), KERNEL, **CLOSE)


def test_gradient_of_the_direction_is_orthogonal_to_it():
    # Equation 3: the gradient is projected away from the current weights.
    dy, gain = draw(4, KERNEL.shape), jnp.ones(4)
    grad = jax.grad(lambda v: jnp.sum(dy * variants.weight_norm(v, gain)))(KERNEL)
    np.testing.assert_allclose(jnp.sum(grad * KERNEL, (0, 1, 2)), jnp.zeros(4), atol=1e-5)


def test_direction_of_zeros_gives_zeros_and_no_nan():
    value, grad = jax.value_and_grad(lambda v: jnp.sum(variants.weight_norm(v, jnp.ones(4))))(jnp.zeros((3, 4)))
    assert value == 0
    assert np.all(np.isfinite(grad))


def test_first_batch_sets_gain_and_bias_so_that_it_comes_out_normalized():
    direction, gain, bias = draw(5, (4, 6), offset=0.0), jnp.full(6, 2.0), jnp.full(6, 0.5)
    out = lambda gain, bias: X @ variants.weight_norm(direction, gain) + bias[None]
    started = variants.weight_norm_init(gain, bias, jaxbn.moments(out(gain, bias), 0))
    after = jaxbn.moments(out(*started), 0)
    np.testing.assert_allclose(after.mean, np.zeros(6), atol=1e-5)
    np.testing.assert_allclose(after.var, np.ones(6), rtol=1e-4)


def test_gain_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"gain has shape \(5,\)"):
        variants.weight_norm(KERNEL, jnp.ones(5))


def test_penalty_is_the_squared_distance_from_mean_zero_and_deviation_one():
    wide = np.asarray(X, np.float64)
    expected = np.mean(wide.mean(0) ** 2 + (np.sqrt(wide.var(0) + 1e-5) - 1) ** 2)
    np.testing.assert_allclose(variants.penalty(X), expected, rtol=1e-6)


def test_penalty_of_normalized_activations_is_zero():
    y, _ = jaxbn.batch_normalize(X, axis=0, epsilon=0.0)
    np.testing.assert_allclose(variants.penalty(y, epsilon=0.0), 0.0, atol=1e-12)


def test_descent_on_the_penalty_normalizes():
    step = jax.jit(lambda x: x - 6.0 * jax.grad(variants.penalty)(x))
    x = X
    for _ in range(100):
        x = step(x)
    np.testing.assert_allclose(variants.penalty(x), 0.0, atol=1e-6)


def test_penalty_leaves_out_what_the_mask_leaves_out():
    where = np.arange(12)[:, None] < 7
    np.testing.assert_allclose(variants.penalty(X.at[7:].set(jnp.nan), where=where), variants.penalty(X[:7]), rtol=1e-6)


def test_penalty_of_nothing_is_zero():
    assert variants.penalty(X, where=np.zeros((12, 1), bool)) == 0


def test_penalty_has_a_finite_gradient_at_a_constant_feature():
    assert np.all(np.isfinite(jax.grad(variants.penalty)(jnp.ones((5, 2)))))


def test_renormalized_layer_has_mean_zero_and_variance_one():
    kernel, bias = draw(6, (4, 6)), draw(7, (6,))
    kernel, bias = variants.renormalize_after_step(kernel, bias, jaxbn.moments(X @ kernel + bias[None], 0), epsilon=0.0)
    after = jaxbn.moments(X @ kernel + bias[None], 0)
    np.testing.assert_allclose(after.mean, np.zeros(6), atol=1e-5)
    np.testing.assert_allclose(after.var, np.ones(6), rtol=1e-4)


def test_renormalizing_undoes_a_change_of_scale_and_bias():
    # What the optimizer did along the directions of mean and deviation is lost, as the book says.
    kernel, bias = draw(6, (4, 6)), draw(7, (6,))
    once = variants.renormalize_after_step(kernel, bias, jaxbn.moments(X @ kernel + bias[None], 0), epsilon=0.0)
    stepped = 3 * once[0], once[1] + 7
    again = variants.renormalize_after_step(*stepped, jaxbn.moments(X @ stepped[0] + stepped[1][None], 0), epsilon=0.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), again, once)


def test_moments_of_another_layer_are_refused():
    with pytest.raises(ValueError, match=r"measured\.mean"):
        variants.renormalize_after_step(jnp.ones((4, 6)), jnp.ones(6), jaxbn.moments(X, 0))
