"""Population statistics of networks that are built from the modules, with batch norms that need no wrapping."""

from functools import partial

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn._population import population_statistics

ROUNDING = 1e-6  # Eight units in the last place of float32: a few roundings within each batch.
X = (3 + 2 * np.random.default_rng(0).normal(size=(64, 3))).astype(np.float32)
BATCHES = np.split(X, 2)


def assert_population_of(x, stats):
    wide = np.asarray(x, np.float64)
    np.testing.assert_allclose(stats["mean"], wide.mean(0), rtol=ROUNDING, atol=ROUNDING)
    np.testing.assert_allclose(stats["var"], wide.var(0), rtol=ROUNDING)


class Network(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(self.norm(use_running_average=False, name="first")(x))
        return self.norm(use_running_average=False, name="second")(nn.Dense(4)(x))


def moved_batch_stats(model, variables, x):
    return model.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]


def test_linen_modules_are_measured_all_at_once_and_layer_by_layer():
    model = Network(jaxbn.linen.BatchNorm)
    variables = model.init(jax.random.key(0), X)
    apply = jax.jit(partial(moved_batch_stats, model))
    cut = population_statistics(apply, variables, BATCHES, layer_by_layer=True)
    assert_population_of(X, cut["first"])
    whole = population_statistics(apply, variables, [X])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), cut, whole)


def test_statistics_measured_with_jaxbn_serve_flax():
    ours, flaxs = Network(jaxbn.linen.BatchNorm), nn.BatchNorm(use_running_average=True)
    variables = ours.init(jax.random.key(0), X)
    stats = population_statistics(jax.jit(partial(moved_batch_stats, ours)), variables, [X])
    y = flaxs.apply({"params": variables["params"]["first"], "batch_stats": stats["first"]}, X[:1])
    np.testing.assert_allclose(y, (X[:1] - X.mean(0)) / np.sqrt(X.var(0) + 1e-5), atol=1e-5)


def test_nnx_modules_are_measured():
    model = jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    graph, params, start = nnx.split(model, nnx.Param, nnx.BatchStat)

    @jax.jit
    def apply(variables, x):
        model = nnx.merge(graph, variables["params"], variables["batch_stats"])
        model(x)
        return nnx.state(model, nnx.BatchStat)

    nnx.update(model, population_statistics(apply, {"params": params, "batch_stats": start}, BATCHES))
    assert_population_of(X, {"mean": model.mean[...], "var": model.var[...]})


@pytest.mark.parametrize(
    "scope",
    [
        dict(axis_name="data"),
        dict(pool_axis_name="data"),
        dict(axis_name="data", axis_index_groups=[[0, 1, 2, 3], [4, 5, 6, 7]]),
        dict(axis_name="data", group_size=2),
    ],
)
def test_all_shards_are_pooled_whatever_the_scope_of_a_batch(scope):
    norm = jaxbn.batch_norm(**scope)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    apply = jax.shard_map(
        lambda v, x: norm.apply(v, x, train=True)[1], mesh=mesh, in_specs=(P(), P("data")), out_specs=P()
    )
    variables = norm.init(jax.random.key(0), X)
    assert_population_of(X, population_statistics(jax.jit(apply), variables, BATCHES))


def test_ghost_batches_are_pooled():
    norm = jaxbn.batch_norm(group_size=4)
    apply = jax.jit(lambda v, x: norm.apply(v, x, train=True)[1])
    assert_population_of(X, population_statistics(apply, norm.init(jax.random.key(0), X), BATCHES))
