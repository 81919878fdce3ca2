"""What crosses devices, read from the compiled programs for eight of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from experiments.aot.collectives import Collective, collectives

FEATURES, DEVICES = 6, 8
X = np.random.default_rng(0).normal(size=(32, 3, FEATURES)).astype(np.float32)
WHERE = np.arange(32)[:, None, None] % 5 > 0
FLOAT = 4  # bytes


def mesh():
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))


def program(spread, norm, x, *, where=None, gradient=False, statistics=True):
    """The compiled text of one layer: its outputs, or the gradients of a loss that all shards share."""
    variables = norm.init(jax.random.key(0), X)

    def layer(params, x, where):
        y, batch_stats = norm.apply({**variables, "params": params}, x, train=True, where=where)
        return y, batch_stats if statistics else None

    def loss(params, x, where):
        y, batch_stats = layer(params, x, where)
        total = jnp.sum(y**3)
        return (jax.lax.psum(total, "data") if spread == "shard_map" else total), batch_stats

    f = jax.grad(loss, argnums=(0, 1), has_aux=True) if gradient else layer
    out = ((P(), P("data")), P()) if gradient else (P("data"), P())
    if spread == "shard_map":
        f = jax.jit(jax.shard_map(f, mesh=mesh(), in_specs=(P(), P("data"), P("data")), out_specs=out))
    else:
        named = partial(NamedSharding, mesh())
        parts = jax.tree.map(named, (P(), P("data"), P("data")))
        f = jax.jit(f, in_shardings=parts, out_shardings=jax.tree.map(named, out))
    return f.lower(variables["params"], x, where).compile().as_text()


def sent(*arguments, **options):
    """What is sent on the path that normally runs."""
    return [c for c in collectives(program(*arguments, **options)) if not c.in_loop]


NAMED = {"shard_map": {"axis_name": "data"}, "jit": {}}


@pytest.mark.parametrize("spread", ["jit", "shard_map"])
def test_forward_sends_two_floats_a_feature_once(spread):
    assert sent(spread, jaxbn.batch_norm(**NAMED[spread]), X) == [
        Collective("all-reduce", 2 * FEATURES * FLOAT, in_loop=False)
    ]


@pytest.mark.parametrize(("spread", "most"), [("jit", 96), ("shard_map", FEATURES)])
def test_of_few_features_and_many_positions_no_more_than_a_long_row_is_sent_a_sum(spread, most):
    """XLA:CPU sums rows that lie beside each other; under jit it sends their sums before they are added."""
    x = np.random.default_rng(0).normal(size=(32, 8, FEATURES)).astype(np.float32)
    both = sent(spread, jaxbn.batch_norm(**NAMED[spread]), x, gradient=True)
    assert [c.kind for c in both] == ["all-reduce"] * 2
    assert max(c.bytes for c in both) <= 2 * most * FLOAT


@pytest.mark.parametrize("spread", ["jit", "shard_map"])
def test_forward_with_a_mask_sends_counts_too_in_the_same_collective(spread):
    (only,) = sent(spread, jaxbn.batch_norm(**NAMED[spread]), X, where=WHERE)
    assert 2 * FEATURES * FLOAT < only.bytes <= 3 * FEATURES * FLOAT


@pytest.mark.parametrize("spread", ["jit", "shard_map"])
def test_gradients_of_input_scale_and_bias_send_two_floats_a_feature_once_more(spread):
    both = sent(spread, jaxbn.batch_norm(**NAMED[spread]), X, gradient=True)
    assert [c.bytes for c in both] == [2 * FEATURES * FLOAT] * 2


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ghost_groups_within_a_device_are_normalized_without_sending(size):
    assert collectives(program("jit", jaxbn.batch_norm(group_size=size), X, statistics=False)) == []


def test_gradients_of_ghost_groups_send_those_of_the_parameters_only():
    (only,) = sent("jit", jaxbn.batch_norm(group_size=4), X, gradient=True, statistics=False)
    assert only.bytes == 2 * FEATURES * FLOAT


@pytest.mark.parametrize("spread", ["jit", "shard_map"])
def test_running_statistics_of_ghost_groups_are_pooled_in_one_collective(spread):
    assert len(sent(spread, jaxbn.batch_norm(group_size=4, **NAMED[spread]), X)) == 1


def test_per_device_statistics_under_shard_map_are_normalized_without_sending():
    norm = jaxbn.batch_norm(pool_axis_name="data")
    variables = norm.init(jax.random.key(0), X)
    layer = jax.shard_map(
        lambda x: norm.apply(variables, x, train=True)[0], mesh=mesh(), in_specs=P("data"), out_specs=P("data")
    )
    assert collectives(jax.jit(layer).lower(X).compile().as_text()) == []


@pytest.mark.parametrize("choice", [{"axis_index_groups": [[0, 2, 4, 6], [1, 3, 5, 7]]}, {"group_size": 16}])
def test_two_groups_of_devices_send_once_forward_and_once_backward(choice):
    """Each sends the rows of both groups, from which the running statistics are pooled, and parameters' gradients."""
    both = sent("shard_map", jaxbn.batch_norm(axis_name="data", **choice), X, gradient=True)
    assert [c.bytes for c in both] == [2 * 2 * FEATURES * FLOAT] * 2
