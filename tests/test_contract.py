"""What every normalizer promises, whichever it is: the list is in `normalizers.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
from flax import nnx
from normalizers import AGAIN, CASES, KEY, QUICK, SHAPE, draw, ready

import jaxbn.linen
import jaxbn.nnx

every = pytest.mark.parametrize("name", CASES)


def compiling(names):
    """Parametrized over names; what compiles a program for a second configuration of the same normalizer is slow."""
    marked = [pytest.param(name, marks=pytest.mark.slow if name in AGAIN else ()) for name in names]
    return pytest.mark.parametrize("name", marked)


run = compiling(CASES)
# Programs that differ in the order of their sums: a few roundings of float32 of numbers of size 10.
ROUNDED = {"rtol": 1e-5, "atol": 1e-5}


def signature(tree):
    """Structure, shapes and dtypes."""
    return jax.tree.map(lambda v: (jnp.shape(v), jnp.result_type(v)), tree)


def traced(name, x, train, variables=None):
    """What apply would return, without running it."""
    r = ready(name)
    return jax.eval_shape(
        lambda v, x, a: r.norm.apply(v, x, train=train, **a), variables or r.variables, x, r.arguments
    )


def assert_trees_equal(actual, expected, **tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    compare = functools.partial(np.testing.assert_allclose, **tolerance) if tolerance else np.testing.assert_array_equal
    jax.tree.map(compare, actual, expected)


@every
def test_output_and_statistics_have_the_same_structure_in_both_modes(name):
    variables = ready(name).variables
    assert set(variables) == {"params", "batch_stats"}
    for train in (True, False):
        y, batch_stats = traced(name, draw(), train)
        assert (y.shape, y.dtype) == (SHAPE, jnp.float32)
        assert signature(batch_stats) == signature(variables["batch_stats"])


@every
def test_variables_can_be_made_from_a_shape_alone(name):
    norm = ready(name).norm
    assert_trees_equal(norm.init(KEY, jax.ShapeDtypeStruct(SHAPE, jnp.float32)), norm.init(KEY, draw()))


@every
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_in_gives_low_precision_out_and_float32_statistics(name, dtype):
    r, x = ready(name), draw().astype(dtype)
    variables = jax.eval_shape(r.norm.init, KEY, x)
    for train in (True, False):
        y, batch_stats = traced(name, x, train, variables)
        assert y.dtype == dtype
        assert {v.dtype for v in jax.tree.leaves(batch_stats)} <= {jnp.dtype("float32"), jnp.dtype("int32")}


WHERE = np.arange(SHAPE[0])[:, None, None] < 6
# Whether the running statistics normalize, and whether they move.
SWITCHES = [(use_running, update) for use_running in (False, True) for update in (False, True)]
LIKE_X = jax.ShapeDtypeStruct(SHAPE, jnp.float32)


@functools.cache
def observed(name):
    """All ways to call a normalizer, in one program: one compilation is cheaper than eight."""
    r, case = ready(name), CASES[name]
    variables = {n: v for n, v in r.variables.items() if jax.tree.leaves(v)}
    module = jaxbn.linen.Norm(r.norm)
    graph, state = nnx.split(in_nnx(name))
    norm, (per_example, rest) = case.build("shards"), _by_example(r.arguments)

    def train(batch_stats, x, **batch):
        variables = {"params": r.variables["params"], "batch_stats": batch_stats}
        return r.norm.apply(variables, x, train=True, **r.arguments, **batch)

    def switched(x, use_running, update):
        return r.norm.apply(r.variables, x, train=not update, use_running=use_running, update=update, **r.arguments)

    def linen(x, use_running, update):
        arguments = dict(use_running_average=use_running, update=update, **r.arguments)
        y, moved = module.apply(variables, x, mutable="batch_stats", **arguments)
        return y, moved.get("batch_stats", {})

    def by_nnx(state, x, use_running, update):
        module = nnx.merge(graph, state, copy=True)
        y = module(x, use_running_average=use_running, update=update, **r.arguments)
        return y, jax.tree.map(lambda v: v[...], module.batch_stats, is_leaf=_is_variable)

    def shard(x, arguments):
        return norm.apply(r.variables, x, train=True, **arguments, **rest)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def program(state, x, other):
        stats, xs = r.variables["batch_stats"], jnp.stack([x, other])
        parts = jax.tree.map(lambda v: v.reshape(2, -1, *v.shape[1:]), (x, per_example))
        masked = lambda x: train(stats, x, where=WHERE)
        return {
            "evaluated": r.norm.apply(r.variables, x, train=False, **r.arguments),
            "scanned": jax.lax.scan(lambda s, x: train(s, x)[::-1], stats, xs),
            "mapped": jax.vmap(train, (None, 0))(stats, xs),
            "masked": jax.lax.map(masked, jnp.stack([x, jnp.where(WHERE, x, jnp.nan)])),
            "weighted": train(stats, x, weights=WHERE.astype(np.int32)),
            "sharded": jax.vmap(shard, axis_name="shards")(*parts),
            "switched": [switched(x, *both) for both in SWITCHES],
            "linen": [linen(x, *both) for both in SWITCHES],
            "nnx": [by_nnx(state, x, *both) for both in SWITCHES],
        }

    return program(state, draw(), draw(1))


def in_nnx(name):
    """The normalizer in nnx's shell, with the variables that it has elsewhere in these tests."""
    module = jaxbn.nnx.Norm(ready(name).norm, LIKE_X, rngs=nnx.Rngs(0))
    nnx.update({"params": module.params, "batch_stats": module.batch_stats}, ready(name).variables)
    return module


def trained(name):
    r = ready(name)
    return r.train(r.variables, draw(), **r.arguments)


@run
def test_evaluation_returns_the_statistics_as_they_came(name):
    y, batch_stats = observed(name)["evaluated"]
    assert np.all(np.isfinite(y))
    assert_trees_equal(batch_stats, ready(name).variables["batch_stats"])


@run
def test_second_step_takes_the_statistics_of_the_first_without_a_new_trace(name):
    r, (_, first) = ready(name), trained(name)
    y, second = r.train({"params": r.variables["params"], "batch_stats": first}, draw(1), **r.arguments)
    assert signature(second) == signature(first)
    assert np.all(np.isfinite(y))
    assert r.traces.count("train") == 1


@run
def test_statistics_are_a_scan_carry(name):
    r, (_, first) = ready(name), trained(name)
    y, second = r.train({"params": r.variables["params"], "batch_stats": first}, draw(1), **r.arguments)
    carry, ys = observed(name)["scanned"]
    np.testing.assert_allclose(ys[1], y, **ROUNDED)
    assert_trees_equal(carry, second, **ROUNDED)


@run
def test_what_the_mask_leaves_out_counts_for_nothing(name):
    y, batch_stats = observed(name)["masked"]
    np.testing.assert_array_equal(y[1, :6], y[0, :6])
    jax.tree.map(lambda v: np.testing.assert_array_equal(v[1], v[0]), batch_stats)


@run
def test_integer_weights_of_one_and_zero_are_a_mask(name):
    with_mask = jax.tree.map(lambda v: v[0], observed(name)["masked"])
    assert_trees_equal(observed(name)["weighted"], with_mask, **ROUNDED)


@run
def test_mapping_over_runs_equals_a_run_alone(name):
    first = jax.tree.map(lambda v: v[0], observed(name)["mapped"])
    assert_trees_equal(first, trained(name), **ROUNDED)


@compiling([name for name, case in CASES.items() if case.splits])
def test_shards_that_share_statistics_give_what_the_whole_batch_gives(name):
    y, batch_stats = observed(name)["sharded"]
    whole_y, whole_stats = trained(name)
    np.testing.assert_allclose(y.reshape(SHAPE), whole_y, **ROUNDED)
    assert_trees_equal(batch_stats, jax.tree.map(lambda v: jnp.stack([v, v]), whole_stats), **ROUNDED)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.splits])
def test_shard_map_knows_that_statistics_are_equal_on_all_devices_and_gradients_too(name):
    # Traced with the check of varying axes on, which refuses an output said to be equal that may not be.
    r, norm, auto = ready(name), CASES[name].build("shards"), (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("shards",), axis_types=auto, devices=jax.devices()[:2])
    per_example, rest = _by_example(r.arguments)

    def shard(params, x, arguments):
        def loss(params):
            variables = {"params": params, "batch_stats": r.variables["batch_stats"]}
            y, batch_stats = norm.apply(variables, x, train=True, **arguments, **rest)
            return jnp.sum(y**2), (y, batch_stats)

        return jax.grad(loss, has_aux=True)(params)

    by_shard = jax.P("shards")
    specs = dict(in_specs=(jax.P(), by_shard, by_shard), out_specs=(jax.P(), (by_shard, jax.P())))
    mapped = jax.shard_map(shard, mesh=mesh, **specs)
    grads, (y, batch_stats) = jax.eval_shape(mapped, r.variables["params"], draw(), per_example)
    assert y.shape == SHAPE
    assert signature(grads) == signature(r.variables["params"])
    assert signature(batch_stats) == signature(r.variables["batch_stats"])


@every
def test_linen_shell_has_the_variables_of_the_normalizer(name):
    r, module = ready(name), jaxbn.linen.Norm(ready(name).norm)
    made = jax.eval_shape(functools.partial(module.init, use_running_average=True, **r.arguments), KEY, draw())
    assert signature(dict(made)) == signature(_without_empty(r.variables))


@every
def test_nnx_shell_has_the_variables_of_the_normalizer(name):
    module = jaxbn.nnx.Norm(ready(name).norm, LIKE_X, rngs=nnx.Rngs(0))
    trees = {"params": module.params, "batch_stats": module.batch_stats}
    assert signature(jax.tree.map(lambda v: v[...], trees, is_leaf=_is_variable)) == signature(ready(name).variables)


@run
@pytest.mark.parametrize("call", ["switched", "linen", "nnx"])
def test_what_normalizes_is_chosen_apart_from_what_moves_in_the_shells_too(name, call):
    by_batch, moved = trained(name)
    ys, stats = (by_batch, observed(name)["evaluated"][0]), (ready(name).variables["batch_stats"], moved)
    for (use_running, update), (y, after) in zip(SWITCHES, observed(name)[call], strict=True):
        np.testing.assert_allclose(y, ys[use_running], **ROUNDED)
        assert_trees_equal(after, stats[update], **(ROUNDED if update else {}))


@every
@pytest.mark.parametrize("switch", ["use_running", "update"])
def test_a_switch_that_is_not_a_bool_is_refused(name, switch):
    with pytest.raises(TypeError, match=f"{switch}=.*True or False"):
        jax.eval_shape(lambda s: ready(name).norm.apply(ready(name).variables, draw(), train=True, **{switch: s}), True)


@run
def test_derivatives_agree_with_each_other_and_with_differences(name):
    # In float64, where a difference over 2e-6 is right to some 1e-9 of the terms.
    with jax.enable_x64(True):
        r, case = ready(name), CASES[name]
        x, dx, dy = (jnp.asarray(np.asarray(draw(seed), np.float64)) for seed in (3, 4, 5))
        variables = jax.tree.map(_as_float64, r.variables)
        params, stats = variables["params"], variables["batch_stats"]
        dparams = jax.tree.map(lambda v: jnp.asarray(np.random.default_rng(6).normal(size=v.shape)), params)

        def loss(params, x):
            y, _ = r.norm.apply({"params": params, "batch_stats": stats}, x, train=True, **r.arguments)
            return jnp.sum(y * dy)

        def all_ways(point, direction):
            along = lambda step: loss(*jax.tree.map(lambda p, d: p + step * d, point, direction))
            forward = jax.jvp(loss, point, direction)[1]
            reverse = _along(direction, jax.grad(jax.checkpoint(loss), (0, 1))(*point))
            after, before = jax.lax.map(along, jnp.array([1e-6, -1e-6]))
            return forward, reverse, (after - before) / 2e-6

        program = jax.jit(all_ways, compiler_options=QUICK)
        forward, reverse, difference = program((params, x), (dparams, dx))
        np.testing.assert_allclose(reverse, forward, rtol=1e-9)
        if case.differentiates:
            np.testing.assert_allclose(forward, difference, rtol=1e-5, atol=1e-5)


def test_all_variables_come_back_from_a_checkpoint_bit_by_bit(tmp_path):
    # One checkpoint for all: to open one takes longer than to write them.
    saved = {f"case_{i}": _without_empty(ready(name).variables) for i, name in enumerate(CASES)}
    saved = {name: tree for name, tree in saved.items() if tree}
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "variables", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "variables", jax.tree.map(jnp.zeros_like, saved))
    assert signature(restored) == signature(saved)
    assert_trees_equal(restored, saved)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("identity", "frozen")])  # They have one mode.
def test_mode_that_is_not_a_bool_is_refused(name):
    with pytest.raises(TypeError, match="True or False"):
        traced(name, draw(), jnp.asarray(True))


@pytest.mark.parametrize("name", [name for name in CASES if name != "identity"])  # It computes nothing.
def test_integer_input_is_refused(name):
    with pytest.raises(TypeError, match="floating"):
        traced(name, draw().astype(jnp.int32), True)


@pytest.mark.parametrize("name", [name for name in CASES if name != "identity"])  # It has none and looks at none.
def test_params_that_init_did_not_make_are_refused(name):
    variables = ready(name).variables
    with pytest.raises(ValueError, match="params has"):
        traced(name, draw(), True, variables | {"params": variables["params"] | {"gamma": jnp.ones((2, 4))}})


@pytest.mark.parametrize("name", [name for name in CASES if name != "identity"])  # It takes any.
def test_x_of_other_features_than_init_saw_is_refused(name):
    with pytest.raises(ValueError, match=r"\(8, 5, 7\)"):
        traced(name, draw(0, (8, 5, 7)), True)


def _as_float64(v):
    return jnp.asarray(np.asarray(v, np.float64) if v.dtype == np.float32 else v)


def _along(direction, gradient):
    pairs = zip(jax.tree.leaves(direction), jax.tree.leaves(gradient), strict=True)
    return sum(jnp.vdot(a, b) for a, b in pairs)


def _by_example(arguments):
    """Arguments with one entry an example, and the others."""
    per_example = {name: np.asarray(v) for name, v in arguments.items() if np.ndim(v)}
    return per_example, {name: v for name, v in arguments.items() if name not in per_example}


def _is_variable(node):
    return isinstance(node, nnx.Variable)


def _without_empty(tree):
    return {name: v for name, v in tree.items() if jax.tree.leaves(v)}


@every
def test_init_takes_no_key_twice(name):
    with jax.debug_key_reuse(True):
        jax.jit(lambda key: CASES[name].build(None).init(key, LIKE_X))(jax.random.key(0))
