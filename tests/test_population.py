"""Population statistics against numpy on the whole data set, and against one batch that is the whole data set."""

from functools import partial
from itertools import pairwise

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn._population import input_moments, population_statistics
from jaxbn._recording import recordable, start_record

EPSILON = 1e-5
UNEQUAL = [16, 32]  # Batches of 16, 16 and 32 examples: two compilations.
EQUAL = [16, 32, 48]
ROUNDING = 1e-6  # Eight units in the last place of float32: a few roundings within each batch.

NORM = recordable(jaxbn.batch_norm(epsilon=EPSILON))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def cut(x, cuts=EQUAL):
    return np.split(x, cuts)


@jax.jit
def one_layer(variables, x, **batch):
    return NORM.apply(variables, x, train=True, **batch)[1]


def one_layer_variables(features=3, norm=NORM):
    return norm.init(jax.random.key(0), jax.ShapeDtypeStruct((2, features), jnp.float32))


def chain_variables(widths=(3, 5, 4), seed=1):
    """A tanh network with a norm before each tanh; weights that mix features of different scale."""
    params, stats = {}, {}
    for depth, (inputs, outputs) in enumerate(pairwise(widths)):
        weights = normal(inputs, outputs, seed=seed + depth) * (1 + depth)
        params[f"layer_{depth}"] = {"kernel": weights, "scale": 1 + 0.1 * normal(outputs), "bias": normal(outputs)}
        stats[f"layer_{depth}"] = {"mean": jnp.zeros(outputs), "var": jnp.ones(outputs)}
    return {"params": params, "batch_stats": stats}


def chain(variables, x, norm=NORM):
    moved = {}
    for name, params in variables["params"].items():
        state = {"params": {k: params[k] for k in ("scale", "bias")}, "batch_stats": variables["batch_stats"][name]}
        y, moved[name] = norm.apply(state, x @ params["kernel"], train=True)
        x = jnp.tanh(y)
    return moved


jitted_chain = jax.jit(chain)


def chain_oracle(params, batches):
    """Float64 population statistics of `chain` on batches that each normalize themselves, pooled by hand."""
    inputs = {name: [] for name in params}
    for x in batches:
        for name, p in params.items():
            h = np.asarray(x, np.float64) @ np.asarray(p["kernel"], np.float64)
            inputs[name].append(h)
            x = np.tanh((h - h.mean(0)) / np.sqrt(h.var(0) + EPSILON) * p["scale"] + p["bias"])
    whole = {name: np.concatenate(h) for name, h in inputs.items()}
    return {name: {"mean": h.mean(0), "var": h.var(0)} for name, h in whole.items()}


def assert_statistics(actual, expected, rtol=ROUNDING):
    """Means are judged on the scale of their standard deviation or of themselves, whichever is larger."""
    for name, stats in expected.items():
        scale = np.maximum(np.abs(stats["mean"]), np.sqrt(stats["var"]))
        assert np.max(np.abs(np.asarray(actual[name]["mean"], float) - stats["mean"]) / scale) < rtol, name
        np.testing.assert_allclose(actual[name]["var"], stats["var"], rtol=rtol, err_msg=name)


def test_unequal_batches_give_the_statistics_of_the_whole_set():
    x = 3 + 2 * normal(64, 3)
    stats = population_statistics(one_layer, one_layer_variables(), cut(x, UNEQUAL))
    wide = x.astype(np.float64)
    assert_statistics({"": stats}, {"": {"mean": wide.mean(0), "var": wide.var(0)}})


@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6])
def test_variance_is_exact_far_from_zero(ratio):
    x = (ratio + normal(64, 3)).astype(np.float32)
    stats = population_statistics(one_layer, one_layer_variables(), cut(x))
    np.testing.assert_allclose(stats["var"], x.astype(np.float64).var(0), rtol=ROUNDING)


def test_a_mask_leaves_out_what_it_hides():
    x, mask = normal(64, 3), normal(64, 3, seed=5) > 0
    poisoned = np.where(mask, x, np.nan)
    batches = list(zip(cut(poisoned), cut(mask), strict=True))
    stats = population_statistics(lambda v, b: one_layer(v, b[0], where=b[1]), one_layer_variables(), batches)
    wide = np.where(mask, x, np.nan).astype(np.float64)
    assert_statistics({"": stats}, {"": {"mean": np.nanmean(wide, 0), "var": np.nanvar(wide, 0)}})


def test_weights_count_as_repeated_values():
    x, weights = normal(64, 3), np.arange(64) % 3
    batches = list(zip(cut(x), cut(weights[:, None].astype(np.float32)), strict=True))
    stats = population_statistics(lambda v, b: one_layer(v, b[0], weights=b[1]), one_layer_variables(), batches)
    wide = np.repeat(x, weights, axis=0).astype(np.float64)
    assert_statistics({"": stats}, {"": {"mean": wide.mean(0), "var": wide.var(0)}})


def test_unbiased_divides_by_n_minus_one():
    x = normal(8, 3)
    stats = population_statistics(one_layer, one_layer_variables(), cut(x, [3]), unbiased=True)
    np.testing.assert_allclose(stats["var"], x.astype(np.float64).var(0, ddof=1), rtol=ROUNDING)


def test_a_layer_used_twice_pools_both_uses():
    @jax.jit
    def twice(variables, x):
        _, stats = NORM.apply(variables, x, train=True)
        return NORM.apply({**variables, "batch_stats": stats}, 5 * x[: len(x) // 2], train=True)[1]

    batches = cut(normal(64, 3))
    seen = np.concatenate([np.concatenate([x, 5 * x[: len(x) // 2]]) for x in batches]).astype(np.float64)
    stats = population_statistics(twice, one_layer_variables(), batches)
    assert_statistics({"": stats}, {"": {"mean": seen.mean(0), "var": seen.var(0)}})


def test_all_at_once_measures_layers_above_normalized_batches():
    variables, batches = chain_variables(), cut(normal(64, 3), UNEQUAL)
    stats = population_statistics(jitted_chain, variables, batches)
    assert_statistics(stats, chain_oracle(variables["params"], batches), rtol=5 * ROUNDING)


@pytest.mark.parametrize("cuts", [UNEQUAL, range(4, 64, 4)])
def test_layer_by_layer_equals_one_batch_of_the_whole_set(cuts):
    # With all data in one batch, batch statistics are population statistics, in every layer.
    variables, x = chain_variables(widths=(3, 5, 4, 4)), normal(64, 3)
    stats = population_statistics(jitted_chain, variables, cut(x, cuts), layer_by_layer=True)
    # Three layers amplify rounding, by the condition of the weights: 20 measured.
    assert_statistics(stats, chain_oracle(variables["params"], [x]), rtol=20 * ROUNDING)


def test_layer_by_layer_takes_one_pass_a_layer_and_one_to_see_that_nothing_changes():
    variables, passes = chain_variables(widths=(3, 5, 4, 4)), []

    class Batches:
        def __iter__(self):
            passes.append(1)
            return iter(cut(normal(64, 3)))

    data = Batches()
    population_statistics(jitted_chain, variables, data, layer_by_layer=True)
    # One more call to iter found out whether the data can be read again.
    assert len(passes) == 3 + 1 + 1


def test_a_layer_that_feeds_itself_settles_on_its_fixed_point():
    @jax.jit
    def recurrent(variables, x):
        y, stats = NORM.apply(variables, x, train=True)
        return NORM.apply({**variables, "batch_stats": stats}, 0.5 * jnp.tanh(y), train=True)[1]

    variables, x = one_layer_variables(), 2 + normal(64, 3)
    stats = population_statistics(recurrent, variables, cut(x), layer_by_layer=True)
    wide = x.astype(np.float64)
    mean, std = np.asarray(stats["mean"], float), np.sqrt(np.asarray(stats["var"], float) + EPSILON)
    seen = np.concatenate([wide, 0.5 * np.tanh((wide - mean) / std)])
    assert_statistics({"": stats}, {"": {"mean": seen.mean(0), "var": seen.var(0)}}, rtol=3e-6)


def test_averaged_params_get_their_own_statistics():
    first, second = chain_variables(seed=1), chain_variables(seed=9)
    params = jax.tree.map(lambda a, b: (a + b) / 2, first["params"], second["params"])
    stats = population_statistics(jitted_chain, {**first, "params": params}, cut(normal(64, 3)))
    assert_statistics(stats, chain_oracle(params, cut(normal(64, 3))), rtol=5 * ROUNDING)


def test_what_saw_nothing_keeps_its_statistics():
    mask = np.array([True, False, True])
    variables = one_layer_variables()
    variables["batch_stats"] = {"mean": jnp.full(3, 7.0), "var": jnp.full(3, 11.0)}
    stats = population_statistics(lambda v, x: one_layer(v, x, where=mask), variables, cut(normal(64, 3)))
    assert (stats["mean"][1], stats["var"][1]) == (7, 11)
    assert not np.any(np.asarray(stats["mean"])[[0, 2]] == 7)


def test_a_layer_left_in_test_mode_keeps_its_statistics():
    norm = recordable(jaxbn.batch_norm(epsilon=EPSILON, use_scale=False, use_bias=False))

    @jax.jit
    def half_frozen(variables, x):
        stats = variables["batch_stats"]
        y, a = norm.apply({"params": {}, "batch_stats": stats["a"]}, x, train=False)
        return {"a": a, "b": norm.apply({"params": {}, "batch_stats": stats["b"]}, y, train=True)[1]}

    frozen = {"mean": jnp.full(3, 1.0), "var": jnp.full(3, 4.0)}
    variables = {"batch_stats": {"a": frozen, "b": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}}
    x = normal(64, 3)
    stats = population_statistics(half_frozen, variables, cut(x))
    np.testing.assert_array_equal(stats["a"]["mean"], frozen["mean"])
    y = (x.astype(np.float64) - 1) / np.sqrt(4 + EPSILON)
    assert_statistics(stats, {"b": {"mean": y.mean(0), "var": y.var(0)}})


def test_debiased_statistics_read_as_the_population():
    norm = recordable(jaxbn.batch_norm(debias=True))
    x = 3 + normal(64, 3)
    variables = one_layer_variables(norm=norm)
    stats = population_statistics(jax.jit(lambda v, b: norm.apply(v, b, train=True)[1]), variables, cut(x))
    mean, var = jaxbn.running_moments(stats, debias=True)
    assert_statistics({"": {"mean": mean, "var": var}}, {"": {"mean": x.mean(0, float), "var": x.var(0, float)}})


def test_input_moments_see_the_network_at_test_time():
    variables, x = chain_variables(), normal(64, 3)
    variables["batch_stats"] = jax.tree.map(lambda v: v + 0.5, variables["batch_stats"])
    moments = input_moments(jitted_chain, variables, cut(x))
    assert [int(m.count[0]) for m in moments.values()] == [64, 64]
    p, wide = variables["params"]["layer_0"], x.astype(np.float64)
    h = np.tanh((wide @ p["kernel"] - 0.5) / np.sqrt(1.5 + EPSILON) * p["scale"] + p["bias"])
    h = h @ np.asarray(variables["params"]["layer_1"]["kernel"], np.float64)
    actual = {"layer_1": moments["layer_1"]._asdict()}
    assert_statistics(actual, {"layer_1": {"mean": h.mean(0), "var": h.var(0)}}, rtol=3 * ROUNDING)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = nn.Dense(3)(x)
        return nn.tanh(jaxbn.linen.Norm(NORM, use_running_average=False)(x)), None


class Stack(nn.Module):
    """Four blocks in a scan, whose variables lie along a leading axis."""

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(Block, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=4)
        return scan()(x, None)[0]


def moved_batch_stats(model, variables, x):
    return model.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]


def test_layers_stacked_by_a_scan_are_measured_each():
    x = normal(64, 3)
    variables = Stack().init(jax.random.key(0), x)
    apply = jax.jit(partial(moved_batch_stats, Stack()))
    stats = population_statistics(apply, variables, cut(x), layer_by_layer=True)
    (whole,) = jax.tree.leaves(stats, is_leaf=lambda node: isinstance(node, dict) and "mean" in node)
    assert whole["mean"].shape == (4, 3)
    again = population_statistics(apply, {**variables, "batch_stats": stats}, [x])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), again, stats)


def test_networks_trained_together_under_vmap_are_measured_each():
    runs = [chain_variables(seed=seed) for seed in (1, 2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)
    batches = cut(normal(64, 3))
    stats = population_statistics(jax.jit(jax.vmap(chain, in_axes=(0, None))), stacked, batches)
    for run, variables in enumerate(runs):
        expected = chain_oracle(variables["params"], batches)
        assert_statistics(jax.tree.map(lambda s, run=run: s[run], stats), expected, rtol=5 * ROUNDING)


class Network(nnx.Module):
    def __init__(self):
        self.norm = jaxbn.nnx.Norm(NORM, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(x)


def nnx_apply(graph, variables, x):
    model = nnx.merge(graph, variables["params"], variables["batch_stats"])
    model(x)
    return nnx.state(model, nnx.BatchStat)


def test_an_nnx_network_passes_its_states():
    model, x = Network(), 3 + normal(64, 3)
    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    variables = {"params": params, "batch_stats": stats}
    nnx.update(model, population_statistics(jax.jit(partial(nnx_apply, graph)), variables, cut(x)))
    wide = x.astype(np.float64)
    stats = jax.tree.map(lambda v: v[...], model.norm.batch_stats, is_leaf=lambda v: isinstance(v, nnx.Variable))
    assert_statistics({"": stats}, {"": {"mean": wide.mean(0), "var": wide.var(0)}})


def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def test_sharded_inputs_under_jit_give_the_global_statistics():
    x, variables = normal(64, 3), chain_variables()
    sharding = NamedSharding(mesh(), P("data"))
    batches = [jax.device_put(b, sharding) for b in cut(x)]
    stats = population_statistics(jitted_chain, variables, batches)
    assert_statistics(stats, chain_oracle(variables["params"], cut(x)), rtol=5 * ROUNDING)


def test_shards_under_shard_map_pool_over_axis_name():
    norm = recordable(jaxbn.batch_norm(epsilon=EPSILON, axis_name="data"), axis_name="data")
    x, variables = normal(64, 3), chain_variables()
    sharded = jax.shard_map(partial(chain, norm=norm), mesh=mesh(), in_specs=(P(), P("data")), out_specs=P())
    stats = population_statistics(jax.jit(sharded), variables, cut(x))
    assert_statistics(stats, chain_oracle(variables["params"], cut(x)), rtol=5 * ROUNDING)


def test_statistics_stay_on_the_devices_they_were_on():
    variables, replicated = one_layer_variables(), NamedSharding(mesh(), P())
    variables["batch_stats"] = jax.device_put(variables["batch_stats"], replicated)
    stats = population_statistics(one_layer, variables, cut(normal(64, 3)))
    assert stats["mean"].sharding == replicated


def test_batches_of_one_shape_are_traced_once():
    traces = []

    @jax.jit
    def apply(variables, x):
        traces.append(x.shape)
        return chain(variables, x)

    population_statistics(apply, chain_variables(), cut(normal(64, 3)), layer_by_layer=True)
    assert traces == [(16, 3)]


def test_a_cached_training_step_is_not_mistaken_for_a_measurement():
    apply, variables, x = jitted_chain, chain_variables(), normal(64, 3)
    before = apply(variables, x[:16])
    population_statistics(apply, variables, cut(x))
    jax.tree.map(np.testing.assert_array_equal, apply(variables, x[:16]), before)


def test_a_record_does_not_change_what_a_network_computes_in_training():
    variables, x = one_layer_variables(), normal(64, 3)
    record = start_record(variables["batch_stats"], by_running=False)
    apply = jax.jit(partial(NORM.apply, train=True))
    np.testing.assert_array_equal(apply({**variables, "batch_stats": record}, x)[0], apply(variables, x)[0])


@pytest.mark.parametrize("features", [1, 2, 3, 4])
def test_a_layer_that_cannot_record_is_named(features):
    model = nn.BatchNorm(use_running_average=False)
    x = normal(16, features)
    with pytest.raises(TypeError, match="a layer did not record"):
        population_statistics(partial(moved_batch_stats, model), model.init(jax.random.key(0), x), cut(x))


def test_test_mode_is_refused():
    def apply(variables, x):
        return NORM.apply(variables, x, train=False)[1]

    with pytest.raises(ValueError, match="training mode"):
        population_statistics(apply, one_layer_variables(), cut(normal(64, 3)))


def test_an_iterator_is_refused_where_it_is_read_twice():
    with pytest.raises(ValueError, match="iterator"):
        population_statistics(one_layer, one_layer_variables(), iter(cut(normal(64, 3))), layer_by_layer=True)


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="empty"):
        population_statistics(one_layer, one_layer_variables(), [])


@pytest.mark.parametrize("layer_by_layer", [False, True])
@pytest.mark.parametrize(
    "variables", [{"params": {}}, {"params": {}, "batch_stats": {}}, {"batch_stats": {"other": 3.0}}]
)
def test_a_network_without_running_statistics_gets_them_back_as_they_are(variables, layer_by_layer):
    stats = population_statistics(lambda v, x: {}, variables, [normal(4, 3)], layer_by_layer=layer_by_layer)
    assert stats == variables.get("batch_stats", {})
    assert input_moments(lambda v, x: {}, variables, [normal(4, 3)]) == {}


def test_data_that_is_not_finite_is_refused_by_the_name_of_the_layer():
    with pytest.raises(ValueError, match="layer_0"):
        population_statistics(jitted_chain, chain_variables(), [np.full((4, 3), np.nan, np.float32)])


def test_passes_that_do_not_settle_are_refused():
    with pytest.raises(ValueError, match="max_passes"):
        population_statistics(jitted_chain, chain_variables(), cut(normal(64, 3)), layer_by_layer=True, max_passes=1)
