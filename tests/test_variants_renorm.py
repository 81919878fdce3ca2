"""Batch renormalization and ghost batch norm: algorithm 1 of either paper, and their limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from normalizers import KEY, QUICK, draw, in_training

import jaxbn
from jaxbn import variants

X = draw(0, (16, 4))
CLOSE = {"rtol": 3e-6, "atol": 3e-6}  # A few roundings of float32 of outputs of size one.


def train(norm, variables, x, **arguments):
    return jax.jit(lambda v, x: norm.apply(v, x, train=True, **arguments), compiler_options=QUICK)(variables, x)


def gradient(norm, variables, dy):
    loss = lambda x: jnp.sum(dy * norm.apply(variables, x, train=True)[0])
    return jax.jit(jax.grad(loss), compiler_options=QUICK)(X)


def algorithm_1(variables, x, r_max, d_max, epsilon=1e-3):
    """The paper's, in float64, with the running variance in place of the running standard deviation."""
    params, stats = jax.tree.map(lambda v: np.asarray(v, np.float64), (variables["params"], variables["batch_stats"]))
    x = np.asarray(x, np.float64)
    std, running_std = np.sqrt(x.var(0) + epsilon), np.sqrt(stats["var"] + epsilon)
    r = np.clip(std / running_std, 1 / r_max, r_max)
    d = np.clip((x.mean(0) - stats["mean"]) / running_std, -d_max, d_max)
    return params["scale"] * ((x - x.mean(0)) / std * r + d) + params["bias"]


@pytest.mark.parametrize(("r_max", "d_max"), [(1.2, 0.3), (3.0, 5.0), (1e3, 1e3)])
def test_training_is_algorithm_1(r_max, d_max):
    norm = variants.batch_renorm(r_max=r_max, d_max=d_max)
    variables = in_training(norm, X)
    np.testing.assert_allclose(train(norm, variables, X)[0], algorithm_1(variables, X, r_max, d_max), **CLOSE)


def test_wide_limits_train_on_what_evaluation_computes():
    norm = variants.batch_renorm(r_max=1e3, d_max=1e3)
    variables = in_training(norm, X)
    np.testing.assert_allclose(train(norm, variables, X)[0], norm.apply(variables, X, train=False)[0], **CLOSE)


def test_neutral_limits_are_batch_norm():
    norm, plain = variants.batch_renorm(r_max=1.0, d_max=0.0), jaxbn.batch_norm(epsilon=1e-3)
    variables = in_training(norm, X)
    y, batch_stats = train(norm, variables, X)
    stats = {n: variables["batch_stats"][n] for n in ("mean", "var")}
    expected, moved = train(plain, {"params": variables["params"], "batch_stats": stats}, X)
    np.testing.assert_allclose(y, expected, **CLOSE)
    for name, value in moved.items():
        np.testing.assert_allclose(batch_stats[name], value, rtol=1e-6)


def test_no_gradient_flows_through_the_correction():
    norm = variants.batch_renorm(r_max=1.2, d_max=0.3)
    variables, dy = in_training(norm, X), draw(1, X.shape)
    grad = gradient(norm, variables, dy)
    # r and d as constants: batch norm's gradient times r.
    std = np.sqrt(np.asarray(X, np.float64).var(0) + 1e-3)
    r = np.clip(std / np.sqrt(np.asarray(variables["batch_stats"]["var"]) + 1e-3), 1 / 1.2, 1.2)
    plain = {"params": variables["params"], "batch_stats": jaxbn.init_batch_stats((4,), decay=0.99)}
    plain["params"]["scale"] *= r
    expected = gradient(jaxbn.batch_norm(epsilon=1e-3), plain, dy)
    np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-5)


def test_warm_up_is_plain_batch_norm_until_its_last_step():
    norm = variants.batch_renorm(r_max=3.0, d_max=5.0, warmup_steps=2)
    variables = in_training(norm, X)
    run = jax.jit(lambda v, x: norm.apply(v, x, train=True), compiler_options=QUICK)
    for step, limits in enumerate([(1, 0), (1, 0), (3, 5)]):
        assert variables["batch_stats"]["step"] == step
        y, batch_stats = run(variables, X)
        np.testing.assert_allclose(y, algorithm_1(variables, X, *limits), **CLOSE)
        variables = variables | {"batch_stats": batch_stats}


def test_step_given_stands_in_for_the_step_counted():
    norm = variants.batch_renorm(r_max=lambda step: 1.0 + step, d_max=lambda step: 0.1 * step)
    variables = in_training(norm, X)
    np.testing.assert_allclose(train(norm, variables, X, step=7)[0], algorithm_1(variables, X, 8.0, 0.7), **CLOSE)


@pytest.mark.parametrize(("step", "r_max", "d_max"), [(0, 1, 0), (5_000, 1, 0), (15_000, 11 / 7, 2.5), (10**6, 3, 5)])
def test_limits_of_the_paper(step, r_max, d_max):
    np.testing.assert_allclose((variants.paper_r_max(step), variants.paper_d_max(step)), (r_max, d_max), rtol=1e-6)


def test_batch_that_is_not_finite_is_not_counted():
    norm = variants.batch_renorm()
    variables = in_training(norm, X)
    _, batch_stats = train(norm, variables, X.at[0, 0].set(jnp.inf))
    jax.tree.map(np.testing.assert_array_equal, batch_stats, variables["batch_stats"])


def test_correction_is_neutral_for_a_feature_that_saw_nothing():
    norm = variants.batch_renorm(r_max=3.0, d_max=5.0, use_scale=False, use_bias=False)
    variables = in_training(norm, X)
    where = np.broadcast_to(np.arange(4) > 0, X.shape)
    y, batch_stats = train(norm, variables, X, where=where)
    np.testing.assert_allclose(y[:, 0], X[:, 0] / np.sqrt(1e-3), rtol=1e-6)
    assert batch_stats["mean"][0] == variables["batch_stats"]["mean"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"r_max": 0.5}, "r_max=0.5"), ({"d_max": -1.0}, "d_max=-1.0"), ({"warmup_steps": -1}, "warmup_steps=-1")],
)
def test_limits_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        variants.batch_renorm(**options)


def test_one_value_per_feature_is_refused_in_training():
    norm = variants.batch_renorm()
    with pytest.raises(ValueError, match="one value per feature"):
        norm.apply(norm.init(KEY, X[:1]), X[:1], train=True)


def test_ghost_batches_are_normalized_one_by_one():
    norm = variants.ghost_batch_norm(4, use_scale=False, use_bias=False)
    y, _ = train(norm, norm.init(KEY, X), X)
    groups = np.asarray(X, np.float64).reshape(4, 4, 4)
    expected = (groups - groups.mean(1, keepdims=True)) / np.sqrt(groups.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, expected.reshape(X.shape), **CLOSE)


def test_ghost_batch_of_the_whole_batch_is_batch_norm():
    ghost, plain = variants.ghost_batch_norm(16), jaxbn.batch_norm()
    variables = in_training(plain, X)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), train(ghost, variables, X), train(plain, variables, X)
    )
