"""Ghost batches drawn at random: a partition of all examples, the same on any number of devices, in the order of x."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from normalizers import KEY, QUICK, draw
from oracle import BOUND, assert_exact, reference

import jaxbn
from jaxbn._axis_group import AxisGroup
from jaxbn._shuffled import _drawn

BATCH, SIZE, FEATURES = 16, 4, 3
X = np.asarray(draw(1, (BATCH, 2, FEATURES)))
DY = np.asarray(draw(2, X.shape, offset=0.5))
WHERE = np.random.default_rng(3).uniform(size=(BATCH, 1, 1)) < 0.7
NORM = jaxbn.ghost_batch_norm(SIZE, shuffle=True, decay=0.0)
VARIABLES = NORM.init(KEY, X)
# Sums of eight terms of size 5 in another order.
ROUNDED = {"rtol": 1e-5, "atol": 1e-5}
quick = functools.partial(jax.jit, compiler_options=QUICK)
assert_close = functools.partial(jax.tree.map, functools.partial(np.testing.assert_allclose, **ROUNDED))


def groups(key):
    """The group of each example."""
    return np.asarray(_drawn(key, X.shape, (0, 1), SIZE, AxisGroup())[0])


def run(norm, x, dy, where, key):
    """y, statistics and the gradient by x."""

    def loss(x):
        y, stats = norm.apply(VARIABLES, x, train=True, where=where, rng=key)
        return jnp.sum(y * dy), (y, stats)

    gradient, (y, stats) = jax.grad(loss, has_aux=True)(x)
    return y, stats, gradient


one_device = quick(functools.partial(run, NORM))


@functools.cache
def over_eight_devices():
    norm = jaxbn.ghost_batch_norm(SIZE, shuffle=True, decay=0.0, axis_name="shards")
    mesh, part = jax.make_mesh((8,), ("shards",), axis_types=(AxisType.Auto,)), jax.P("shards")
    shard = functools.partial(run, norm, key=KEY)
    return quick(jax.shard_map(shard, mesh=mesh, in_specs=part, out_specs=(part, jax.P(), part)))


def mask(masked):
    return WHERE if masked else np.ones_like(WHERE)


def on_one_device(masked):
    return one_device(X, DY, mask(masked), KEY)


def test_groups_are_a_partition_into_equal_parts():
    for seed in range(5):
        np.testing.assert_array_equal(np.bincount(groups(jax.random.key(seed))), SIZE)


def test_each_key_draws_other_groups_and_one_key_the_same():
    drawn = {tuple(groups(jax.random.key(seed))) for seed in range(5)}
    assert len(drawn) == 5
    np.testing.assert_array_equal(groups(KEY), groups(KEY))


@pytest.mark.parametrize("masked", [False, True])
def test_each_group_is_normalized_by_itself_and_stays_in_its_place(masked):
    y, _, dx = on_one_device(masked)
    for group in range(BATCH // SIZE):
        own = groups(KEY) == group
        where = {"where": WHERE[own]} if masked else {}
        assert_exact({"y": y[own], "dx": dx[own]}, *reference(X[own], DY[own], axis=(0, 1), **where), axis=(0, 1))


@pytest.mark.parametrize("masked", [False, True])
def test_running_statistics_are_those_of_the_whole_batch(masked):
    counted = X[WHERE[:, 0, 0]] if masked else X
    stats = on_one_device(masked)[1]
    assert_exact(stats, *reference(counted, axis=(0, 1)), axis=(0, 1), bound=2 * BOUND)


@pytest.mark.parametrize("masked", [False, True])
def test_shuffled_over_eight_devices_it_is_what_one_device_gives(masked):
    assert_close(over_eight_devices()(X, DY, mask(masked)), on_one_device(masked))


def test_under_jit_with_sharded_inputs_it_is_what_one_device_gives():
    mesh = jax.make_mesh((8,), ("shards",), axis_types=(AxisType.Explicit,))
    x, dy = (jax.device_put(v, jax.NamedSharding(mesh, jax.P("shards"))) for v in (X, DY))
    with jax.set_mesh(mesh):
        found = one_device(x, dy, mask(False), KEY)
    assert_close(found, on_one_device(False))


def test_shards_with_keys_of_their_own_agree_on_the_first():
    keys, part = jax.random.split(KEY, 4), (BATCH // 4, *X.shape[1:])
    drawn = jax.vmap(lambda key: _drawn(key, part, (0, 1), SIZE, AxisGroup("shards"))[0], axis_name="shards")
    np.testing.assert_array_equal(drawn(keys).ravel(), groups(keys[0]))


def test_keys_of_the_old_kind_are_taken():
    old = jax.random.PRNGKey(0)
    np.testing.assert_array_equal(groups(old), groups(jax.random.wrap_key_data(old)))
    drawn = jax.vmap(lambda key: _drawn(key, X.shape, (0, 1), SIZE, AxisGroup("shards"))[0], axis_name="shards")
    np.testing.assert_array_equal(drawn(old[None])[0], groups(old))


def test_each_device_by_itself_pools_its_running_statistics():
    norm = jaxbn.ghost_batch_norm(2, shuffle=True, decay=0.0, pool_axis_name="shards")
    x = X.reshape(4, -1, *X.shape[1:])
    mapped = jax.vmap(lambda x: norm.apply(VARIABLES, x, train=True, rng=KEY)[1], axis_name="shards")
    stats = jax.tree.map(lambda v: v[0], quick(mapped)(x))
    assert_exact(stats, *reference(X, axis=(0, 1)), axis=(0, 1), bound=2 * BOUND)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: NORM.apply(VARIABLES, X, train=True), "pass rng="),
        (lambda: NORM.apply(VARIABLES, X[:6], train=True, rng=KEY), "does not divide the 6 examples"),
        (lambda: jaxbn.batch_norm(shuffle=True), "pass group_size too"),
        (
            lambda: jaxbn.ghost_batch_norm(1, shuffle=True).apply(VARIABLES, X[:, 0], train=True, rng=KEY),
            "one value per feature",
        ),
    ],
)
def test_what_cannot_be_shuffled_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_evaluation_needs_no_key():
    assert NORM.apply(VARIABLES, X, train=False)[0].shape == X.shape
