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
from jaxbn import _cpu, _measure

FEATURES, DEVICES = 6, 8
X = np.random.default_rng(0).normal(size=(32, 3, FEATURES)).astype(np.float32)
WHERE = np.arange(32)[:, None, None] % 5 > 0
FLOAT = 4  # bytes


def mesh():
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))


def program(spread, norm, x, *, where=None, gradient=False, statistics=True, code="default"):
    """The compiled text of one layer by the code for CPUs or the default's: outputs, or gradients of a shared loss."""
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
    with _cpu.force(code):
        return f.lower(variables["params"], x, where).compile().as_text()


def sent(*arguments, **options):
    """What is sent on the path that normally runs."""
    return [c for c in collectives(program(*arguments, **options)) if not c.in_loop]


NAMED = {"shard_map": {"axis_name": "data"}, "jit": {}}


VECTOR = FEATURES * FLOAT
ONE, TWO = (Collective("all-reduce", n * VECTOR, in_loop=False) for n in (1, 2))
# Under jit two sums, and before them a sample's mean, but on CPUs. Elsewhere each shard measures for itself, and all
# gather mean, remainder and variance of each, with a mask its count too.
GATHERED = [Collective("all-gather", DEVICES * 3 * VECTOR, in_loop=False)]
FORWARD = {
    ("jit", "cpu"): [TWO],
    ("jit", "default"): [ONE, TWO],
    ("shard_map", "cpu"): GATHERED,
    ("shard_map", "default"): GATHERED,
}
spread_and_code = pytest.mark.parametrize(("spread", "code"), FORWARD)


@spread_and_code
def test_forward_sends_vectors_only(spread, code):
    assert sent(spread, jaxbn.batch_norm(**NAMED[spread]), X, code=code) == FORWARD[spread, code]


@pytest.mark.parametrize(("spread", "most"), [("jit", 96), ("shard_map", FEATURES)])
def test_of_few_features_and_many_positions_no_more_than_a_long_row_is_sent_a_sum(spread, most):
    """XLA:CPU sums rows that lie beside each other; under jit it sends their sums before they are added."""
    x = np.random.default_rng(0).normal(size=(32, 8, FEATURES)).astype(np.float32)
    *_, last = every = sent(spread, jaxbn.batch_norm(**NAMED[spread]), x, gradient=True, code="cpu")
    assert [c.kind for c in every] == [c.kind for c in [*FORWARD[spread, "cpu"], TWO]]
    assert last.bytes <= 2 * most * FLOAT


@spread_and_code
def test_forward_with_a_mask_sends_counts_too_in_the_same_collectives(spread, code):
    """Counts come first under jit: a mean of what is masked is their quotient."""
    every = sent(spread, jaxbn.batch_norm(**NAMED[spread]), X, where=WHERE, code=code)
    assert [c.kind for c in every] == [c.kind for c in FORWARD[spread, code]]
    assert sum(c.bytes for c in every) <= sum(c.bytes for c in FORWARD[spread, code]) + VECTOR * (
        DEVICES if spread == "shard_map" else 1
    )


@spread_and_code
def test_gradients_of_input_scale_and_bias_send_two_floats_a_feature_once_more(spread, code):
    norm = jaxbn.batch_norm(**NAMED[spread])
    assert sent(spread, norm, X, gradient=True, code=code) == [*FORWARD[spread, code], TWO]


def test_beyond_a_number_of_shards_two_sums_of_vectors_take_the_place_of_gathering(monkeypatch):
    monkeypatch.setattr(_measure, "GATHERED", DEVICES - 1)
    x = X[:, :2]  # A shape of its own: traces are kept by shape.
    every = sent("shard_map", jaxbn.batch_norm(axis_name="data"), x, where=WHERE)
    assert [c.kind for c in every] == ["all-reduce"] * 2
    assert max(c.bytes for c in every) <= TWO.bytes


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ghost_groups_within_a_device_are_normalized_without_sending(size):
    assert collectives(program("jit", jaxbn.batch_norm(group_size=size), X, statistics=False)) == []


def test_gradients_of_ghost_groups_send_those_of_the_parameters_only():
    (only,) = sent("jit", jaxbn.batch_norm(group_size=4), X, gradient=True, statistics=False)
    assert only.bytes == 2 * FEATURES * FLOAT


@pytest.mark.parametrize("spread", ["jit", "shard_map"])
def test_running_statistics_of_ghost_groups_are_pooled_with_vectors_only(spread):
    every = sent(spread, jaxbn.batch_norm(group_size=4, **NAMED[spread]), X)
    assert len(every) == len(FORWARD[spread, "default"])
    assert max(c.bytes for c in every) <= DEVICES * 4 * VECTOR


def test_per_device_statistics_under_shard_map_are_normalized_without_sending():
    norm = jaxbn.batch_norm(pool_axis_name="data")
    variables = norm.init(jax.random.key(0), X)
    layer = jax.shard_map(
        lambda x: norm.apply(variables, x, train=True)[0], mesh=mesh(), in_specs=P("data"), out_specs=P("data")
    )
    assert collectives(jax.jit(layer).lower(X).compile().as_text()) == []


@pytest.mark.parametrize("choice", [{"axis_index_groups": [[0, 2, 4, 6], [1, 3, 5, 7]]}, {"group_size": 16}])
def test_two_groups_of_devices_send_once_forward_and_once_backward(choice):
    """All gather the vectors of all, from which the running statistics are pooled; then each sends two groups' sums."""
    every = sent("shard_map", jaxbn.batch_norm(axis_name="data", **choice), X, gradient=True)
    assert [(c.kind, c.bytes) for c in every] == [("all-gather", 3 * DEVICES * VECTOR), ("all-reduce", 4 * VECTOR)]
