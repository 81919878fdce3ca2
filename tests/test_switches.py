"""Which statistics normalize is chosen apart from whether they move; over every normalizer: `test_contract.py`."""

import functools
import itertools
import pickle

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from normalizers import KEY, QUICK, draw

import jaxbn

X = draw(0, (8, 4))
FOUR = list(itertools.product((False, True), (False, True)))
ROUNDED = {"rtol": 1e-5, "atol": 1e-5}
NORM = jaxbn.batch_norm()
VARIABLES = {"params": NORM.init(KEY, X)["params"], "batch_stats": {"mean": jnp.full(4, 2.0), "var": jnp.full(4, 3.0)}}
quick = functools.partial(jax.jit, compiler_options=QUICK)
assert_close = functools.partial(jax.tree.map, functools.partial(np.testing.assert_allclose, **ROUNDED))


def applied(params, x, train, **switches):
    return NORM.apply({**VARIABLES, "params": params}, x, train=train, **switches)


@functools.cache
def gradients():
    """Of the sum of sin(y) by params and x: in both modes, and for all four choices, whatever `train` is."""

    def gradient(**call):
        loss = lambda params, x: jnp.sum(jnp.sin(applied(params, x, **call)[0]))
        return jax.grad(loss, (0, 1))(VARIABLES["params"], X)

    @quick
    def program():
        modes = {train: gradient(train=train) for train in (False, True)}
        four = {
            (a, b, train): gradient(train=train, use_running=a, update=b) for a, b in FOUR for train in (False, True)
        }
        return modes, four

    return program()


@pytest.mark.parametrize(("use_running", "update"), FOUR)
@pytest.mark.parametrize("train", [False, True])
def test_gradients_are_those_of_what_normalizes(use_running, update, train):
    modes, four = gradients()
    assert_close(four[use_running, update, train], modes[not use_running])


@pytest.mark.parametrize("train", [False, True])
def test_a_switch_left_out_follows_train(train):
    y, stats = applied(VARIABLES["params"], X, train, update=not train)
    assert_close(y, applied(VARIABLES["params"], X, train)[0])
    assert_close(stats, applied(VARIABLES["params"], X, not train)[1])
    y, stats = applied(VARIABLES["params"], X, train, use_running=train)
    assert_close(y, applied(VARIABLES["params"], X, not train)[0])
    assert_close(stats, applied(VARIABLES["params"], X, train)[1])


def test_statistics_that_normalize_and_move_are_constants():
    loss = lambda x: sum(jnp.sum(v) for v in applied(VARIABLES["params"], x, True, use_running=True)[1].values())
    np.testing.assert_array_equal(jax.grad(loss)(X), 0)


def test_shards_that_normalize_by_running_statistics_move_them_by_all_values():
    norm = jaxbn.batch_norm(axis_name="shards")
    mesh = jax.make_mesh((8,), ("shards",), axis_types=(jax.sharding.AxisType.Auto,))

    def shard(x):
        return norm.apply(VARIABLES, x, train=True, use_running=True)

    mapped = jax.shard_map(shard, mesh=mesh, in_specs=jax.P("shards"), out_specs=(jax.P("shards"), jax.P()))
    y, stats = jax.jit(mapped)(X)
    assert_close(y, applied(VARIABLES["params"], X, False)[0])
    assert_close(stats, applied(VARIABLES["params"], X, True)[1])


def test_one_value_a_feature_normalizes_by_running_statistics_but_does_not_move_them():
    one = X[:1]
    assert_close(applied(VARIABLES["params"], one, True, use_running=True, update=False)[0], (one - 2) / np.sqrt(3))
    with pytest.raises(ValueError, match="one value per feature"):
        applied(VARIABLES["params"], one, True, use_running=True)


@pytest.mark.parametrize("kind", [jaxbn.linen.BatchNorm, functools.partial(jaxbn.linen.Norm, NORM)])
def test_a_linen_layer_whose_statistics_stay_needs_no_mutable_collection(kind):
    y = kind().apply(VARIABLES, X, use_running_average=False, update=False)
    assert_close(y, applied(VARIABLES["params"], X, True)[0])


@pytest.mark.parametrize("kind", [jaxbn.linen.BatchNorm, functools.partial(jaxbn.linen.Norm, NORM)])
def test_a_linen_layer_whose_statistics_move_needs_one(kind):
    with pytest.raises(flax.errors.ModifyScopeVariableError):
        kind().apply(VARIABLES, X, use_running_average=True, update=True)


@pytest.mark.parametrize(("use_running", "update"), FOUR)
def test_flax_layers_take_the_switch(use_running, update):
    expected = applied(VARIABLES["params"], X, update, use_running=use_running, update=update)
    call = dict(use_running_average=use_running, update=update)
    y, moved = jaxbn.linen.BatchNorm().apply(VARIABLES, X, mutable=["batch_stats"], **call)
    assert_close((y, moved["batch_stats"]), expected)
    layer = jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    layer.mean[...], layer.var[...] = VARIABLES["batch_stats"]["mean"], VARIABLES["batch_stats"]["var"]
    y = layer(X, **call)
    assert_close((y, {"mean": layer.mean[...], "var": layer.var[...]}), expected)


def test_initializing_moves_nothing():
    module = jaxbn.linen.Norm(NORM)
    made = module.init(KEY, X, use_running_average=True, update=True)["batch_stats"]
    assert_close(made, NORM.init(KEY, X)["batch_stats"])


def by_hand(variables, x, *, train):
    return x + train, {"seen": variables["batch_stats"]["seen"] + train}


def with_switches(variables, x, *, train, use_running=None, update=None):
    return x, {"switches": (train, use_running, update)}


@pytest.mark.parametrize("norm", [jaxbn.Normalizer(NORM.init, by_hand), NORM._replace(apply=by_hand)])
def test_a_normalizer_made_by_hand_has_both_switches(norm):
    variables = {"params": {}, "batch_stats": {"seen": 5}}
    for use_running, update in FOUR:
        y, stats = norm.apply(variables, X, train=False, use_running=use_running, update=update)
        np.testing.assert_array_equal(y, X + (not use_running))
        assert stats == {"seen": 5 + update}


def start(key, x):
    return {"params": {}, "batch_stats": {"seen": 0}}


def test_normalizers_made_by_hand_of_the_same_functions_are_equal_and_pickle():
    one, other = jaxbn.Normalizer(start, by_hand), jaxbn.Normalizer(start, by_hand)
    assert one == other == pickle.loads(pickle.dumps(one))
    assert hash(one) == hash(other)
    assert one != jaxbn.Normalizer(start, with_switches)


def test_a_normalizer_that_takes_the_switches_itself_is_left_alone():
    norm = jaxbn.Normalizer(lambda key, x: {}, with_switches)
    assert norm.apply is with_switches
    assert norm.apply({}, X, train=True, update=False)[1] == {"switches": (True, None, False)}
