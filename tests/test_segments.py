"""Moments by segment, and the normalization of graphs: against float64, one segment at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hard_inputs import HARD_INPUTS, ROWS
from hypothesis import given, settings
from hypothesis import strategies as st
from normalizers import KEY, QUICK, draw
from oracle import BOUND, assert_exact, reference

import jaxbn

RNG = np.random.default_rng(0)
IDS = np.array([2, 0, 5, 2, 2, 0, -1, 3, 5, 3, 0, 2], np.int32)  # Nothing in 1 and 4; one place in none.
NUMBER = 6
X = np.asarray(draw(1, (12, 3)))
quick = functools.partial(jax.jit, compiler_options=QUICK)
by_segment = jax.jit(jaxbn.moments, static_argnames=("axis", "num_segments"))


def assert_segments(m, x, ids, axis=0, **weighting):
    """Each segment by itself within the library's promise; `x` and `ids` flat, [places, features]."""
    for segment in range(len(m.mean)):
        own = {name: v[ids == segment] for name, v in weighting.items()}
        if not np.any(ids == segment):
            assert not np.any(m.count[segment]) | np.any(m.mean[segment]) | np.any(m.var[segment])
            continue
        actual = {name: getattr(m, name)[segment] for name in ("count", "mean", "var")}
        assert_exact(actual, *reference(x[ids == segment], axis=0, **own), axis=0)


def test_each_segment_has_the_moments_of_its_places():
    assert_segments(by_segment(X, 0, segment_ids=IDS, num_segments=NUMBER), X, IDS)


def test_ids_of_narrow_integers_count_more_segments_than_they_hold():
    m = jaxbn.moments(X, 0, segment_ids=np.arange(12, dtype=np.uint8), num_segments=300)
    np.testing.assert_array_equal(m.count[:, 0], np.arange(300) < 12)


@pytest.mark.parametrize("name", HARD_INPUTS)
def test_segments_are_exact_on_hard_inputs(name):
    x, ids = HARD_INPUTS[name], np.random.default_rng(3).integers(0, 5, ROWS)
    assert_segments(by_segment(x, 0, segment_ids=ids, num_segments=5), x, ids)


@pytest.mark.parametrize("offset", [0, 1e4, 1e6])
def test_many_values_far_from_zero_are_exact(offset):
    rng = np.random.default_rng(4)
    x, ids = (offset + rng.normal(size=(100_000, 2))).astype(np.float32), rng.integers(0, 2, 100_000)
    assert_segments(by_segment(x, 0, segment_ids=ids, num_segments=2), x, ids)


def test_masks_and_weights_count_within_segments():
    where, weights = RNG.uniform(size=(12, 3)) < 0.7, RNG.uniform(0.5, 2, (12, 1)).astype(np.float32)
    m = by_segment(X, 0, segment_ids=IDS, num_segments=NUMBER, where=where, weights=weights)
    for segment in (0, 2, 3, 5):
        own = segment == IDS
        exact = reference(X[own], axis=0, where=where[own], weights=np.broadcast_to(weights, X.shape)[own])[0]
        seen = exact.count[0] > 0 if exact.count.ndim > 1 else exact.count > 0
        for name in ("count", "mean", "var"):
            expected = np.where(seen, np.nan_to_num(getattr(exact, name)), 0)
            np.testing.assert_allclose(getattr(m, name)[segment], expected, rtol=2e-6, atol=1e-6)


def test_what_is_padding_or_masked_may_be_anything():
    dirty, where = X.copy(), np.arange(12)[:, None] != 4
    dirty[6], dirty[4] = np.nan, np.inf

    def both(x):
        m = jaxbn.moments(x, 0, segment_ids=IDS, num_segments=NUMBER, where=where)
        return jnp.sum(jnp.sin(m.mean) + m.var), m

    gradient, m = quick(jax.grad(both, has_aux=True))(dirty)
    expected, clean = quick(jax.grad(both, has_aux=True))(np.where(np.isfinite(dirty), X, 0).astype(np.float32))
    jax.tree.map(np.testing.assert_array_equal, (gradient, m), (expected, clean))


@pytest.mark.parametrize(
    ("axis", "along", "others"),
    # x is [2, 6, 3, 4]: batch, positions, features, more positions.
    [((0, 1, 3), (2, 6), (0, 1, 3, 2)), ((0, 1), (2, 6), (0, 1, 2, 3)), ((1, 3), (6, 4), (1, 3, 0, 2))],
)
def test_ids_run_along_the_first_of_any_reduced_axes(axis, along, others):
    x, ids = np.asarray(draw(2, (2, 6, 3, 4))), RNG.integers(-1, 3, along)
    m = by_segment(x, axis, segment_ids=ids, num_segments=3)
    rows = np.transpose(x, others)
    features = tuple(size for a, size in enumerate(x.shape) if a not in axis)
    assert m.mean.shape == (3, *features)
    flat = rows.reshape(int(np.prod(along)), -1, *features)
    everywhere = np.broadcast_to(ids.reshape(-1, 1), flat.shape[:2]).ravel()
    assert_segments(m, flat.reshape(-1, *features), everywhere)


@settings(max_examples=15)
@given(st.permutations(range(12)))
def test_the_order_of_places_changes_nothing(order):
    order = np.array(order)
    m = by_segment(X, 0, segment_ids=IDS, num_segments=NUMBER)
    again = by_segment(X[order], 0, segment_ids=IDS[order], num_segments=NUMBER)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), again, m)


@jax.jit
def pooled(m):
    return functools.reduce(jaxbn.merge_moments, [jax.tree.map(lambda v, i=i: v[i], m) for i in range(3)])


@settings(max_examples=15)
@given(st.lists(st.integers(0, 2), min_size=12, max_size=12))
def test_segments_pooled_are_the_whole(ids):
    m = by_segment(X, 0, segment_ids=np.array(ids, np.int32), num_segments=3)
    assert_exact(pooled(m)._asdict(), *reference(X, axis=0), axis=0)


@pytest.mark.parametrize("shards", [4, 300])
def test_segments_may_lie_on_several_shards(shards):
    x, ids = np.asarray(draw(3, (shards, 2, 3), offset=1e4)), RNG.integers(-1, 4, (shards, 2))
    shard = functools.partial(jaxbn.moments, axis=0, num_segments=4, axis_name="shards")
    m = jax.jit(jax.vmap(lambda x, ids: shard(x, segment_ids=ids), axis_name="shards"))(x, ids)
    assert_segments(jax.tree.map(lambda v: v[0], m), x.reshape(-1, 3), ids.ravel())


def test_groups_of_shards_have_segments_of_their_own():
    x, ids, groups = np.asarray(draw(3, (4, 5, 3))), RNG.integers(0, 2, (4, 5)), [[0, 2], [1, 3]]
    shard = functools.partial(jaxbn.moments, axis=0, num_segments=2, axis_name="shards", axis_index_groups=groups)
    m = jax.jit(jax.vmap(lambda x, ids: shard(x, segment_ids=ids), axis_name="shards"))(x, ids)
    for group in groups:
        assert_segments(jax.tree.map(lambda v, g=group: v[g[0]], m), x[group].reshape(-1, 3), ids[group].ravel())


def test_derivatives_of_moments_are_those_of_the_textbook():
    with jax.enable_x64(True):
        x, dx = (jnp.asarray(RNG.normal(2, 3, X.shape)) for _ in range(2))
        member = jnp.asarray(np.arange(NUMBER)[:, None] == IDS, float)[..., None]  # [segments, places, 1]
        share = member / jnp.maximum(jnp.sum(member, 1, keepdims=True), 1)

        def ours(x):
            m = jaxbn.moments(x, 0, segment_ids=IDS, num_segments=NUMBER)
            return jnp.sum(jnp.sin(m.mean) * m.var)

        def textbook(x):
            mean = jnp.sum(share * x[None], 1)
            return jnp.sum(jnp.sin(mean) * jnp.sum(share * (x[None] - mean[:, None]) ** 2, 1))

        both = lambda f: jax.jvp(jax.grad(f), (x,), (dx,))
        found, expected = jax.device_get(quick(lambda: [both(ours), both(textbook)])())
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), found, expected)


def one_by_one(x, scale, bias, mean_scale, ids, epsilon=1e-5):
    """Cai et al. 2021, section 4, written down for one graph after the other."""
    y = jnp.broadcast_to(bias, x.shape)
    for segment in np.unique(ids[ids >= 0]):
        own = np.flatnonzero(ids == segment)
        c = x[own] - mean_scale * jnp.mean(x[own], 0, keepdims=True)
        y = y.at[own].set(scale * c / jnp.sqrt(jnp.mean(c**2, 0, keepdims=True) + epsilon) + bias)
    return y


PARAMS = {"mean_scale": np.array([1.0, 0.3, -0.5]), "scale": np.array([2.0, 1.0, 0.5]), "bias": np.array([0.1, 0, 1])}


@functools.cache
def derivatives():
    """(ours, the oracle's) y, gradients, a tangent and a Hessian's product with it, in float64."""
    with jax.enable_x64(True):
        x, dx, dy = (jnp.asarray(RNG.normal(2, 3, X.shape)) for _ in range(3))
        params = jax.tree.map(jnp.asarray, PARAMS)
        dparams = jax.tree.map(jnp.ones_like, params)

        def ours(params, x):
            variables = {"params": params, "batch_stats": {}}
            return jaxbn.graph_norm(NUMBER).apply(variables, x, train=True, segment_ids=IDS)[0]

        def oracle(params, x):
            wide = {name: v[None] for name, v in params.items()}
            return one_by_one(x, wide["scale"], wide["bias"], wide["mean_scale"], IDS)

        def all_of(f):
            loss = lambda *point: jnp.sum(f(*point) * dy + jnp.sin(f(*point)))
            gradient = jax.grad(loss, (0, 1))
            tangent = jax.jvp(f, (params, x), (dparams, dx))[1]
            return f(params, x), gradient(params, x), tangent, jax.jvp(gradient, (params, x), (dparams, dx))[1]

        return jax.device_get(quick(lambda: [all_of(ours), all_of(oracle)])())


@pytest.mark.parametrize("what", range(4), ids=["y", "gradient", "tangent", "second derivative"])
def test_graph_norm_is_the_papers(what):
    ours, oracle = derivatives()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-9), ours[what], oracle[what])


@pytest.mark.parametrize("name", HARD_INPUTS)
def test_graph_norm_and_its_gradients_are_exact_on_hard_inputs(name):
    x, dy = HARD_INPUTS[name], 0.5 + np.random.default_rng(7).normal(size=HARD_INPUTS[name].shape)
    ids, dy = np.arange(ROWS, dtype=np.int32) % 2, dy.astype(np.float32)
    y, dx = _hard(x, dy, ids)
    for segment in range(2):
        own = ids == segment
        assert_exact({"y": y[own], "dx": dx[own]}, *reference(x[own], dy[own], axis=0), axis=0, bound=2 * BOUND)


@jax.jit
def _hard(x, dy, ids):
    norm = jaxbn.graph_norm(2, use_scale=False, use_bias=False, use_mean_scale=False)
    y, pull = jax.vjp(lambda x: norm.apply({"batch_stats": {}}, x, train=True, segment_ids=ids)[0], x)
    return y, pull(dy)[0]


def test_padding_comes_out_as_the_bias_and_gets_no_gradient():
    norm, dirty = jaxbn.graph_norm(NUMBER), X.copy()
    dirty[6] = np.nan
    params = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), PARAMS)

    def loss(x):
        y, _ = norm.apply({"params": params, "batch_stats": {}}, x, train=True, segment_ids=IDS)
        return jnp.sum(jnp.sin(y)), y

    gradient, y = quick(jax.grad(loss, has_aux=True))(dirty)
    np.testing.assert_array_equal(y[6], params["bias"])
    np.testing.assert_array_equal(gradient[6], 0)
    assert np.all(np.isfinite(gradient))


def test_as_many_graphs_as_nodes_always_suffice():
    variables = jaxbn.graph_norm().init(KEY, X)
    ids, norms = np.maximum(IDS, 0), (jaxbn.graph_norm(6), jaxbn.graph_norm())
    some, all_nodes = quick(lambda: [n.apply(variables, X, train=True, segment_ids=ids)[0] for n in norms])()
    np.testing.assert_allclose(some, all_nodes, rtol=1e-6, atol=1e-6)


def test_packed_sequences_are_normalized_as_they_are_alone():
    rows = np.asarray(draw(4, (2, 7, 3)))
    ids = np.array([[0, 0, 0, 1, 1, 1, 1], [2, 2, 2, 2, 2, -1, -1]])
    norm = jaxbn.graph_norm(3, use_mean_scale=False)
    variables = norm.init(KEY, rows)
    y, _ = quick(lambda rows: norm.apply(variables, rows, train=True, segment_ids=ids))(rows)
    for segment in range(3):
        own = ids == segment
        np.testing.assert_allclose(y[own], reference(rows[own], axis=0)[0].y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "exception", "says"),
    [
        ({"segment_ids": IDS}, ValueError, "came without num_segments"),
        ({"num_segments": 3}, ValueError, "came without segment_ids"),
        ({"segment_ids": IDS, "num_segments": 0}, ValueError, "num_segments=0; expected at least 1"),
        ({"segment_ids": IDS, "num_segments": 2.0}, TypeError, "num_segments=2.0; expected an int"),
        ({"segment_ids": IDS.astype(float), "num_segments": 3}, TypeError, "segment_ids has dtype float"),
        ({"segment_ids": IDS[:5], "num_segments": 3}, ValueError, r"shape \(5,\); x of shape \(12, 3\).*\(12,\)"),
        ({"segment_ids": np.int32(1), "num_segments": 3}, ValueError, r"segment_ids has shape \(\)"),
    ],
)
def test_segments_that_do_not_fit_are_refused(arguments, exception, says):
    with pytest.raises(exception, match=says):
        jaxbn.moments(X, 0, **arguments)


def test_graph_norm_without_graphs_is_refused():
    norm = jaxbn.graph_norm()
    with pytest.raises(ValueError, match=r"needs segment_ids=.*\(12, 3\)"):
        norm.apply(norm.init(KEY, X), X, train=True)
    with pytest.raises(ValueError, match="num_segments=0"):
        jaxbn.graph_norm(0)
    with pytest.raises(TypeError, match="graph_norm takes real arrays"):
        norm.apply(norm.init(KEY, X), X.astype(complex), train=True, segment_ids=IDS)
