"""Normalizers are known by their hyperparameters: equal ones are equal, hash alike, print and pickle."""

import copy
import functools
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from normalizers import CASES, draw

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn import variants

BUILDS = {name: functools.partial(case.build, "shards") for name, case in CASES.items()} | {
    "recordable": lambda: jaxbn.recordable(jaxbn.batch_norm(decay=0.9)),
    "noisy around another": lambda: jaxbn.noisy(jaxbn.frozen(jaxbn.batch_norm()), activation=jax.nn.relu),
    "batch_norm_lstm": lambda: jaxbn.batch_norm_lstm(3, 5, axis_name="shards"),
}
# `jax.nn.initializers.normal()` makes a new function at each call.
OTHER_EACH_TIME = {"conditional_batch_norm, vectors"}
every = pytest.mark.parametrize("name", [name for name in BUILDS if name not in OTHER_EACH_TIME])


@every
def test_equal_hyperparameters_make_equal_normalizers(name):
    a, b = BUILDS[name](), BUILDS[name]()
    assert a == b
    assert (a != b) is False
    assert hash(a) == hash(b)
    assert repr(a) == repr(b)


@every
def test_normalizers_come_back_from_a_pickle_and_a_copy(name):
    norm = BUILDS[name]()
    for again in (pickle.loads(pickle.dumps(norm)), copy.copy(norm), copy.deepcopy(norm)):
        assert again == norm
        assert type(again) is type(norm)


def test_normalizers_of_other_hyperparameters_or_kinds_differ():
    norms = [build() for name, build in BUILDS.items() if name != "stochastic_batch_norm, drawn"]  # Listed twice.
    assert len(set(norms)) == len(norms)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (jaxbn.batch_norm(decay=0.99), jaxbn.batch_norm()),
        (jaxbn.batch_norm(feature_axis=[1, 2]), jaxbn.batch_norm(feature_axis=(1, 2))),
        (
            jaxbn.batch_norm(axis_name="a", axis_index_groups=[[0, 1], [2, 3]]),
            jaxbn.batch_norm(axis_name="a", axis_index_groups=np.arange(4).reshape(2, 2)),
        ),
        (jaxbn.batch_norm(dtype="bfloat16"), jaxbn.batch_norm(dtype=jnp.bfloat16)),
        (jaxbn.ghost_batch_norm(128), jaxbn.ghost_batch_norm(group_size=128, epsilon=1e-5)),
        (jaxbn.batch_norm_lstm(3, 5, decay=0.99), jaxbn.batch_norm_lstm(3, max_length=5)),
        (
            jaxbn.batch_norm(activation=functools.partial(jax.nn.leaky_relu, negative_slope=0.2)),
            jaxbn.batch_norm(activation=functools.partial(jax.nn.leaky_relu, negative_slope=0.2)),
        ),
    ],
    ids=lambda norm: str(norm),
)
def test_hyperparameters_given_in_other_ways_are_equal(one, other):
    assert one == other
    assert hash(one) == hash(other)


@pytest.mark.parametrize(
    ("norm", "printed"),
    [
        (jaxbn.batch_norm(), "batch_norm()"),
        (jaxbn.batch_norm(decay=0.99, epsilon=1e-5), "batch_norm(decay=0.99, epsilon=1e-05)"),
        (
            jaxbn.batch_norm(activation=jax.nn.relu, dtype=jnp.bfloat16, axis_name=["a", "b"]),
            "batch_norm(axis_name=('a', 'b'), dtype=bfloat16, activation=relu)",
        ),
        (jaxbn.ghost_batch_norm(32, decay=0.9), "ghost_batch_norm(group_size=32, decay=0.9)"),
        (jaxbn.frozen(jaxbn.batch_norm(decay=0.9)), "frozen(norm=batch_norm(decay=0.9))"),
        (jaxbn.batch_norm_lstm(3, 5), "batch_norm_lstm(features=3, max_length=5)"),
    ],
)
def test_normalizers_print_as_they_were_made(norm, printed):
    assert repr(norm) == str(norm) == printed


def test_an_argument_that_does_not_hash_is_named():
    norm = jaxbn.frozen(jaxbn.batch_norm(decay=jnp.asarray(0.9)))
    with pytest.raises(TypeError, match=r"because of its argument norm: batch_norm.*because of its argument decay"):
        hash(norm)


def test_an_argument_that_does_not_pickle_is_named():
    norm = jaxbn.frozen(jaxbn.batch_norm(activation=lambda y: y))
    with pytest.raises(pickle.PicklingError, match=r"argument norm: batch_norm.*because of its argument activation"):
        pickle.dumps(norm)


def test_functions_that_do_not_pickle_themselves_are_found_by_their_names():
    norm = jaxbn.batch_norm(activation=jax.nn.relu)
    with pytest.raises(pickle.PicklingError):
        pickle.dumps(jax.nn.relu)
    assert pickle.loads(pickle.dumps(norm)) == norm


def test_a_normalizer_is_a_pair_of_functions_and_static_in_a_tree():
    norm = jaxbn.batch_norm(decay=0.9)
    init, apply = norm
    assert (init, apply) == (norm.init, norm.apply)
    assert jax.tree.leaves(norm) == []
    assert jax.tree.map(lambda v: v, {"norm": norm}) == {"norm": norm}
    assert norm._replace(init=None) != norm


def test_normalizers_made_by_hand_are_what_their_functions_are():
    norm = jaxbn.batch_norm()
    by_hand = jaxbn.Normalizer(*norm)
    assert by_hand == jaxbn.Normalizer(*norm)
    assert hash(by_hand) == hash(jaxbn.Normalizer(*norm))
    assert by_hand != norm


@pytest.mark.parametrize("static", [True, False])
def test_equal_normalizers_compile_once(static):
    traces = []

    @functools.partial(jax.jit, static_argnums=(0,) if static else ())
    def mean(norm, x):
        traces.append(norm)
        return norm.apply(norm.init(jax.random.key(0), x), x, train=True)[0]

    for _ in range(4):
        mean(jaxbn.batch_norm(decay=0.9), draw())
    assert len(traces) == 1


def test_equal_nnx_models_compile_once():
    traces = []

    @nnx.jit
    def train(model, x):
        traces.append(model)
        return model(x)

    for _ in range(4):
        train(jaxbn.nnx.Norm(variants.batch_renorm(decay=0.9), 4, rngs=nnx.Rngs(0)), draw())
    assert len(traces) == 1


def test_equal_linen_models_compile_once():
    traces = []

    class Model(nn.Module):
        norm: jaxbn.Normalizer

        @nn.compact
        def __call__(self, x):
            traces.append(self)
            return jaxbn.linen.Norm(self.norm, use_running_average=True)(x)

    run = jax.jit(lambda model, x: model.init(jax.random.key(0), x), static_argnums=0)
    for _ in range(4):
        run(Model(jaxbn.noisy(jaxbn.batch_norm())), draw())
    assert len(traces) == 1


def test_a_normalizer_of_ones_own_is_known_by_its_arguments():
    assert mine(0.5) == mine(half=0.5) == mine()
    assert mine(0.1) != mine()
    assert repr(mine(0.1)) == "mine(half=0.1)"
    assert pickle.loads(pickle.dumps(mine(0.1))) == mine(0.1)


@jaxbn.normalizer_factory
def mine(half=0.5):
    def apply(variables, x, *, train, where=None, weights=None, rng=None):
        return half * x, variables["batch_stats"]

    return jaxbn.Normalizer(lambda key, x: {"params": {}, "batch_stats": {}}, apply)
