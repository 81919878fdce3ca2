"""The shells against Flax's own layers: equal wherever Flax is right; where it was not, against the exact values."""

import functools
import inspect
import warnings
from functools import partial

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_trees_all_equal, assert_trees_all_equal_shapes_and_dtypes
from flax import serialization
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn.linen
import jaxbn.nnx
from jaxbn import _shell

SHELLS = {"linen": (jaxbn.linen.BatchNorm, flax.linen.BatchNorm), "nnx": (jaxbn.nnx.BatchNorm, flax.nnx.BatchNorm)}
DEVICES = 8
STEPS = 3

# Compiling is what these tests spend their time on, and the results of both sides are compared at any level.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

drawn = dict(scale_init=jax.nn.initializers.normal(1.0), bias_init=jax.nn.initializers.normal(1.0))
CASES = {
    "no scale, channels first": drawn | dict(use_scale=False, axis=1),
    "no parameters, bfloat16 input": dict(use_scale=False, use_bias=False, input_dtype=jnp.bfloat16),
    "integer input": dict(input_dtype=jnp.int32),
    "bfloat16 output": drawn | dict(dtype=jnp.bfloat16),
}
LINEN_CASES = CASES | {
    "float16 throughout": drawn | dict(param_dtype=jnp.float16, dtype=jnp.float16, input_dtype=jnp.float16),
    "no bias, other averages": drawn | dict(use_bias=False, momentum=0.5, epsilon=1e-2),
    "bfloat16 input": dict(input_dtype=jnp.bfloat16),
    "bfloat16 parameters": drawn | dict(param_dtype=jnp.bfloat16, use_fast_variance=False),
    "two axes kept, out of order": drawn | dict(axis=(-1, 1)),
    "complex input": dict(dtype=jnp.complex64, input_dtype=jnp.complex64),
    "reductions as they come": dict(force_float32_reductions=False, use_fast_variance=False),
}
EACH_CASE = pytest.mark.parametrize(
    ("shell", "case"), [("linen", case) for case in LINEN_CASES] + [("nnx", case) for case in CASES]
)


@pytest.fixture(autouse=True)
def _peers_may_promote_ranks():
    """Flax's layers promote ranks implicitly, as do its masks; ours are held to "raise" in the other tests."""
    with jax.numpy_rank_promotion("allow"):
        yield


def inputs(dtype=jnp.float32, shape=(4, 5, 3, 5), key=7):
    x = jax.random.normal(jax.random.key(key), shape) * 3 + 1
    return jax.lax.complex(x, x * x) if dtype == jnp.complex64 else x.astype(dtype)


def tolerance(*trees):
    """Two roundings of the coarsest dtype, or what Flax's float32 E[x**2] - E[x]**2 loses on inputs of this size."""
    dtypes = {jnp.result_type(leaf) for leaf in jax.tree.leaves(trees)}
    return max([1e-5, *(2 * float(jnp.finfo(d).eps) for d in dtypes if jnp.issubdtype(d, jnp.inexact))])


def assert_close(ours, theirs, level=None):
    """Equal structures and dtypes, and values as far apart as `level` allows, in units of each array's largest."""
    assert_trees_all_equal_shapes_and_dtypes(ours, theirs)
    level = tolerance(theirs) if level is None else level
    for got, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        got, expected = (np.asarray(v, np.complex128 if jnp.iscomplexobj(v) else np.float64) for v in (got, expected))
        np.testing.assert_allclose(got, expected, rtol=level, atol=level * max(1.0, np.max(np.abs(expected))))


class Linen:
    """A linen layer behind the few verbs that the tests share with nnx."""

    def __init__(self, layer, x, **arguments):
        self.module = layer(**arguments)
        self.state = jit(partial(self.module.init, use_running_average=False))(jax.random.key(3), x)

    def apply(self, state, x, params=None, **arguments):
        """Output and state after it."""
        state = state if params is None else state | {"params": params}
        y, moved = self.module.apply(state, x, mutable=["batch_stats"], **arguments)
        return y, state | moved

    @staticmethod
    def params(state):
        return state.get("params", {})


class Nnx:
    """An nnx layer behind the same verbs; its state is the plain dict of its variables."""

    def __init__(self, layer, x, axis=-1, **arguments):
        module = layer(x.shape[axis], axis=axis, rngs=flax.nnx.Rngs(3), **arguments)
        self.graph, state = flax.nnx.split(module)
        self.state = flax.nnx.to_pure_dict(state)

    def apply(self, state, x, params=None, **arguments):
        module = flax.nnx.merge(self.graph, state | (params or {}))
        y = module(x, **arguments)
        return y, flax.nnx.to_pure_dict(flax.nnx.state(module))

    @staticmethod
    def params(state):
        return {name: state[name] for name in ("scale", "bias") if name in state}


def pair(shell, x, **arguments):
    verbs = {"linen": Linen, "nnx": Nnx}[shell]
    return [verbs(layer, x, **arguments) for layer in SHELLS[shell]]


def train(layer, x, mask=None):
    y, layer.state = jit(partial(layer.apply, use_running_average=False))(layer.state, x, mask=mask)
    return y


def evaluate(layer, x):
    return jit(partial(layer.apply, use_running_average=True))(layer.state, x)[0]


def descend(layer, state, x, weights):
    """Output, next state and gradients of sum(weights * sin(Re y)), by the parameters and by an x of floats."""

    def loss(params, x):
        y, moved = layer.apply(state, x, params, use_running_average=False)
        return jnp.sum(jnp.sin(y.real.astype(jnp.float32)) * weights), (y, moved)

    by = (0, 1) if jnp.issubdtype(x.dtype, jnp.inexact) else (0,)
    gradients, (y, moved) = jax.grad(loss, by, has_aux=True)(layer.params(state), x)
    return y, moved, gradients


@functools.cache
def records(shell, case):
    """What our layer and Flax's go through in a few steps: one run for all the tests of that case."""
    arguments = dict(LINEN_CASES[case])
    x = inputs(arguments.pop("input_dtype", jnp.float32))
    return [record(layer, x) for layer in pair(shell, x, **arguments)]


def record(layer, x):
    found = dict(initial=layer.state, outputs=[])
    step = jit(partial(descend, layer))
    for scale in range(1, STEPS + 1):
        y, layer.state, gradients = step(layer.state, x * scale, inputs(shape=x.shape, key=8))
        found["outputs"].append(y)
    return found | dict(trained=layer.state, gradients=gradients, evaluated=evaluate(layer, x))


# Where Flax is right


@EACH_CASE
def test_initial_variables_are_those_of_flax(shell, case):
    ours, theirs = (record["initial"] for record in records(shell, case))
    if case != "complex input":  # where Flax's mean turns complex in the first step, ours starts so
        assert_trees_all_equal_shapes_and_dtypes(ours, theirs)
    assert_trees_all_equal(ours, theirs)


@EACH_CASE
def test_outputs_in_training_agree_with_flax(shell, case):
    ours, theirs = (record["outputs"] for record in records(shell, case))
    assert_close(ours, theirs)


@EACH_CASE
def test_running_statistics_agree_with_flax(shell, case):
    ours, theirs = (record["trained"] for record in records(shell, case))
    # In half precision Flax's nnx layer takes the statistics of x, ours too, after the same rounding.
    assert_close(ours, theirs, level=1e-5)


@EACH_CASE
def test_outputs_in_evaluation_agree_with_flax(shell, case):
    ours, theirs = (record["evaluated"] for record in records(shell, case))
    # Flax's nnx layer rounds the running statistics to `dtype` as well: a few roundings more.
    assert_close(ours, theirs, level=4 * tolerance(theirs))


@EACH_CASE
def test_gradients_agree_with_flax(shell, case):
    ours, theirs = (record["gradients"] for record in records(shell, case))
    outputs = records(shell, case)[1]["outputs"]
    # The loss is taken of rounded outputs, and the cotangents are rounded again on the way back.
    assert_close(ours, theirs, level=4 * tolerance(theirs, outputs))


@pytest.mark.parametrize("shell", SHELLS)
def test_descent_agrees_with_flax(shell):
    x, weights = inputs(), inputs(key=8) / 100
    layers = pair(shell, x, momentum=0.9, **drawn)

    def losses(layer):
        step = jit(partial(descend, layer))
        for _ in range(STEPS):
            y, layer.state, (gradients, _) = step(layer.state, x, weights)
            params = jax.tree.map(lambda p, g: p - 0.1 * g, layer.params(layer.state), gradients)
            layer.state = layer.state | (params if shell == "nnx" else {"params": params})
            yield jnp.sum(jnp.sin(y) * weights)

    ours, theirs = ([*losses(layer)] for layer in layers)
    assert theirs[-1] < theirs[0]
    assert_close(ours, theirs)
    assert_close(layers[0].state, layers[1].state)


@pytest.mark.parametrize(("shell", "shape"), [("linen", (4, 5, 3, 5)), ("linen", (5,)), ("nnx", (4, 1, 1, 1))])
def test_masks_agree_with_flax(shell, shape):
    x = inputs()
    # Of shape (5,) the mask is one of features, and Flax's mean of no values is NaN: there all count.
    mask = jax.random.bernoulli(jax.random.key(1), 0.6, shape) | (len(shape) == 1)
    ours, theirs = pair(shell, x)
    assert_close(train(ours, x, mask), train(theirs, x, mask))
    assert_close(ours.state, theirs.state)


def test_float64_agrees_with_flax_linen():
    with jax.enable_x64(True):
        x = inputs(jnp.float64)
        ours, theirs = pair("linen", x, param_dtype=jnp.float64)
        assert_close(train(ours, x), train(theirs, x), level=1e-12)
        # Flax's averages start in float32: 0.99 is rounded to it in the first step.
        assert_close(ours.state, theirs.state, level=float(jnp.finfo(jnp.float32).eps))


@pytest.fixture
def nothing_warned(monkeypatch):
    monkeypatch.setattr(_shell, "_warned", set())


@pytest.mark.parametrize("shape", [(1, 3), (1, 1, 1, 2)])
@pytest.mark.parametrize("shell", SHELLS)
def test_one_value_per_feature_trains_as_in_flax_and_warns_once(shell, shape, nothing_warned):
    ours, theirs = pair(shell, inputs(shape=shape), **drawn)
    with pytest.warns(RuntimeWarning, match=r"has one value per feature.*allow_single_value=False refuses"):
        y = train(ours, inputs(shape=shape))
    assert_close((y, ours.state), (train(theirs, inputs(shape=shape)), theirs.state))
    # Another layer, traced anew: a second warning would be an error here.
    again, _ = pair(shell, inputs(shape=shape), epsilon=0.1)
    train(again, inputs(shape=shape))


@pytest.mark.parametrize("scope", [{"group_size": 1}, {"group_size": 2, "axis_name": "data"}])
def test_ghost_batches_of_one_value_warn_too(scope, nothing_warned):
    layer = jaxbn.linen.BatchNorm(use_running_average=False, **scope)
    x = inputs(shape=(2, 1, 3))
    run = jax.vmap(lambda x: layer.init_with_output(jax.random.key(0), x), axis_name="data")
    variables = jax.tree.map(lambda v: v[0], run(x)[1])
    train = jax.vmap(lambda x: layer.apply(variables, x, mutable=["batch_stats"])[0], axis_name="data")
    if scope["group_size"] == 2:
        assert np.all(np.isfinite(train(x)))
        return
    with pytest.warns(RuntimeWarning, match="one value per feature"):
        np.testing.assert_allclose(train(x), 0, atol=1e-6)


def test_nnx_tabulates_a_model_on_one_example(nothing_warned):
    class Model(flax.nnx.Module):
        def __init__(self, norm):
            rngs = flax.nnx.Rngs(0)
            self.dense, self.norm = flax.nnx.Linear(4, 3, rngs=rngs), norm(3, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.dense(x))

    tables = []
    for norm in SHELLS["nnx"]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            tables.append(flax.nnx.tabulate(Model(norm), jnp.ones((1, 4))))
    assert "BatchNorm" in tables[0]
    assert tables[0] == tables[1]


@pytest.mark.parametrize("source", [0, 1], ids=["ours to Flax", "Flax to ours"])
@pytest.mark.parametrize("shell", SHELLS)
def test_checkpoints_interchange(shell, source):
    x = inputs()
    layers = pair(shell, x, **drawn)
    trained, fresh = layers[source], layers[1 - source]
    train(trained, x)
    fresh.state = serialization.from_bytes(fresh.state, serialization.to_bytes(trained.state))
    assert_trees_all_equal(fresh.state, trained.state)
    assert_close(evaluate(fresh, x), evaluate(trained, x))


@pytest.mark.parametrize("method", ["__init__", "__call__"])
@pytest.mark.parametrize("shell", SHELLS)
def test_constructors_and_calls_take_every_argument_of_flax_with_its_default(shell, method):
    ours, theirs = (inspect.signature(getattr(layer, method)).parameters for layer in SHELLS[shell])
    for name, parameter in theirs.items():
        assert name in ours
        if not callable(parameter.default):  # initializers are compared by the values that they give
            assert ours[name].default == parameter.default, name


# Shards of equal counts, where an average of averages is right


def trained(layer, x, mask, over, **arguments):
    """Output and new statistics of a linen layer on x: [devices, n, features]; with momentum 0 they are the batch's."""
    module = layer(use_running_average=False, axis_name="data", momentum=0.0, **arguments)
    variables = jit(module.init)(jax.random.key(0), x[0])

    def step(x, mask):
        y, moved = module.apply(variables, x, mask=mask, mutable=["batch_stats"])
        return y, moved["batch_stats"]

    return over(step)(x, mask)


def by_shard_map(step):
    def shard(x, mask):
        y, stats = step(x[0], mask[0])
        return y[None], stats

    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    return jit(jax.shard_map(shard, mesh=mesh, in_specs=P("data"), out_specs=(P("data"), P())))


def by_mapping(mapped):
    def of_first_shard(step, x, mask):
        y, stats = mapped(step)(x, mask)
        return y, jax.tree.map(lambda s: s[0], stats)

    return lambda step: partial(of_first_shard, step)


MAPPINGS = {
    "shard_map": by_shard_map,
    "pmap": by_mapping(partial(jax.pmap, axis_name="data")),
    "vmap": by_mapping(lambda step: jit(jax.vmap(step, axis_name="data"))),
}


@pytest.mark.parametrize("over", MAPPINGS.values(), ids=MAPPINGS)
def test_shards_of_equal_counts_agree_with_flax(over):
    x, mask = inputs(shape=(DEVICES, 4, 5)), jnp.ones((DEVICES, 4, 1), bool)
    ours, theirs = (trained(layer, x, mask, over) for layer in SHELLS["linen"])
    assert_close(ours, theirs)


def test_nnx_shards_of_equal_counts_agree_with_flax():
    x = inputs(shape=(DEVICES, 4, 5))

    def step(layer, x):
        module = layer(5, axis_name="data", rngs=flax.nnx.Rngs(0))
        y = module(x)
        return y, module.mean[...], module.var[...]

    ours, theirs = (jit(jax.vmap(partial(step, layer), axis_name="data"))(x) for layer in SHELLS["nnx"])
    assert_close(ours, theirs)


# Where Flax is wrong. Each test first shows by how much: when Flax mends it, that line fails and the case moves up.


def unequal_shards():
    """Values whose mean rises from shard to shard, and masks that let 1, 2, 3, 4, 1, ... of 4 through."""
    x = np.asarray(inputs(shape=(DEVICES, 4, 5))) + np.arange(DEVICES, dtype=np.float32)[:, None, None]
    mask = np.arange(4)[None, :, None] <= (np.arange(DEVICES) % 4)[:, None, None]
    return x, mask


def kept_moments(x, mask):
    kept = x.astype(np.float64)[np.broadcast_to(mask, x.shape)].reshape(-1, x.shape[-1])
    return kept.mean(0), kept.var(0)


def test_shards_with_unequal_masks_are_pooled_by_count():
    """Flax 0.12.8 averages the means of the shards."""
    x, mask = unequal_shards()
    mean, var = kept_moments(x, mask)
    _, ours = trained(SHELLS["linen"][0], x, mask, by_shard_map)
    np.testing.assert_allclose(ours["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(ours["var"], var, rtol=1e-6)


def test_a_shard_that_is_fully_masked_is_left_out():
    """Flax 0.12.8 gives NaN on every shard."""
    x, mask = unequal_shards()
    mask[3] = False
    mean, var = kept_moments(x, mask)
    ours_y, ours = trained(SHELLS["linen"][0], x, mask, by_shard_map)
    np.testing.assert_allclose(ours["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(ours["var"], var, rtol=1e-6)
    np.testing.assert_allclose(ours_y, (x - mean) / np.sqrt(var + 1e-5), rtol=1e-5, atol=1e-5)


def test_groups_of_shards_pool_their_statistics_under_the_varying_axis_check():
    """Flax 0.12.8 asks for a collective that shard_map does not have."""
    x, groups = unequal_shards()[0], [[0, 1, 2, 3], [4, 5, 6, 7]]
    mask = np.ones((DEVICES, 4, 1), bool)
    y, stats = trained(SHELLS["linen"][0], x, mask, by_shard_map, axis_index_groups=groups)
    mean, var = kept_moments(x, mask)
    np.testing.assert_allclose(stats["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(stats["var"], var, rtol=1e-6)
    for group in groups:
        mean, var = kept_moments(x[group], mask[group])
        np.testing.assert_allclose(y[np.array(group)], (x[group] - mean) / np.sqrt(var + 1e-5), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_fully_masked_batch_leaves_the_averages_alone(shell):
    """Flax 0.12.8 puts NaN into them."""
    x = inputs(shape=(6, 3))
    ours, _ = pair(shell, x)
    before, nothing = ours.state, jnp.zeros((6, 1), bool)
    y = train(ours, x, nothing)
    assert_trees_all_equal(ours.state, before)
    assert np.all(np.isfinite(y))


@pytest.mark.parametrize("shell", SHELLS)
def test_outputs_are_exact_at_a_mean_of_ten_thousand_deviations(shell):
    """Flax 0.12.8 squares before it subtracts, and errs by 200 and more."""
    x = np.asarray(jax.random.normal(jax.random.key(0), (4096, 3)) + 1e4, np.float32)
    wide = x.astype(np.float64)
    y = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    ours, _ = pair(shell, x)
    np.testing.assert_allclose(train(ours, x), y, rtol=0, atol=2e-6)


def test_nnx_does_not_round_running_statistics_to_the_output_dtype():
    """Flax 0.12.8 rounds the running mean to bfloat16 before it subtracts it, and errs by .3 and more."""
    x = jnp.asarray(np.asarray(jax.random.normal(jax.random.key(0), (256, 3)) + 333), jnp.float32)
    ours, _ = pair("nnx", x, dtype=jnp.bfloat16, momentum=0.0)
    train(ours, x)
    assert np.max(np.abs(np.mean(np.asarray(evaluate(ours, x), np.float64), 0))) < 0.01


def test_nnx_keeps_the_imaginary_part_of_the_running_mean():
    """Flax 0.12.8 writes the complex mean into a float32 variable."""
    x = inputs(jnp.complex64)
    ours, _ = pair("nnx", x, momentum=0.0)
    train(ours, x)
    np.testing.assert_allclose(ours.state["mean"], np.asarray(x, np.complex128).mean((0, 1, 2)), rtol=1e-6)
