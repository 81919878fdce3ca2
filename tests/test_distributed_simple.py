"""One answer, however the batch is spread: eight shards against the whole batch in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import BOUND, assert_exact, reference

from jaxbn import Moments, batch_norm, moments

SHARDS, LOCAL, FEATURES, DECAY = 8, 4, 3, 0.75
KEY = jax.random.key(0)
SCALE, BIAS = np.array([1.5, -0.7, 2.0], np.float32), np.array([0.0, 1.0, -0.5], np.float32)
RNG = np.random.default_rng(0)  # For the two arrays below, and nothing else.
DY = RNG.normal(0.5, 1.0, (SHARDS, LOCAL, FEATURES)).astype(np.float32)
# Shards whose values differ in place: an average of variances would be far from the variance.
X = (RNG.normal(size=(SHARDS, LOCAL, FEATURES)) + np.linspace(-3, 3, SHARDS)[:, None, None]).astype(np.float32)
# From none to all of a shard's rows, in another order.
UNEQUAL = np.arange(LOCAL)[None, :, None] < np.array([4, 0, 1, 3, 2, 4, 1, 4])[:, None, None]


def mesh(shape=(SHARDS,), names=("data",)):
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


def shard_map(f):
    """Lift f(variables, x, where) -> (y, stats) over leading axis `data` by shard_map, its varying-axis check on."""

    def local(variables, x, where):
        y, stats = f(variables, x[0], where[0])
        return y[None], stats

    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": (P("data"), P())}
    return jax.jit(jax.shard_map(local, mesh=mesh(), check_vma=True, **specs))


def stacked(mapped):
    return lambda *arguments: (lambda y, stats: (y, Copies(stats)))(*mapped(*arguments))


class Copies(dict):
    """The shards' statistics along a leading axis, where shard_map has proved that there is one value."""


jax.tree_util.register_pytree_node(
    Copies, lambda copies: (tuple(copies.values()), tuple(copies)), lambda names, v: Copies(zip(names, v, strict=True))
)


def one(stats):
    """The one copy of the statistics, once all shards' are found equal."""
    if not isinstance(stats, Copies):
        return stats
    for value in stats.values():
        np.testing.assert_array_equal(value, np.broadcast_to(value[:1], value.shape))
    return {name: value[0] for name, value in stats.items()}


SPREADS = {
    "shard_map": shard_map,
    "pmap": lambda f: stacked(jax.pmap(f, axis_name="data", in_axes=(None, 0, 0))),
    "vmap": lambda f: stacked(jax.vmap(f, axis_name="data", in_axes=(None, 0, 0))),
}
MASKS = {"all count": np.ones_like(UNEQUAL), "unequal, one shard empty": UNEQUAL}


def variables_of(norm):
    variables = norm.init(KEY, X[0])
    return {**variables, "params": {"scale": jnp.asarray(SCALE), "bias": jnp.asarray(BIAS)}}


def flat(v):
    return np.asarray(v).reshape(-1, v.shape[-1])


def measure(norm, spread, x, where):
    """Everything that training gives for a batch spread over the shards, with the gradients taken from outside."""
    variables = variables_of(norm)
    run = SPREADS[spread](lambda v, x, where: norm.apply(v, x, train=True, where=where))

    @jax.jit
    def everything(params, x, dy):
        y, vjp, stats = jax.vjp(lambda p, x: run({**variables, "params": p}, x, where), params, x, has_aux=True)
        dparams, dx = vjp(dy)
        return {"y": y, "dx": dx, "dscale": dparams["scale"], "dbias": dparams["bias"]}, stats

    actual, stats = everything(variables["params"], x, DY)
    return actual, one(stats)


@pytest.mark.parametrize(("mask", "offset"), [("all count", 0.0), ("unequal, one shard empty", 1e5)])
@pytest.mark.parametrize("spread", SPREADS)
def test_shards_equal_the_whole_batch(spread, mask, offset):
    x, where = (X + offset).astype(np.float32), MASKS[mask]
    actual, stats = measure(batch_norm(axis_name="data", decay=DECAY), spread, x, where)
    actual |= {"y": flat(actual["y"]), "dx": flat(actual["dx"])}
    exact, sizes = reference(flat(x), flat(DY), SCALE, BIAS, axis=0, where=flat(where))
    assert_exact(actual, exact, sizes, axis=0)
    np.testing.assert_allclose(stats["mean"], (1 - DECAY) * exact.mean, rtol=BOUND, atol=BOUND)
    np.testing.assert_allclose(stats["var"], DECAY + (1 - DECAY) * exact.var, rtol=BOUND)


@pytest.mark.parametrize("spread", SPREADS)
def test_groups_of_shards_share_within_the_group_and_pool_their_running_statistics(spread):
    groups = [[0, 1, 2, 3], [4, 5, 6, 7]]
    norm = batch_norm(axis_name="data", axis_index_groups=groups, decay=0.0)
    actual, stats = measure(norm, spread, X, UNEQUAL)
    for group in groups:
        x, dy, where = (flat(v[np.array(group)]) for v in (X, DY, UNEQUAL))
        exact, sizes = reference(x, dy, SCALE, BIAS, axis=0, where=where)
        assert_exact({name: flat(actual[name][np.array(group)]) for name in ("y", "dx")}, exact, sizes, axis=0)
    whole, sizes = reference(flat(X), axis=0, where=flat(UNEQUAL))
    assert_exact({name: stats[name] for name in ("mean", "var")}, whole, sizes, axis=0)


@pytest.mark.xfail(
    reason="JAX calls the derivative rule of a staged custom_jvp when vmap's axis is bound no longer",
    raises=ValueError,
    strict=True,
)
def test_gradient_of_a_jitted_vmap_with_an_axis_name():
    norm = batch_norm(axis_name="data")
    variables = variables_of(norm)
    run = jax.jit(jax.vmap(lambda x: norm.apply(variables, x, train=True)[0], axis_name="data"))
    jax.grad(lambda x: jnp.sum(run(x) * DY))(X)


@pytest.mark.parametrize("spread", ["shard_map", "vmap"])
def test_all_shards_empty_changes_nothing_and_is_finite(spread):
    norm = batch_norm(axis_name="data")
    variables = variables_of(norm)
    run = SPREADS[spread](lambda v, x, where: norm.apply(v, x, train=True, where=where))
    y, stats = jax.jit(run)(variables, X, np.zeros_like(UNEQUAL))
    assert np.all(np.isfinite(y))
    for name, value in one(stats).items():
        np.testing.assert_array_equal(value, variables["batch_stats"][name])


@pytest.mark.parametrize("options", [{"debias": True}, {"decay": None, "unbiased": True}], ids=str)
def test_every_rule_of_the_running_statistics_works_across_shards(options):
    across, whole = batch_norm(axis_name="data", **options), batch_norm(**options)
    variables = variables_of(across)
    _, stats = shard_map(lambda v, x, w: across.apply(v, x, train=True, where=w))(variables, X, UNEQUAL)
    _, expected = jax.jit(lambda v, x: whole.apply(v, x, train=True, where=flat(UNEQUAL)))(variables, flat(X))
    for name in expected:
        # Both within the promised bound of the exact values.
        np.testing.assert_allclose(stats[name], expected[name], rtol=2 * BOUND, atol=2 * BOUND)


@pytest.mark.parametrize("spread", ["shard_map", "vmap"])
def test_one_value_per_feature_and_shard_is_enough_across_shards(spread):
    norm, x = batch_norm(axis_name="data"), X[:, :1]
    run = SPREADS[spread](lambda v, x, where: norm.apply(v, x, train=True))
    y, _ = jax.jit(run)(variables_of(norm), x, UNEQUAL[:, :1])
    assert_exact({"y": flat(y)}, *reference(flat(x), scale=SCALE, bias=BIAS, axis=0), axis=0)


@pytest.mark.parametrize("spread", ["shard_map", "vmap"])
def test_without_an_axis_name_each_shard_has_its_own_statistics(spread):
    norm = batch_norm()
    lift = SPREADS[spread]
    run = lift(lambda v, x, where: (norm.apply(v, x, train=True)[0], v["batch_stats"]))
    y, _ = jax.jit(run)(variables_of(norm), X, UNEQUAL)
    for i in range(SHARDS):
        assert_exact({"y": y[i]}, *reference(X[i], scale=SCALE, bias=BIAS, axis=0), axis=0)


def test_evaluation_needs_no_axis():
    norm = batch_norm(axis_name="data")
    variables = variables_of(norm)
    run = shard_map(lambda v, x, where: norm.apply(v, x, train=False))
    expected = norm.apply(variables, flat(X), train=False)[0]
    # The same elementwise program: its few roundings may be fused in another way.
    np.testing.assert_allclose(flat(run(variables, X, UNEQUAL)[0]), expected, rtol=5e-7, atol=5e-7)


def test_plain_jit_with_a_sharded_batch_needs_no_axis_name():
    norm = batch_norm(decay=0.0)
    x = jax.device_put(flat(X), NamedSharding(mesh(), P("data")))
    y, stats = jax.jit(lambda v, x: norm.apply(v, x, train=True))(variables_of(norm), x)
    exact, sizes = reference(flat(X), scale=SCALE, bias=BIAS, axis=0)
    assert_exact({"y": y, "mean": stats["mean"], "var": stats["var"]}, exact, sizes, axis=0)


def test_axis_of_a_mesh_of_two_shares_along_itself_alone():
    norm = batch_norm(axis_name="inner", decay=0.0)

    def local(v, x):
        y, stats = norm.apply(v, x[0], train=True)
        return y[None], {name: value[None] for name, value in stats.items()}

    specs = {"in_specs": (P(), P(("outer", "inner"))), "out_specs": (P(("outer", "inner")), P("outer"))}
    run = jax.jit(jax.shard_map(local, mesh=mesh((2, 4), ("outer", "inner")), **specs))
    y, stats = run(variables_of(norm), X)
    for i, rows in enumerate((slice(0, 4), slice(4, 8))):
        exact, sizes = reference(flat(X[rows]), scale=SCALE, bias=BIAS, axis=0)
        actual = {"y": flat(y[rows]), "mean": stats["mean"][i], "var": stats["var"][i]}
        assert_exact(actual, exact, sizes, axis=0)


def test_several_axis_names_share_along_all():
    norm = batch_norm(axis_name=("outer", "inner"), decay=0.0)

    def local(v, x):
        y, stats = norm.apply(v, x[0], train=True)
        return y[None], stats

    specs = {"in_specs": (P(), P(("outer", "inner"))), "out_specs": (P(("outer", "inner")), P())}
    run = jax.jit(jax.shard_map(local, mesh=mesh((2, 4), ("outer", "inner")), **specs))
    y, stats = run(variables_of(norm), X)
    exact, sizes = reference(flat(X), scale=SCALE, bias=BIAS, axis=0)
    assert_exact({"y": flat(y), "mean": stats["mean"], "var": stats["var"]}, exact, sizes, axis=0)


def test_ghost_groups_are_local_and_their_running_statistics_global():
    norm = batch_norm(axis_name="data", group_size=2, decay=0.0)
    run = shard_map(lambda v, x, where: norm.apply(v, x, train=True, where=where))
    y, stats = run(variables_of(norm), X, UNEQUAL)
    whole, sizes = reference(flat(X), axis=0, where=flat(UNEQUAL))
    assert_exact({"mean": stats["mean"], "var": stats["var"]}, whole, sizes, axis=0)
    first, sizes = reference(X[0, :2], scale=SCALE, bias=BIAS, axis=0)
    assert_exact({"y": y[0, :2]}, first, sizes, axis=0)


@pytest.mark.parametrize("mode", ["reverse over reverse", pytest.param("forward over reverse", marks=pytest.mark.slow)])
def test_second_derivatives_across_shards_equal_the_whole_batch(mode):
    with jax.enable_x64(True):
        x, dy = X[:, :1, :1].astype(np.float64), DY[:, :1, :1].astype(np.float64)
        across, whole = batch_norm(axis_name="data", epsilon=0.1), batch_norm(epsilon=0.1)
        variables = whole.init(KEY, x[0])
        run = shard_map(lambda v, x, where: across.apply(v, x, train=True))
        outer = {"forward over reverse": jax.jacfwd, "reverse over reverse": jax.jacrev}[mode]

        def sharded(v):
            return jnp.sum(jnp.sin(run(variables, v.reshape(x.shape), UNEQUAL[:, :1])[0]) * dy)

        def together(v):
            return jnp.sum(jnp.sin(whole.apply(variables, v[:, None], train=True)[0]) * dy[:, 0])

        actual, expected = (jax.jit(outer(jax.grad(f)))(x.ravel()) for f in (sharded, together))
        # float64 on both sides, the sums in another order.
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spread", SPREADS)
def test_moments_across_shards_equal_the_whole_batch(spread):
    def measured(v, x, where):
        m = moments(x, 0, where=where, axis_name="data")
        return x, m._asdict()

    m = one(jax.jit(SPREADS[spread](measured))(variables_of(batch_norm()), X, UNEQUAL)[1])
    exact, sizes = reference(flat(X), axis=0, where=flat(UNEQUAL))
    assert_exact(Moments(**m)._asdict(), exact, sizes, axis=0)
