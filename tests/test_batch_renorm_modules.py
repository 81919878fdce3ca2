"""Batch renormalization as linen and nnx modules with Flax's arguments, and the checkpoints of CrossQ."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal
from flax import nnx

import jaxbn
from jaxbn import convert

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(1, 2, (3, 16, 4)).astype(np.float32)  # Three batches.
ARGUMENTS = {
    "CrossQ": dict(r_max=3.0, d_max=5.0, warmup_steps=1),
    "own": dict(decay=0.7, epsilon=1e-2, r_max=1.1, d_max=0.2, use_bias=False, activation=jnp.tanh),
    "plain average": dict(decay=None, feature_axis=(-1,), r_max=1.5, d_max=0.5),
}
CASES = pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)


def named(arguments):
    """The arguments of `batch_renorm` as Flax calls them."""
    names = {"decay": "momentum", "feature_axis": "axis"}
    return {names.get(name, name): value for name, value in arguments.items()}


def followed(step, variables):
    """Outputs in training on the batches, one after the other, and the variables after them."""
    outputs = []
    for x in X:
        y, batch_stats = jax.jit(step)(variables, x)
        variables = {**variables, "batch_stats": batch_stats}
        outputs.append(y)
    return outputs, variables


def by_function(arguments):
    norm = jaxbn.batch_renorm(**arguments)
    return followed(partial(norm.apply, train=True), norm.init(KEY, X[0]))


@CASES
def test_linen_module_is_the_function(arguments):
    module = jaxbn.linen.BatchRenorm(use_running_average=False, **named(arguments))

    def step(variables, x):
        y, moved = module.apply(variables, x, mutable=["batch_stats"])
        return y, moved["batch_stats"]

    start = module.init(KEY, X[0])
    assert_trees_all_equal(start, jaxbn.batch_renorm(**arguments).init(KEY, X[0]))
    assert_trees_all_close(followed(step, start), by_function(arguments), rtol=1e-6, atol=1e-6)


@CASES
def test_nnx_module_is_the_function(arguments):
    module, outputs = jaxbn.nnx.BatchRenorm(4, rngs=nnx.Rngs(0), **named(arguments)), []
    for x in X:
        outputs.append(nnx.jit(lambda module, x: module(x))(module, x))
    expected, variables = by_function(arguments)
    assert_trees_all_close(outputs, expected, rtol=1e-6, atol=1e-6)
    held = nnx.to_pure_dict(nnx.state(module))
    held = {name: value for name, value in held.items() if value is not None}
    assert_trees_all_close(held, variables["params"] | variables["batch_stats"], rtol=1e-6, atol=1e-6)
    module.eval()
    evaluated = jaxbn.batch_renorm(**arguments).apply(variables, X[0], train=False)[0]
    np.testing.assert_allclose(module(X[0]), evaluated, rtol=1e-5, atol=1e-6)


def test_initialization_normalizes_by_the_batch_without_its_axis():
    module = jaxbn.linen.BatchRenorm(use_running_average=False, axis_name="data", r_max=1.1, d_max=0.1)
    y, variables = module.init_with_output(KEY, X[0])
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-6)
    assert variables["batch_stats"]["step"] == 0


def test_low_precision_is_promoted_as_flax_promotes():
    x = jnp.asarray(X[0], jnp.bfloat16)
    for dtype, expected in ((None, jnp.float32), (jnp.bfloat16, jnp.bfloat16)):
        module = jaxbn.linen.BatchRenorm(use_running_average=False, dtype=dtype)
        assert module.init_with_output(KEY, x)[0].dtype == expected
        assert jaxbn.nnx.BatchRenorm(4, dtype=dtype, rngs=nnx.Rngs(0))(x).dtype == expected


def test_limits_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"r_max=0\.5; expected at least 1"):
        jaxbn.nnx.BatchRenorm(4, rngs=nnx.Rngs(0), r_max=0.5)


def test_nnx_mode_missing_in_both_raises():
    with pytest.raises(ValueError, match="use_running_average is None in the module and in the call"):
        jaxbn.nnx.BatchRenorm(4, use_running_average=None, rngs=nnx.Rngs(0))(X[0])


def test_data_statistics_are_recorded_through_the_module():
    module = jaxbn.linen.BatchRenorm(use_running_average=False)
    apply = jax.jit(lambda v, x: module.apply(v, x, mutable=["batch_stats"])[1]["batch_stats"])
    stats = jaxbn.population_statistics(apply, module.init(KEY, X[0]), list(X))
    np.testing.assert_allclose(stats["mean"], X.mean((0, 1)), rtol=1e-5)


# CrossQ in SBX


def crossq_layer(variables, x, warm_up_steps=100_000, momentum=0.99, epsilon=1e-3):
    """SBX's layer in training, from its description: y, and batch_stats under its names."""
    params, stats = variables["params"], variables["batch_stats"]
    mean, var = x.mean(0), x.var(0)
    running_std = np.sqrt(stats["var"] + epsilon)
    r = np.clip(np.sqrt(var + epsilon) / running_std, 1 / stats["r_max"], stats["r_max"])
    d = np.clip((mean - stats["mean"]) / running_std, -stats["d_max"], stats["d_max"])
    warm = stats["steps"] >= warm_up_steps
    by_mean, by_var = (mean - d * np.sqrt(var) / r, var / r**2) if warm else (mean, var)
    y = params["scale"] * (x - by_mean) / np.sqrt(by_var + epsilon) + params["bias"]
    new = {n: momentum * stats[n] + (1 - momentum) * v for n, v in {"mean": mean, "var": var}.items()}
    return y, {**stats, **new, "steps": stats["steps"] + 1}


def crossq_variables(steps=0):
    draw = np.random.default_rng(1).uniform(0.5, 1.5, (4, 4)).astype(np.float32)
    stats = {"mean": draw[0], "var": 4 * draw[1], "r_max": 3, "d_max": 5, "steps": steps}
    return {"params": {"scale": draw[2], "bias": draw[3]}, "batch_stats": stats}


@pytest.mark.parametrize(("steps", "tolerance"), [(0, 1e-5), (100_000, 1e-3)], ids=["warming up", "warm"])
def test_crossq_checkpoints_train_on_as_in_sbx(steps, tolerance):
    """Once warm, epsilon = 1e-3 of a variance of about 4 is added in another place."""
    theirs = crossq_variables(steps)
    norm = jaxbn.batch_renorm(**convert.arguments_from_crossq(theirs))
    ours = convert.from_crossq(theirs)
    with jax.numpy_rank_promotion("allow"):
        y, stats = norm.apply(ours, X[0], train=True)
        expected, moved = crossq_layer(theirs, X[0])
    np.testing.assert_allclose(y, expected, rtol=tolerance, atol=tolerance)
    moved = convert.from_crossq({"params": {}, "batch_stats": moved})["batch_stats"]
    assert_trees_all_close(stats, moved, rtol=1e-5, atol=1e-6)


class Critic(nn.Module):
    """Two layers, mapped over critics as in SBX."""

    @nn.compact
    def __call__(self, x, train):
        for _ in range(2):
            limits = dict(r_max=3.0, d_max=5.0, warmup_steps=100_000)
            x = jaxbn.linen.BatchRenorm(use_running_average=not train, **limits)(nn.Dense(4)(x))
        return x


def test_networks_of_mapped_critics_go_there_and_back():
    axes = dict(variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, in_axes=None)
    critics = nn.vmap(Critic, **axes, axis_size=2)()
    variables = jax.jit(critics.init, static_argnums=2)(KEY, X[0], False)
    theirs = convert.to_crossq(variables)
    assert set(theirs["batch_stats"]["BatchRenorm_0"]) == {"mean", "var", "steps", "r_max", "d_max"}
    assert theirs["batch_stats"]["BatchRenorm_0"]["steps"].shape == (2,)
    assert convert.arguments_from_crossq(theirs) == dict(
        decay=0.99, epsilon=1e-3, warmup_steps=100_000, r_max=3.0, d_max=5.0
    )
    assert_trees_all_equal(convert.from_crossq(theirs), variables)


def test_variables_without_such_layers_are_refused():
    plain = {"params": {}, "batch_stats": {"bn": {"mean": np.zeros(2), "var": np.ones(2)}}}
    for convert_one in (convert.from_crossq, convert.to_crossq, convert.arguments_from_crossq):
        with pytest.raises(ValueError, match="bn/mean"):
            convert_one(plain)


def test_layers_of_different_limits_have_no_common_arguments():
    stats = {name: crossq_variables()["batch_stats"] | {"r_max": limit} for name, limit in (("a", 3), ("b", 2))}
    with pytest.raises(ValueError, match="expected the same in all of them"):
        convert.arguments_from_crossq({"batch_stats": stats})
