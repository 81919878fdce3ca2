"""Inputs sharded over meshes of explicit and automatic axes, under jit and shard_map: as on one device.

Explicit axes are what `jax.make_mesh` makes unless it is told otherwise. Arrays there carry their sharding in their
type, and what would move data between devices raises, so that a reshape inside a layer shows.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from normalizers import AGAIN, CASES, QUICK, in_training

KINDS = {"explicit": AxisType.Explicit, "automatic": AxisType.Auto}
# Of few features and many positions, which one of the layouts for CPUs puts beside each other, and of many features.
SHAPES = {"few features": (8, 4, 4, 4), "many features": (8, 2, 2, 64)}
# Mesh axes of each axis of x.
PLACES = {"batch": P("data"), "features": P(None, None, None, "model"), "both": P("data", None, None, "model")}
NAMES = [name for name in CASES if name not in AGAIN]
# Explicit axes and few features are where layouts for CPUs and a mesh can be at odds; the rest takes minutes.
PLACED = [
    pytest.param(shape, kind, marks=[] if (shape, kind) == ("few features", "explicit") else pytest.mark.slow)
    for shape in SHAPES
    for kind in KINDS
]


def close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        # The same sums in another order: some roundings of 6e-8, which the inverse roots of whitening enlarge.
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(np.linalg.norm(b) / np.sqrt(b.size), 1))


def program(norm):
    """y, moved statistics and the gradients of x and params of one training step."""

    def run(params, batch_stats, x, arguments):
        def loss(params, x):
            y, moved = norm.apply({"params": params, "batch_stats": batch_stats}, x, train=True, **arguments)
            return jnp.sum(y**3), (y, moved)

        gradients, (y, moved) = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return y, moved, gradients

    return run


def inputs(norm, shape):
    x = np.random.default_rng(0).normal(3.0, 2.0, shape).astype(np.float32)
    variables = in_training(norm, jnp.asarray(x))
    return variables["params"], variables["batch_stats"], x


def on_one_device(name, shape):
    case = CASES[name]
    params, batch_stats, x = inputs(norm := case.build(None), shape)
    return jax.jit(program(norm), compiler_options=QUICK)(params, batch_stats, x, dict(case.arguments))


@pytest.mark.parametrize(("shape", "kind"), PLACED)
@pytest.mark.parametrize("name", NAMES)
def test_sharded_over_the_batch_under_jit(name, shape, kind):
    case, shape = CASES[name], SHAPES[shape]
    mesh = jax.make_mesh((4,), ("data",), axis_types=(KINDS[kind],))
    params, batch_stats, x = inputs(norm := case.build(None), shape)
    x = jax.device_put(x, NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        found = jax.jit(program(norm), compiler_options=QUICK)(params, batch_stats, x, dict(case.arguments))
    close(found, on_one_device(name, shape))


@pytest.mark.parametrize("place", ["features", "both"])
@pytest.mark.parametrize(("shape", "kind"), PLACED)
@pytest.mark.parametrize("name", ["batch_norm", "batch_norm, debias", "batch_renorm", "mean_only_batch_norm"])
def test_sharded_over_the_features_under_jit(name, kind, shape, place):
    case, shape = CASES[name], SHAPES[shape]
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(KINDS[kind],) * 2)
    params, batch_stats, x = inputs(norm := case.build(None), shape)
    x = jax.device_put(x, NamedSharding(mesh, PLACES[place]))
    params, batch_stats = jax.tree.map(
        lambda v: jax.device_put(v, NamedSharding(mesh, P("model") if v.ndim else P())), (params, batch_stats)
    )
    with jax.set_mesh(mesh):
        found = jax.jit(program(norm), compiler_options=QUICK)(params, batch_stats, x, {})
    close(found, on_one_device(name, shape))


@pytest.mark.parametrize(("shape", "kind"), PLACED)
@pytest.mark.parametrize("name", [name for name in NAMES if CASES[name].splits and not CASES[name].arguments])
def test_sharded_over_the_batch_under_shard_map(name, shape, kind):
    case, shape = CASES[name], SHAPES[shape]
    mesh = jax.make_mesh((4,), ("data",), axis_types=(KINDS[kind],))
    norm = case.build("data")
    params, batch_stats, x = inputs(case.build(None), shape)

    def shard(params, batch_stats, x):
        return program(norm)(params, batch_stats, x, {})

    out = (P("data"), P(), (P(), P("data")))
    spread = jax.shard_map(shard, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=out)
    found = jax.jit(spread, compiler_options=QUICK)(
        params, batch_stats, jax.device_put(x, NamedSharding(mesh, P("data")))
    )
    close(found, on_one_device(name, shape))
