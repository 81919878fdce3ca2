"""The pooled normalizer against the library's own normalizers: output, gradient and running statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from experiments.training import pooled_norm

DECAY = 0.9
BATCH = 8
RUNNING = {"decay": DECAY, "epsilon": pooled_norm.EPSILON}
CASES = {
    "batch norm": (pooled_norm.kind(BATCH), jaxbn.batch_norm(**RUNNING)),
    "ghost batch norm": (pooled_norm.kind(2), jaxbn.batch_norm(group_size=2, **RUNNING)),
    "renorm": (
        pooled_norm.kind(BATCH, r_max=1.1, d_max=0.2),
        jaxbn.batch_renorm(r_max=1.1, d_max=0.2, **RUNNING),
    ),
    "group norm": (
        pooled_norm.kind(by_channels=True),
        jaxbn.group_norm(pooled_norm.CHANNEL_GROUPS, epsilon=pooled_norm.EPSILON),
    ),
    "instance norm": (pooled_norm.kind(1), jaxbn.instance_norm(epsilon=pooled_norm.EPSILON)),
}


def make(numbers, x):
    """The normalizer, and its variables with random scale, bias and running statistics."""
    norm = pooled_norm.pooled({**numbers, "decay": DECAY, "warmup": 0})
    rng = np.random.default_rng(0)
    variables = norm.init(jax.random.key(0), x)
    params = {name: jnp.asarray(rng.uniform(0.5, 2, x.shape[-1:]), jnp.float32) for name in ("scale", "bias")}
    moments = {name: jnp.asarray(rng.uniform(0.5, 2, x.shape[-1:]), jnp.float32) for name in ("mean", "var")}
    return norm, {"params": params, "batch_stats": {**variables["batch_stats"], **moments}}


def theirs(norm, variables, x):
    """The same variables as the library's normalizer wants them."""
    kept = norm.init(jax.random.key(0), x)["batch_stats"]
    stats = {name: variables["batch_stats"][name].astype(leaf.dtype) for name, leaf in kept.items()}
    return {"params": variables["params"], "batch_stats": stats}


@pytest.fixture
def x():
    """Eight examples of 3 x 3 positions and 8 channels, off zero."""
    return jnp.asarray(np.random.default_rng(1).normal(1, 2, (BATCH, 3, 3, 8)), jnp.float32)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_librarys_normalizer_in_training(name, x):
    numbers, norm = CASES[name]
    ours, variables = make(numbers, x)
    direction = jnp.asarray(np.random.default_rng(2).normal(size=x.shape), jnp.float32)

    def value(apply, variables, x):
        y, stats = apply(variables, x, train=True)
        return jnp.vdot(y, direction), (y, stats)

    found = jax.grad(lambda x: value(ours.apply, variables, x), has_aux=True)(x)
    wanted = jax.grad(lambda x: value(norm.apply, theirs(norm, variables, x), x), has_aux=True)(x)
    stats = {key: found[1][1][key] for key in wanted[1][1]}  # of what ours keeps, what theirs does
    # A few roundings of float32 in another order.
    for a, b in ((found[0], wanted[0]), (found[1][0], wanted[1][0])):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    for key, kept in wanted[1][1].items():
        np.testing.assert_allclose(stats[key], kept, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["batch norm", "renorm", "group norm"])
def test_equals_the_librarys_normalizer_at_test_time(name, x):
    numbers, norm = CASES[name]
    ours, variables = make(numbers, x)
    found, _ = ours.apply(variables, x, train=False)
    wanted, _ = norm.apply(theirs(norm, variables, x), x, train=False)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_without_normalization_a_bias_is_added(x):
    ours, variables = make(pooled_norm.kind(normalize=False), x)
    for train in (True, False):
        y, _ = ours.apply(variables, x, train=train)
        np.testing.assert_allclose(y, x + variables["params"]["bias"].reshape(1, 1, 1, -1), rtol=1e-6)


def test_renorm_is_batch_norm_until_it_is_warm(x):
    numbers = pooled_norm.kind(BATCH, r_max=1.1, d_max=0.2)
    ours, variables = make(numbers, x)
    stats = {**variables["batch_stats"], "warmup": jnp.asarray(5.0)}
    cold, _ = ours.apply({**variables, "batch_stats": stats}, x, train=True)
    plain, _ = make(pooled_norm.kind(BATCH), x)[0].apply(make(pooled_norm.kind(BATCH), x)[1], x, train=True)
    np.testing.assert_array_equal(cold, plain)
