"""Every normalizer fed a record of its batch_stats: microbatches pool and data sets are measured without a wrapper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_network
from jax.sharding import AxisType
from normalizers import CASES, QUICK, draw, ready
from small_network import FIRST, KEY

import jaxbn
from jaxbn import training, variants
from jaxbn._record import running_part
from jaxbn._recording import finish_pooling, start_pooling, start_record

CANNOT = {"virtual_batch_norm", "whitening_norm", "whitening_norm, Newton"}
KEEP_A_MEAN = [name for name in CASES if "mean" in ready(name).variables["batch_stats"]]
pooling = pytest.mark.parametrize("name", [name for name in KEEP_A_MEAN if name not in CANNOT])
# frozen is never in training mode, and so records nothing.
MEASURED = [n for n in KEEP_A_MEAN if "var" in ready(n).variables["batch_stats"] and n not in CANNOT | {"frozen"}]
# Means and variances of size 5, in sums of 32 values of another order: a few roundings of float32.
ROUNDED = {"rtol": 2e-6, "atol": 2e-6}
MODES = ("by batch", "by running")
# Unequal, so that an average of averages would be wrong.
PARTS, WHOLE = (slice(0, 6), slice(6, 8)), (slice(None),)


@functools.cache
def observed(name):
    """Statistics after one batch, whole and in parts, plain and recorded; all in one program."""
    r = ready(name)
    params = r.variables["params"]

    def trained(batch_stats, x, parts):
        for part in parts:
            arguments = {n: v[part] if np.ndim(v) else v for n, v in r.arguments.items()}
            variables = {"params": params, "batch_stats": batch_stats}
            _, batch_stats = r.norm.apply(variables, x[part], train=True, **arguments)
        return batch_stats

    @functools.partial(jax.jit, compiler_options=QUICK)
    def program(batch_stats, x):
        pooled = start_pooling(batch_stats)
        seen = {"one step": trained(batch_stats, x, WHOLE)}
        seen["pooled"] = finish_pooling(trained(pooled, x, PARTS), batch_stats)
        evaluate = functools.partial(r.norm.apply, x=x, train=False, **r.arguments)
        seen["evaluated"] = [evaluate({"params": params, "batch_stats": stats}) for stats in (batch_stats, pooled)]
        if name in MEASURED:
            for mode in MODES:
                record = start_record(batch_stats, by_running=mode == "by running")
                seen[mode] = [trained(record, x, parts) for parts in (PARTS, WHOLE)]
        return seen | {"started": pooled}

    return program(r.variables["batch_stats"], draw())


def assert_close(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **ROUNDED), actual, expected)
    assert jax.tree.map(jnp.result_type, actual) == jax.tree.map(jnp.result_type, expected)


@pooling
def test_microbatches_move_the_statistics_as_the_whole_batch_does(name):
    assert_close(observed(name)["pooled"], observed(name)["one step"])


@pooling
def test_evaluation_reads_the_running_statistics_of_a_record_and_leaves_it_alone(name):
    (plain, _), (y, held) = observed(name)["evaluated"]
    np.testing.assert_array_equal(y, plain)
    jax.tree.map(np.testing.assert_array_equal, held, observed(name)["started"])


def recorded(name, mode, whole):
    """Count, mean and variance that were recorded, in float64: [..., features] each."""
    count, mean, remainder, var = (np.asarray(v, float) for v in observed(name)[mode][whole]["mean"].measured)
    return count, mean + remainder, var


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MEASURED)
def test_batches_are_recorded_by_counts_however_they_are_cut(name, mode):
    for cut, whole in zip(*(recorded(name, mode, whole) for whole in (0, 1)), strict=True):
        np.testing.assert_allclose(cut, whole, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [n for n in MEASURED if ready(n).variables["batch_stats"]["mean"].shape == (4,)])
def test_what_is_recorded_are_the_moments_of_the_input(name, mode):
    count, mean, var = recorded(name, mode, whole=True)
    x = np.asarray(draw(), float)
    np.testing.assert_array_equal(count, x[..., 0].size)
    np.testing.assert_allclose(mean, x.mean((0, 1)), rtol=1e-6)
    np.testing.assert_allclose(var, x.var((0, 1)), rtol=1e-6)


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize("mode", MODES)
def test_running_statistics_do_not_move_while_they_record(name, mode):
    record = start_record(ready(name).variables["batch_stats"], by_running=mode == "by running")
    jax.tree.map(np.testing.assert_array_equal, running_part(observed(name)[mode][0]), running_part(record))


@pytest.mark.parametrize(
    "build", [variants.batch_renorm, variants.stochastic_batch_norm, variants.mean_only_batch_norm]
)
def test_microbatches_pool_on_all_devices(build):
    """What the first layer sees does not depend on microbatches, so neither may its running statistics."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    norm, alone, optimizer = build(axis_name="data"), build(), optax.sgd(0.1)
    variables = small_network.initial(norm)
    step = training.shard_map_step(small_network.loss_of(norm), optimizer, mesh=mesh, microbatches=2)
    state, _ = step(training.replicate(training.init_state(variables, optimizer), mesh), FIRST, KEY)
    expected = small_network.apply(alone, variables, FIRST)[1][0]
    assert_close(jax.device_get(state).batch_stats[0], jax.device_get(expected))


def test_statistics_of_half_precision_stay_so():
    norm = jaxbn.batch_norm()
    variables = norm.init(KEY, draw())
    stats = jax.tree.map(lambda v: v.astype(jnp.bfloat16), variables["batch_stats"])
    _, moved = norm.apply({**variables, "batch_stats": start_pooling(stats)}, draw(), train=True)
    assert {v.dtype for v in finish_pooling(moved, stats).values()} == {jnp.dtype(jnp.bfloat16)}


def test_a_frozen_layer_pools_nothing():
    start = ready("frozen").variables["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, observed("frozen")["pooled"], start)


@pytest.mark.parametrize(
    ("norm", "remedy"),
    [(variants.whitening_norm(), "pool=False"), (variants.virtual_batch_norm(3), "microbatches=1")],
)
def test_normalizers_that_cannot_pool_are_refused(norm, remedy):
    variables, mesh = small_network.initial(norm), jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    step = training.jit_step(small_network.loss_of(norm), optax.sgd(0.1), mesh=mesh, microbatches=2)
    with pytest.raises(ValueError, match=rf"came as a record.*{remedy}"):
        step(training.init_state(variables, optax.sgd(0.1)), FIRST, KEY)


@pytest.mark.parametrize("norm", [variants.whitening_norm(), variants.virtual_batch_norm(3)])
def test_normalizers_that_cannot_pool_evaluate_all_the_same(norm):
    variables = norm.init(KEY, draw())
    record = start_pooling(variables["batch_stats"])
    y, held = variants.frozen(norm).apply({**variables, "batch_stats": record}, draw(), train=True)
    np.testing.assert_array_equal(y, norm.apply(variables, draw(), train=False)[0])
    jax.tree.map(np.testing.assert_array_equal, held, record)


def test_whitening_trains_on_microbatches_that_do_not_pool():
    norm, mesh = variants.whitening_norm(), jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    step = training.jit_step(small_network.loss_of(norm), optax.sgd(0.1), mesh=mesh, microbatches=2, pool=False)
    _, metrics = step(training.init_state(small_network.initial(norm), optax.sgd(0.1)), FIRST, KEY)
    assert metrics["skipped"] == 0


def test_population_statistics_of_a_reference_batch_are_refused():
    norm = variants.virtual_batch_norm(3)

    def apply(variables, x):
        return norm.apply(variables, x, train=True)[1]

    with pytest.raises(ValueError, match="moments of its reference batch"):
        jaxbn.population_statistics(apply, norm.init(KEY, draw()), [draw()])
