"""One answer, however the batch is spread: one table of scope, spread, mask and device count against a float64 oracle.

A case computes y, the gradients of x, scale and bias, and the running statistics. By default the cases are the fewest
found, by a greedy search, in which every scope meets every spread on every number of devices, and every mask each of
the three; `-m slow` runs the full product.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import assert_exact, reference

import jaxbn

BATCH, PIXELS, FEATURES, DECAY = 32, 4, 5, 0.75
RNG = np.random.default_rng(0)
SCALE = np.array([1.5, -0.7, 2.0, 0.3, 1.0], np.float32)
BIAS = np.array([0.0, 1.0, -2.0, 0.5, 0.0], np.float32)
# Examples drift, so that an average over shards of their variances would be far from the variance.
X = (RNG.normal(size=(BATCH, PIXELS, FEATURES)) + np.linspace(-3, 3, BATCH)[:, None, None]).astype(np.float32)
DY = RNG.normal(0.5, 1.0, X.shape).astype(np.float32)
EXAMPLE = np.arange(BATCH)[:, None, None]

# What batch_norm is given where axes have names. Shards hold 32, 16, 8 or 4 examples: a group of 16 or 8 is a part of a
# shard, a shard or several; one of 4 is at most a shard.
NAMED = {
    "whole": {"axis_name": "data"},
    "device": {"pool_axis_name": "data"},
    "ghosts of 4": {"axis_name": "data", "group_size": 4},
    "ghosts of 4, pooled": {"pool_axis_name": "data", "group_size": 4},
    "groups of 16": {"axis_name": "data", "group_size": 16},
    "interleaved groups": {"axis_name": "data"},  # and axis_index_groups
    # On a mesh of 2 hosts with the same number of chips each.
    "mesh axis": {"axis_name": "chip", "pool_axis_name": "host"},
    "groups of 8 along a mesh axis": {"axis_name": "chip", "pool_axis_name": "host", "group_size": 8},
    "groups of 8 along both mesh axes": {"axis_name": ("host", "chip"), "group_size": 8},
}
ON_HOSTS = ("mesh axis", "groups of 8 along a mesh axis", "groups of 8 along both mesh axes")
SPREADS = ("one", "jit", "shard_map", "pmap", "vmap")
MASKS = {
    "none": {},
    "far from zero": {},
    "where": {"where": RNG.uniform(size=(BATCH, PIXELS, 1)) > 0.4},
    "weights": {"weights": RNG.uniform(0.1, 3, (BATCH, 1, 1)).astype(np.float32)},
    "unequal counts": {"where": (EXAMPLE * 5) % BATCH <= EXAMPLE},
    # With 4 and 8 devices whole shards see nothing, and two of the ghost groups do not either.
    "empty shard": {"where": EXAMPLE >= 8, "weights": RNG.uniform(0.1, 3, (BATCH, 1, 1)).astype(np.float32)},
    # With 2 devices a shard, one of the groups of 16 and all chips of a host, however many devices make these.
    "empty half": {"where": EXAMPLE >= 16},
    "by feature": {
        "where": (EXAMPLE * (5 + 2 * np.arange(FEATURES))) % BATCH <= EXAMPLE,
        "weights": RNG.uniform(0.1, 3, (BATCH, PIXELS, FEATURES)).astype(np.float32),
    },
}
DEVICES = (1, 2, 4, 8)


def exists(scope, spread, mask, devices):
    if spread == "one" and devices > 1:
        return False
    if scope in ON_HOSTS:
        return spread in ("shard_map", "vmap") and devices > 1
    if scope == "interleaved groups":
        return spread in ("shard_map", "pmap", "vmap") and devices > 1
    return scope != "ghosts of 4, pooled" or spread in ("shard_map", "pmap", "vmap")


FULL = [case for case in itertools.product(NAMED, SPREADS, MASKS, DEVICES) if exists(*case)]


def few(cases):
    """Few cases with all the pairs of the given ones."""

    def held(case):
        return set(itertools.combinations(enumerate(case), 2))

    missing, chosen = set().union(*map(held, cases)), []
    while missing:
        chosen.append(max(cases, key=lambda case: len(held(case) & missing)))
        missing -= held(chosen[-1])
    return chosen


def groups(scope, devices):
    """Which examples share statistics: int [groups, examples]."""
    examples = np.arange(BATCH)
    if scope == "interleaved groups":
        return np.concatenate([examples.reshape(devices, -1)[i::2].reshape(1, -1) for i in range(2)])
    together = {"whole": BATCH, "device": BATCH // devices, "mesh axis": BATCH // 2}
    return examples.reshape(-1, NAMED[scope].get("group_size") or together[scope])


def normalizer(scope, spread, devices):
    if scope == "interleaved groups":
        every_other = [range(0, devices, 2), range(1, devices, 2)]
        return jaxbn.batch_norm(decay=DECAY, axis_index_groups=every_other, **NAMED[scope])
    if spread in ("shard_map", "pmap", "vmap"):
        return jaxbn.batch_norm(decay=DECAY, **NAMED[scope])
    return jaxbn.batch_norm(decay=DECAY, group_size=None if scope == "whole" else groups(scope, devices).shape[1])


def mesh_of(*shape, names=("data",)):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape), devices=devices)


def over_devices(spread, f, arrays, mesh):
    """Lift f(variables, *arrays [examples, ...]) -> (y, batch_stats), of so many arrays, over shards of them.

    By vmap for each axis of the mesh, by pmap for its only one.
    """
    if spread in ("one", "jit"):
        parts, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
        return lambda variables, *arrays: jax.jit(f, out_shardings=(parts, whole))(
            variables, *(jax.lax.with_sharding_constraint(v, parts) for v in arrays)
        )
    if spread == "shard_map":
        parts = P(mesh.axis_names)
        return lambda variables, *arrays: jax.shard_map(
            f, mesh=mesh, in_specs=(P(), *(parts for _ in arrays)), out_specs=(parts, P()), check_vma=True
        )(variables, *arrays)
    devices, lifted = mesh.devices, f
    for name, size in reversed(mesh.shape.items()):
        # With a length, names bind even where there is one shard.
        lift = partial(jax.pmap, devices=list(devices.flat)) if spread == "pmap" else partial(jax.vmap, axis_size=size)
        lifted = lift(lifted, axis_name=name, in_axes=(None, *(0,) * arrays))

    def together(variables, *arrays):
        shards = [v.reshape(*devices.shape, -1, *v.shape[1:]) for v in arrays]
        y, batch_stats = lifted(variables, *shards)
        return y.reshape(arrays[0].shape), jax.tree.map(lambda v: v.reshape(-1, v.shape[-1]), batch_stats)

    return together


def spread_out(scope, spread, mask, devices, x):
    """The oracle's entries by jaxbn, and the running statistics, [devices, features] where spread by pmap or vmap."""
    norm = normalizer(scope, spread, devices)
    names = list(MASKS[mask])

    def local(variables, x, *weighting):
        return norm.apply(variables, x, train=True, **dict(zip(names, weighting, strict=True)))

    mesh = mesh_of(2, devices // 2, names=("host", "chip")) if scope in ON_HOSTS else mesh_of(devices)
    lifted = over_devices(spread, local, 1 + len(names), mesh)
    variables = norm.init(jax.random.key(0), x)

    def all_at_once(params, x, dy, *weighting):
        def of(params, x):
            return lifted({**variables, "params": params}, x, *weighting)

        y, pull, batch_stats = jax.vjp(of, params, x, has_aux=True)
        dparams, dx = pull(dy)
        return {"y": y, "dx": dx, "dscale": dparams["scale"], "dbias": dparams["bias"]}, batch_stats

    arrays = [np.broadcast_to(MASKS[mask][name], (BATCH, *MASKS[mask][name].shape[1:])) for name in names]
    params, *arrays = jax.tree.map(jnp.asarray, [{"scale": SCALE, "bias": BIAS}, x, DY, *arrays])
    run = all_at_once if spread == "pmap" else jax.jit(all_at_once)
    return run(params, *arrays)


def check(scope, spread, mask, devices):
    x = X + np.float32(1e4) if mask == "far from zero" else X
    actual, batch_stats = spread_out(scope, spread, mask, devices, x)
    actual = {name: np.asarray(value) for name, value in actual.items()}
    total, size = {"dscale": 0, "dbias": 0}, {"dscale": 0, "dbias": 0}
    for rows in groups(scope, devices):
        weighting = {name: value[rows] for name, value in MASKS[mask].items()}
        exact, sizes = reference(x[rows], DY[rows], SCALE, BIAS, axis=(0, 1), **weighting)
        assert_exact({name: actual[name][rows] for name in ("y", "dx")}, exact, sizes, axis=(0, 1))
        for name in total:
            total[name], size[name] = total[name] + getattr(exact, name), size[name] + getattr(sizes, name)
    exact, sizes = reference(x, axis=(0, 1), **MASKS[mask])
    running = {n: (np.asarray(v) - DECAY * (n == "var")) / (1 - DECAY) for n, v in batch_stats.items()}
    if spread in ("pmap", "vmap"):
        for value in jax.tree.leaves(batch_stats):
            np.testing.assert_array_equal(value, np.broadcast_to(value[:1], value.shape))
        running = {name: value[0] for name, value in running.items()}
    assert_exact(
        {"dscale": actual["dscale"], "dbias": actual["dbias"]},
        exact._replace(**total),
        sizes._replace(**size),
        axis=(0, 1),
    )
    # The old variance of 1 is there in the stored one too, and its rounding with it.
    assert_exact(running, exact, sizes._replace(var=sizes.var + DECAY / (1 - DECAY)), axis=(0, 1))


@pytest.mark.parametrize(("scope", "spread", "mask", "devices"), few(FULL))
def test_spread_out_equals_the_oracle(scope, spread, mask, devices):
    check(scope, spread, mask, devices)


@pytest.mark.slow
@pytest.mark.parametrize(("scope", "spread", "mask", "devices"), FULL)
def test_spread_out_equals_the_oracle_in_every_case(scope, spread, mask, devices):
    check(scope, spread, mask, devices)
