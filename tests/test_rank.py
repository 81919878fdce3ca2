"""The networks and the measures of the experiment `rank`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import jaxbn
from experiments import rank
from experiments.training import data, loop
from experiments.training.random_chains import BROKEN, CHAINS, PLAIN, deeper, rank_and_bound
from experiments.training.towers import BATCH, BY_BATCH, CONSTANT, NONE, STARTED, switched, task

X = np.random.default_rng(0).normal(1.0, 2.0, (16, 3)).astype(np.float32)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("kind", "norm"),
    [
        (NONE, jaxbn.identity()),
        (BY_BATCH, jaxbn.batch_norm(decay=0.9)),
        (CONSTANT, jaxbn.frozen(jaxbn.batch_norm(decay=0.9))),
    ],
)
def test_switched_is_the_norm_that_its_number_says(kind, norm, train):
    params = {"scale": jnp.array([1.0, 2.0, 3.0]), "bias": jnp.array([0.0, 1.0, -1.0])}
    moving = {"mean": jnp.array([0.1, 0.2, 0.3]), "var": jnp.array([1.0, 2.0, 0.5])}
    stats = {"kind": jnp.int32(kind), "moving": moving}
    theirs = {"params": {}, "batch_stats": {}} if kind == NONE else {"params": params, "batch_stats": moving}

    def ours(x):
        y, moved = switched(0.9).apply({"params": params, "batch_stats": stats}, x, train=train)
        return jnp.sum(y**3), (y, moved["moving"])

    def expected(x):
        y, moved = norm.apply(theirs, x, train=train)
        return jnp.sum(y**3), (y, moved or moving)

    (gradient, values), (expected_gradient, expected_values) = (jax.grad(f, has_aux=True)(X) for f in (ours, expected))
    # Sums of 16 values in float32; the gradient is of order 10.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), values, expected_values)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-4)


def test_a_network_normalized_at_the_start_only_starts_as_the_normalized_one():
    digits = data.load("mnist5k")
    images = data.pixels(jnp.asarray(digits.train_images[data.spread(512, len(digits.train_images))]))
    run = {"seed": 3, "depth": 4, "rate": 0.0}
    normalized, started = (
        loop.init_run(task("mnist5k", 8, arm), jnp.asarray(digits.test_images[:2]), run)["variables"]
        for arm in (BATCH, STARTED)
    )
    apply = task("mnist5k", 8, BATCH).apply
    # The statistics of 4 layers in float32.
    np.testing.assert_allclose(
        apply(started, images, train=True)[0], apply(normalized, images, train=True)[0], rtol=1e-3, atol=1e-3
    )


def test_a_layer_of_a_plain_chain_is_a_product_of_unit_size():
    with jax.enable_x64(True):
        keys = jax.vmap(jax.random.key)(jnp.arange(2))
        h = jnp.asarray(np.stack([X[:3, :], X[3:6, :]]), jnp.float64)
        once = deeper(CHAINS.index(PLAIN), 0, keys, h, 0, 1)
        twice = deeper(CHAINS.index(PLAIN), 0, keys, h, 0, 2)
        np.testing.assert_allclose(jnp.mean(once**2, (1, 2)), 1, rtol=1e-12)
        np.testing.assert_allclose(deeper(CHAINS.index(PLAIN), 0, keys, once, 1, 2), twice, rtol=1e-12)


@pytest.mark.parametrize("arm", [BATCH, BROKEN])
def test_a_layer_of_a_normalized_chain_has_mean_0_and_variance_1(arm):
    with jax.enable_x64(True):
        keys = jax.vmap(jax.random.key)(jnp.arange(1))
        h = deeper(CHAINS.index(arm), 0, keys, jnp.asarray(X[None, :, :], jnp.float64), 0, 1)
        np.testing.assert_allclose(h.mean(1), 0, atol=1e-12)
        np.testing.assert_allclose(h.var(1), 1, rtol=1e-12)


def test_a_chain_whose_units_have_all_died_stays_at_zero():
    with jax.enable_x64(True):
        keys = jax.vmap(jax.random.key)(jnp.arange(1))
        h = deeper(CHAINS.index(PLAIN), 1, keys, jnp.zeros((1, 4, 4)), 0, 2)
    np.testing.assert_array_equal(h, np.zeros((1, 4, 4)))


def test_rank_and_bound_of_known_singular_values():
    matrices = np.stack([np.diag([3.0, 1.0, 1e-4, 1e-6]), np.zeros((4, 4))])
    ranks, bounds = rank_and_bound(matrices)
    np.testing.assert_array_equal(ranks, [3, 0])
    np.testing.assert_allclose(bounds, [100 / 82, 0], rtol=1e-6)


def test_exponent_of_square_roots_is_a_half():
    widths = np.array([4, 16, 64])
    values = np.full((3, 2, 3, 2, 1), np.nan)  # chain, activation, width, layers, seed
    values[:, 0] = np.sqrt(widths)[None, :, None, None]
    values[:, 1, :, :1] = 1  # ReLU stops earlier
    axes = ("chain", "activation", "width", "layers", "seed")
    names = {"chain": list(CHAINS), "activation": ["linear", "ReLU"], "width": widths, "layers": [1, 10]}
    results = xr.Dataset({"chain_rank": (axes, values)}, names)
    np.testing.assert_allclose(rank.exponent(results), 0.5)
    assert rank.last_layer(results.chain_rank).notnull().all()


def test_forecast_is_the_correlation_of_orders():
    accuracy = np.array([[[0.1], [0.2]], [[0.3], [0.9]]])  # arm, depth, seed
    axes, names = ("arm", "depth", "seed"), {"arm": ["a", "b"], "depth": [2.0, 8.0], "seed": [0]}
    results = xr.Dataset({"test_accuracy": ((*axes, "step"), accuracy[..., None])}, {**names, "step": [1]})
    rising = xr.DataArray(accuracy**5, names, axes)
    np.testing.assert_allclose(rank.forecast(results, rising), 1)
    np.testing.assert_allclose(rank.forecast(results, -rising), -1)
