"""Shards that share statistics, all of them or in groups: outputs, statistics and gradients are those of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from normalizers import AGAIN, CASES, QUICK, SHAPE, draw, ready

from jaxbn import variants

SHARDS = 4
GROUPS = ((0, 2), (1, 3))
WHERE = (np.random.default_rng(3).uniform(size=(SHAPE[0], 1, 1)) < 0.8) & (np.arange(SHAPE[0])[:, None, None] != 4)
# Sums of 24 terms of size 10 in another order; whitening multiplies what that rounds by the condition number.
ROUNDED = {"rtol": 2e-5, "atol": 2e-5}
SPLIT = [name for name, case in CASES.items() if case.splits]


def compiling(names, slow=AGAIN):
    marked = [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in names]
    return pytest.mark.parametrize("name", marked)


def mesh_of(shards):
    return jax.make_mesh((shards,), ("shards",), axis_types=(AxisType.Auto,), devices=jax.devices()[:shards])


def by_example(name):
    """Arguments with one entry an example, and the others."""
    arguments = CASES[name].arguments
    per_example = {n: np.asarray(v) for n, v in arguments.items() if np.ndim(v)}
    return per_example, {n: v for n, v in arguments.items() if n not in per_example}


def trained(norm, variables, x, batch):
    """y, batch_stats and the gradients by params and x, of one shard or of all."""

    def loss(params, x):
        y, stats = norm.apply({**variables, "params": params}, x, train=True, **batch)
        return jnp.sum(jnp.where(batch.get("where", True), jnp.sin(y), 0)), (y, stats)

    gradients, (y, stats) = jax.grad(loss, (0, 1), has_aux=True)(variables["params"], x)
    return y, stats, gradients


@functools.cache
def observed(name, groups):
    """What the shards make of the batch and what one device does, masked and not; all in one program."""
    alone, variables, x = ready(name).norm, ready(name).variables, draw()
    together = CASES[name].build("shards", **({} if groups is None else {"axis_index_groups": groups}))
    per_example, rest = by_example(name)
    part, everywhere = jax.P("shards"), jax.P()

    def sharded(masks):
        def shard(variables, x, per_example):
            return trained(together, variables, x, per_example | rest)

        specs = dict(in_specs=(everywhere, part, part), out_specs=(part, everywhere, (everywhere, part)))
        return jax.shard_map(shard, mesh=mesh_of(SHARDS), **specs)(variables, x, per_example | masks)

    def on_one_device(masks):
        batch = per_example | masks
        if groups is None:
            return trained(alone, variables, x, batch | rest)
        # The running statistics are those of the whole batch, whoever shares mean and variance.
        stats = alone.apply(variables, x, train=True, **batch, **rest)[1]
        index = [np.concatenate([np.arange(2 * shard, 2 * shard + 2) for shard in group]) for group in groups]
        parts = [trained(alone, variables, x[i], {n: v[i] for n, v in batch.items()} | rest) for i in index]
        order = np.argsort(np.concatenate(index))
        y, dx = (jnp.concatenate(values)[order] for values in ([p[0] for p in parts], [p[2][1] for p in parts]))
        return y, stats, (jax.tree.map(lambda *v: sum(v), *(p[2][0] for p in parts)), dx)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def program():
        return [(sharded(masks), on_one_device(masks)) for masks in ({}, {"where": WHERE})]

    return program()


def assert_alike(name, groups, masked):
    shards, one = observed(name, groups)[masked]
    tolerance = {"rtol": 2e-4, "atol": 2e-4} if "whitening" in name else ROUNDED
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), shards, one)


@compiling(SPLIT)
@pytest.mark.parametrize("masked", [False, True])
def test_shards_equal_one_device(name, masked):
    assert_alike(name, None, masked)


GROUPED = [name for name in SPLIT if CASES[name].takes_groups]


@compiling(GROUPED, slow=set(GROUPED) - {"batch_norm", "batch_renorm", "whitening_norm"})
@pytest.mark.parametrize("masked", [False, True])
def test_groups_of_shards_equal_one_device_each_and_pool_running_statistics(name, masked):
    assert_alike(name, GROUPS, masked)


BY_POSITION = {
    "layer_norm": functools.partial(variants.layer_norm, axis=(1, 2), feature_axis=-1),
    "instance_norm": variants.instance_norm,
    "group_norm": functools.partial(variants.group_norm, num_groups=2),
    "rms_norm": functools.partial(variants.rms_norm, axis=(1, 2), feature_axis=-1),
    "filter_response_norm": functools.partial(variants.filter_response_norm, learn_epsilon=True),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", BY_POSITION)
def test_shards_of_positions_equal_one_device(name, masked):
    alone, together, x = BY_POSITION[name](), BY_POSITION[name](axis_name="shards"), draw(0, (3, 8, 4))
    variables = alone.init(jax.random.key(0), x)
    batch = {"where": np.random.default_rng(4).uniform(size=(3, 8, 1)) < 0.7} if masked else {}
    part, everywhere = jax.P(None, "shards"), jax.P()
    specs = dict(in_specs=(everywhere, part, part), out_specs=(part, everywhere, (everywhere, part)))
    mapped = jax.shard_map(functools.partial(trained, together), mesh=mesh_of(SHARDS), **specs)
    program = jax.jit(
        lambda: (mapped(variables, x, batch), trained(alone, variables, x, batch)), compiler_options=QUICK
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, **ROUNDED), *program())
