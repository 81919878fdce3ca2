"""Derivatives of every mode and order, against autodiff of the textbook formula in float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hard_inputs import HARD_INPUTS
from jax.flatten_util import ravel_pytree
from oracle import plain

import jaxbn
from jaxbn import batch_norm

RNG = np.random.default_rng(0)
ROWS, FEATURES, EPSILON = 5, 2, 0.1
X, DY = RNG.normal(1.0, 1.0, (2, ROWS, FEATURES))
SHORTCUT = RNG.normal(size=(ROWS, FEATURES))
WEIGHTS = np.array([[0.5], [2.0], [0.0], [1.0], [1.5]])
# Both programs are float64 and sum a few dozen terms of size one to ten: some hundred roundings of 1e-16.
FLOAT64 = {"rtol": 1e-12, "atol": 1e-12}
# Two float32 programs, each within the promised 1e-6 of the values' size.
SAME = {"rtol": 2e-6, "atol": 2e-6}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def arguments(x=X):
    return {"x": x, "scale": np.array([1.5, -0.7]), "bias": np.array([0.2, 1.0])}


def ours(a, **kwargs):
    return jaxbn.batch_normalize(a["x"], a["scale"], a["bias"], axis=0, epsilon=EPSILON, **kwargs)


def textbook(a, weights=None):
    return plain(a["x"], a["scale"][None], a["bias"][None], axis=0, epsilon=EPSILON, weights=weights)


def textbook_statistics(x, weights):
    share = weights / np.sum(weights)
    mean = jnp.sum(share * x, 0)
    return mean, jnp.sum(share * (x - mean[None]) ** 2, 0)


def loss(y):
    """A function of y none of whose derivatives vanishes."""
    return jnp.sum(jnp.sin(y) * DY)


def both(case):
    """Our program and the textbook's as functions of one flat vector of x, scale and bias."""

    def mine(a):
        return loss(ours(a)[0])

    def theirs(a):
        return loss(textbook(a))

    def mine_with_everything(a):
        y, m = ours(a, weights=WEIGHTS, activation=jnp.tanh, residual=SHORTCUT)
        return loss(y) + jnp.sum(jnp.cos(m.mean) * m.var**2)

    def theirs_with_everything(a):
        mean, var = textbook_statistics(a["x"], WEIGHTS)
        return loss(jnp.tanh(textbook(a, WEIGHTS) + SHORTCUT)) + jnp.sum(jnp.cos(mean) * var**2)

    pair = (mine, theirs) if case == "plain" else (mine_with_everything, theirs_with_everything)
    flat, unravel = ravel_pytree(arguments())
    return flat, *(lambda v, f=f: f(unravel(v)) for f in pair)


MODES = {
    "reverse": jax.grad,
    "forward": jax.jacfwd,
    "forward over reverse": jax.hessian,
    "reverse over forward": lambda f: jax.jacrev(jax.jacfwd(f)),
    "reverse over reverse": lambda f: jax.jacrev(jax.jacrev(f)),
    "third, mixed": lambda f: jax.jacfwd(jax.jacrev(jax.jacrev(f))),
    "third, forward": lambda f: jax.jacfwd(jax.jacfwd(jax.jacfwd(f))),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("case", "mode"),
    [
        *(("plain", mode) for mode in ("reverse", "forward over reverse")),
        *(("weights, activation, residual, statistics", mode) for mode in MODES if mode != "third, forward"),
        pytest.param("weights, activation, residual, statistics", "third, forward", marks=pytest.mark.slow),
    ],
)
def test_derivative_equals_autodiff_of_the_textbook(case, mode):
    flat, mine, theirs = both(case)
    actual, expected = (jax.jit(MODES[mode](f))(flat) for f in (mine, theirs))
    np.testing.assert_allclose(actual, expected, **FLOAT64)


@pytest.mark.usefixtures("x64")
def test_gradient_equals_finite_differences():
    flat, mine, _ = both("everything")
    direction, h = RNG.normal(size=flat.shape), 1e-5
    f, gradient = jax.jit(mine), jax.jit(jax.grad(mine))(flat)
    # Central differences are good to h^2 times the third derivative, 1e-8 here, and to 1e-16 / h of rounding.
    difference = (f(flat + h * direction) - f(flat - h * direction)) / (2 * h)
    np.testing.assert_allclose(difference, gradient @ direction, atol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("derivative", [jax.grad, pytest.param(jax.hessian, marks=pytest.mark.slow)])
def test_complex_derivatives_equal_autodiff_of_the_textbook(derivative):
    z = X + 1j * DY
    parts = np.stack([z.real, z.imag])

    def mine(parts):
        a = arguments(jax.lax.complex(parts[0], parts[1]))
        y = ours(a)[0]
        return jnp.sum(jnp.sin(y.real) * DY + jnp.cos(y.imag))

    def theirs(parts):
        y = textbook(arguments(jax.lax.complex(parts[0], parts[1])))
        return jnp.sum(jnp.sin(y.real) * DY + jnp.cos(y.imag))

    np.testing.assert_allclose(*(jax.jit(derivative(f))(parts) for f in (mine, theirs)), **FLOAT64)


@pytest.mark.usefixtures("x64")
def test_linearize_equals_jvp_and_its_transpose_the_gradient():
    flat, mine, _ = both("everything")
    tangent = RNG.normal(size=flat.shape)
    _, linear = jax.linearize(jax.jit(mine), flat)
    _, pushed = jax.jvp(jax.jit(mine), (flat,), (tangent,))
    np.testing.assert_allclose(linear(tangent), pushed, **FLOAT64)
    (pulled,) = jax.linear_transpose(linear, flat)(1.0)
    np.testing.assert_allclose(pulled, jax.jit(jax.grad(mine))(flat), **FLOAT64)


@pytest.mark.usefixtures("x64")
def test_vmap_of_the_gradient_equals_a_loop():
    flat, mine, _ = both("plain")
    rows = flat[None] + 0.1 * RNG.normal(size=(3, *flat.shape))
    gradient = jax.jit(jax.grad(mine))
    batched = jax.jit(jax.vmap(jax.grad(mine)))(rows)
    np.testing.assert_allclose(batched, [gradient(row) for row in rows], **FLOAT64)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mode", ["reverse", "forward over reverse"])
def test_given_statistics_are_differentiated_as_the_formula_says(mode):
    a = {**arguments(), "mean": np.array([0.3, -1.0]), "var": np.array([0.5, 2.0])}
    flat, unravel = ravel_pytree(a)

    def mine(v):
        a = unravel(v)
        return loss(jaxbn.normalize(**a, axis=0, epsilon=EPSILON, activation=jnp.tanh, residual=SHORTCUT))

    def theirs(v):
        a = {name: value if name == "x" else value[None] for name, value in unravel(v).items()}
        xhat = (a["x"] - a["mean"]) / jnp.sqrt(a["var"] + EPSILON)
        return loss(jnp.tanh(a["scale"] * xhat + a["bias"] + SHORTCUT))

    np.testing.assert_allclose(*(jax.jit(MODES[mode](f))(flat) for f in (mine, theirs)), **FLOAT64)


@pytest.mark.parametrize("name", ["mean 0 std", "mean 1e+06 std", "magnitude 1e18", "outlier in the last row"])
def test_input_gradient_is_orthogonal_to_ones_and_to_the_normalized_input(name):
    x = HARD_INPUTS[name]
    dy = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)  # Not what x was drawn from.

    @jax.jit
    def gradient(x):
        return jax.vjp(lambda x: jaxbn.batch_normalize(x, axis=0, epsilon=1e-12)[0], x)[1](dy)[0]

    dx, wide = np.asarray(gradient(x), np.float64), x.astype(np.float64)
    xhat = (wide - wide.mean(0)) / wide.std(0)
    for direction in (np.ones_like(xhat), xhat):
        cosine = np.sum(dx * direction, 0) / np.linalg.norm(dx, axis=0) / np.linalg.norm(direction, axis=0)
        # An error of 1e-6 of the gradient's norm turns it by as much.
        np.testing.assert_allclose(cosine, 0, atol=1e-6)


ACTIVATIONS = {
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "custom": lambda y: y * jnp.cos(y),
}


@pytest.mark.parametrize(("name", "residual"), [*((name, True) for name in ACTIVATIONS), ("relu", False)])
def test_fused_activation_equals_one_applied_afterwards(name, residual):
    x, dy, shortcut = (RNG.normal(1.0, 1.0, (3, 32, 4))).astype(np.float32)
    scale, bias = np.full(4, 1.5, np.float32), np.full(4, 0.3, np.float32)
    activation = ACTIVATIONS[name]

    def fused(x, scale, bias, shortcut):
        extra = {"residual": shortcut} if residual else {}
        return jaxbn.batch_normalize(x, scale, bias, axis=0, epsilon=1e-5, activation=activation, **extra)[0]

    def unfused(x, scale, bias, shortcut):
        y, _ = jaxbn.batch_normalize(x, scale, bias, axis=0, epsilon=1e-5)
        return activation(y + shortcut if residual else y)

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradients(f, *primals):
        y, vjp = jax.vjp(f, *primals)
        return y, vjp(dy)

    actual, expected = (value_and_gradients(f, x, scale, bias, shortcut) for f in (fused, unfused))
    # The gradients of scale and bias sum 32 terms of size one: the same bound, of that size.
    chex.assert_trees_all_close(actual, expected, rtol=2e-6, atol=2e-6 * 4)


def kept_for_the_backward_pass(f, *primals):
    """The arrays that an un-jitted vjp records."""
    return [leaf for leaf in jax.tree.leaves(jax.vjp(f, *primals)[1]) if hasattr(leaf, "shape")]


@pytest.mark.parametrize(
    ("activation", "dtype"), [(None, jnp.float32), (jax.nn.silu, jnp.float32), (jax.nn.relu, jnp.bfloat16)]
)
def test_backward_pass_keeps_the_input_and_a_few_vectors(activation, dtype):
    x, ones = jnp.asarray(RNG.normal(size=(64, 3, 3, 4)), dtype), jnp.ones(4)

    def forward(x, scale, bias):
        return jaxbn.batch_normalize(x, scale, bias, axis=(0, 1, 2), epsilon=1e-5, activation=activation)[0]

    kept = kept_for_the_backward_pass(forward, x, ones, ones)
    large = [leaf for leaf in kept if leaf.size > 4]
    assert [(leaf.shape, leaf.dtype) for leaf in large] == [(x.shape, x.dtype)]
    # Mean, its remainder, variance, scale and bias, each perhaps twice; and scalars.
    assert len(kept) <= 12


@pytest.mark.parametrize("mode", [True, False])
def test_normalizer_keeps_the_input_and_the_residual_and_no_more(mode):
    x = jnp.asarray(RNG.normal(size=(64, 4)), jnp.float32)
    norm = batch_norm(activation=jax.nn.gelu)
    variables = norm.init(jax.random.key(0), x)

    def forward(params, x, residual):
        return norm.apply({**variables, "params": params}, x, train=mode, residual=residual)[0]

    kept = kept_for_the_backward_pass(forward, variables["params"], x, x + 1)
    assert len([leaf for leaf in kept if leaf.size > 4]) == 2


@pytest.mark.parametrize(("rule", "mode"), [({}, True), ({}, False), ({"debias": True}, False)], ids=str)
def test_no_gradient_flows_through_running_statistics(rule, mode):
    x, norm = RNG.normal(size=(8, 3)).astype(np.float32), batch_norm(**rule)
    variables = norm.init(jax.random.key(0), x)

    @jax.jit
    @jax.grad
    def of_what_comes_out(x):
        return sum(jnp.sum(v) for v in norm.apply(variables, x, train=mode)[1].values())

    @jax.jit
    @jax.grad
    def of_what_goes_in(stats):
        return jnp.sum(jnp.sin(norm.apply({**variables, "batch_stats": stats}, x, train=mode)[0]))

    for leaf in jax.tree.leaves((of_what_comes_out(x), of_what_goes_in(variables["batch_stats"]))):
        np.testing.assert_array_equal(leaf, 0)


def test_evaluation_is_affine_in_its_input():
    x, dy = RNG.normal(size=(2, 8, 3)).astype(np.float32)
    norm = batch_norm(epsilon=0.5)
    variables = norm.init(jax.random.key(0), x)
    dx = jax.jit(lambda x: jax.vjp(lambda x: norm.apply(variables, x, train=False)[0], x)[1](dy)[0])(x)
    np.testing.assert_allclose(dx, dy / np.sqrt(1.5), **SAME)  # var 1, epsilon 0.5, scale 1.


def test_gradients_have_the_dtype_of_what_they_are_for():
    x, norm = jnp.asarray(RNG.normal(size=(8, 3)), jnp.bfloat16), batch_norm()
    variables = norm.init(jax.random.key(0), x)

    def total(params, x):
        return jnp.sum(norm.apply({**variables, "params": params}, x, train=True)[0].astype(jnp.float32))

    params, dx = jax.eval_shape(jax.grad(total, argnums=(0, 1)), variables["params"], x)
    assert dx.dtype == jnp.bfloat16
    chex.assert_type([jnp.zeros(v.shape, v.dtype) for v in params.values()], jnp.float32)


def test_gradient_ignores_a_large_input_scale_but_for_its_inverse():
    # y does not change with the size of x, so that the gradient goes as one over it: exact for a power of two.
    x, dy = RNG.normal(size=(2, 16, 3)).astype(np.float32)

    @jax.jit
    def gradient(x):
        return jax.vjp(lambda x: jaxbn.batch_normalize(x, axis=0, epsilon=0.0)[0], x)[1](dy)[0]

    np.testing.assert_allclose(1024 * gradient(1024 * x), gradient(x), **SAME)
