"""Batch whitening: the covariance that comes out, the papers' formulas in float64, derivatives at equal eigenvalues."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from normalizers import KEY, QUICK, draw, in_training

import jaxbn
from jaxbn import variants


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def _mixed():
    rng = np.random.default_rng(0)
    return rng.normal(size=(64, 6)) @ rng.normal(size=(6, 6)) + 5


X = jnp.asarray(_mixed(), jnp.float32)
newton = variants.newton_inverse_square_root


def train(norm, variables, x, **arguments):
    return jax.jit(lambda v, x: norm.apply(v, x, train=True, **arguments), compiler_options=QUICK)(variables, x)


def zca(x, epsilon=1e-5):
    x = np.asarray(x, np.float64)
    c = x - x.mean(0)
    values, vectors = np.linalg.eigh(c.T @ c / len(x) + epsilon * np.eye(x.shape[1]))
    return c @ (vectors / np.sqrt(values)) @ vectors.T


def test_training_is_zca_in_float64():
    norm = variants.whitening_norm()
    variables = in_training(norm, X)
    scale, bias = (np.asarray(variables["params"][name], np.float64) for name in ("scale", "bias"))
    # The covariance's condition number, some 1e3, multiplies the rounding of float32.
    np.testing.assert_allclose(train(norm, variables, X)[0], scale * zca(X) + bias, rtol=1e-4, atol=1e-4)


def test_output_has_the_identity_for_covariance():
    y, _ = train(variants.whitening_norm(), variants.whitening_norm().init(KEY, X), X)
    np.testing.assert_allclose(np.cov(np.asarray(y, np.float64), rowvar=False, bias=True), np.eye(6), atol=1e-3)


def test_groups_are_whitened_one_by_one():
    norm = variants.whitening_norm(group_size=2)
    y, _ = train(norm, norm.init(KEY, X), X)
    expected = np.concatenate([zca(X[:, i : i + 2]) for i in (0, 2, 4)], axis=1)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_groups_of_one_are_batch_norm():
    norm = variants.whitening_norm(group_size=1)
    variables = norm.init(KEY, X)
    expected, _ = train(jaxbn.batch_norm(), jaxbn.batch_norm().init(KEY, X), X)
    np.testing.assert_allclose(train(norm, variables, X)[0], expected, rtol=1e-5, atol=1e-5)


def test_far_mean_costs_no_digits():
    far = jnp.asarray(np.round(np.asarray(X) * 64) / 64, jnp.float32)  # Exact after the shift too.
    norm = variants.whitening_norm()
    near_y, far_y = (train(norm, norm.init(KEY, X), x)[0] for x in (far, far + 4096))
    np.testing.assert_allclose(far_y, near_y, rtol=1e-4, atol=1e-4)


def test_running_matrix_is_the_average_of_the_batches_matrices():
    norm = variants.whitening_norm(decay=0.75)
    variables = norm.init(KEY, X)
    _, stats = train(norm, variables, X)
    values, vectors = np.linalg.eigh(np.cov(np.asarray(X, np.float64), rowvar=False, bias=True) + 1e-5 * np.eye(6))
    expected = 0.75 * np.eye(6) + 0.25 * (vectors / np.sqrt(values)) @ vectors.T
    np.testing.assert_allclose(stats["whitening"][0], expected, rtol=1e-4, atol=1e-4)


def test_evaluation_is_affine_in_the_running_statistics():
    norm = variants.whitening_norm(decay=0.0)
    _, stats = train(norm, norm.init(KEY, X), X)
    y, _ = norm.apply({"params": norm.init(KEY, X)["params"], "batch_stats": stats}, X[:3], train=False)
    np.testing.assert_allclose(y, zca(X)[:3], rtol=1e-4, atol=1e-4)


def test_newton_is_the_published_iteration():
    matrix = np.cov(np.asarray(X, np.float64), rowvar=False)
    normed, root = matrix / np.trace(matrix), np.eye(6)
    for _ in range(5):
        root = (3 * root - root @ root @ root @ normed) / 2
    expected = root / np.sqrt(np.trace(matrix))
    np.testing.assert_allclose(newton(jnp.asarray(matrix, jnp.float32)), expected, rtol=1e-4, atol=1e-5)


def test_newton_converges_to_the_inverse_root():
    matrix = jnp.asarray(np.diag([1.0, 0.5, 0.2]) + 0.1, jnp.float32)
    np.testing.assert_allclose(newton(matrix, steps=12), variants.inverse_square_root(matrix), rtol=1e-4, atol=1e-4)


def test_channels_in_the_middle_and_positions():
    x = draw(0, (4, 6, 5))
    first = variants.whitening_norm(group_size=3, feature_axis=1)
    y, _ = train(first, first.init(KEY, x), x)
    rows = jnp.moveaxis(x, 1, -1).reshape(-1, 6)
    expected = np.concatenate([zca(rows[:, i : i + 3]) for i in (0, 3)], axis=1)
    np.testing.assert_allclose(jnp.moveaxis(y, 1, -1).reshape(-1, 6), expected, rtol=1e-4, atol=1e-4)


def test_masked_rows_are_as_if_they_were_not_there():
    norm = variants.whitening_norm()
    y, stats = train(norm, norm.init(KEY, X), X.at[40:].set(jnp.nan), where=np.arange(64)[:, None] < 40)
    np.testing.assert_allclose(y[:40], zca(X[:40]), rtol=1e-4, atol=1e-4)
    assert all(np.all(np.isfinite(v)) for v in stats.values())


@pytest.mark.parametrize("spectrum", [[1.0, 1.0, 1.0], [2.0, 2.0, 1.0], [1e-3, 1.0, 1e3]])
def test_derivatives_of_the_inverse_root_against_the_closed_form(spectrum):
    # d R = -V (V^T dM V / (s_i s_j (s_i + s_j))) V^T with s the roots of the eigenvalues (Daleckii and Krein 1965).
    with jax.enable_x64(True):
        basis = np.linalg.qr(normal(2, 3, 3))[0]
        matrix = (basis * np.array(spectrum)) @ basis.T
        direction = normal(3, 3, 3)
        direction = direction + direction.T
        s = np.sqrt(np.array(spectrum))
        middle = basis.T @ direction @ basis / (np.outer(s, s) * (s[:, None] + s[None, :]))
        _, tangent = jax.jvp(variants.inverse_square_root, (jnp.asarray(matrix),), (jnp.asarray(direction),))
        np.testing.assert_allclose(tangent, -basis @ middle @ basis.T, rtol=1e-8, atol=1e-8)


def test_second_derivative_of_the_inverse_root_at_equal_eigenvalues():
    # (I + t D)^-1/2 = I - t D / 2 + 3/8 t^2 D^2: the second derivative at 0 is 3/4 D^2, where eigenvectors have none.
    with jax.enable_x64(True):
        d = jnp.asarray(normal(4, 3, 3))
        d = d + d.T
        along = lambda t: variants.inverse_square_root(jnp.eye(3) + t * d)
        second = jax.jit(jax.jacfwd(jax.jacrev(along)), compiler_options=QUICK)(0.0)
        np.testing.assert_allclose(second, 0.75 * d @ d, rtol=1e-8, atol=1e-8)


def test_gradient_is_finite_where_features_are_already_white():
    x = jnp.concatenate([jnp.eye(4), -jnp.eye(4)])
    norm = variants.whitening_norm()
    variables = norm.init(KEY, x)
    loss = lambda x: jnp.sum(norm.apply(variables, x, train=True)[0] ** 3)
    grad = jax.jit(jax.grad(loss), compiler_options=QUICK)(x)
    assert np.all(np.isfinite(grad))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: variants.whitening_norm(group_size=4).init(KEY, X), "does not divide"),
        (lambda: variants.whitening_norm(group_size=0), "group_size=0"),
        (
            lambda: variants.whitening_norm().apply(
                variants.whitening_norm().init(KEY, X), X, train=True, where=np.ones((64, 6), bool)
            ),
            "differ between features",
        ),
    ],
)
def test_refusal_says_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_complex_input_is_refused():
    norm = variants.whitening_norm()
    with pytest.raises(TypeError, match="complex64"):
        norm.apply(norm.init(KEY, X), X.astype(jnp.complex64), train=True)


def test_newton_whitens_in_the_layer():
    norm = variants.whitening_norm(inverse_root=functools.partial(newton, steps=20))
    y, _ = train(norm, norm.init(KEY, X), X)
    np.testing.assert_allclose(np.cov(np.asarray(y, np.float64), rowvar=False, bias=True), np.eye(6), atol=2e-2)


KINDS = ("as they come", "dependent", "one constant", "one nearly constant", "copies", "fewer values than features")


def features(kind):
    """[values, 8], of standard deviations near 1."""
    rng = np.random.default_rng(11)
    x = rng.normal(size=(64, 8))
    if kind == "dependent":
        x = rng.normal(size=(64, 3)) @ rng.normal(size=(3, 8)) / 2
    if kind == "one constant":
        x[:, 2] = 3.0
    if kind == "one nearly constant":
        x[:, 2] = 3.0 + 2.0**-12 * np.round(4 * x[:, 2])
    if kind == "copies":
        x = np.repeat(x[:, :4], 2, axis=1)
    return x[:5] if kind.startswith("fewer") else x


@functools.cache
def layer_gradient(root, kind, dtype):
    with jax.enable_x64(dtype == np.float64):
        x = jnp.asarray(features(kind), np.float32).astype(dtype)
        dy = jnp.asarray(np.random.default_rng(12).normal(size=x.shape), np.float32).astype(dtype)
        norm = variants.whitening_norm(inverse_root=root)
        variables = norm.init(KEY, x)
        loss = lambda x: jnp.sum(norm.apply(variables, x, train=True)[0] * dy)
        return np.asarray(jax.jit(jax.grad(loss), compiler_options=QUICK)(x), np.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("root", [variants.inverse_square_root, newton])
def test_float32_gradients_are_those_of_float64(root, kind):
    narrow, wide = (layer_gradient(root, kind, dtype) for dtype in (np.float32, np.float64))
    # Without features that hardly vary the condition number is some 1e2, and Newton's steps do not resolve more. Else
    # an eigenvalue that is 0 but for epsilon, 1e-5, bears the rounding of the largest, about 4: 5e-7 or 5% of it. In
    # such a direction x has nothing, and of the gradient it is a part.
    tolerance = 1e-5 if root is newton or kind == "as they come" else 2e-2
    assert np.linalg.norm(narrow - wide) <= tolerance * np.linalg.norm(wide)
