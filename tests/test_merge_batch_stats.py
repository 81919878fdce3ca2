"""Statistics of several networks pooled: those of all their examples, the variance between networks included."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from normalizers import KEY, QUICK, draw

import jaxbn

COUNTS = [3, 40, 7]
PARTS = [draw(seed, (n, 4), offset=10.0 * seed) for seed, n in enumerate(COUNTS)]
WHOLE = np.concatenate([np.asarray(x, np.float64) for x in PARTS])


def trained(norm, x, steps=1):
    def train(stats, _):
        return norm.apply({**variables, "batch_stats": stats}, x, train=True)[1], None

    variables = norm.init(KEY, x)
    run = jax.jit(lambda stats: jax.lax.scan(train, stats, length=steps)[0], compiler_options=QUICK)
    return run(variables["batch_stats"])


def assert_whole(mean, var):
    np.testing.assert_allclose(mean, WHOLE.mean(0), rtol=1e-6)
    np.testing.assert_allclose(var, WHOLE.var(0), rtol=1e-6)


@pytest.mark.parametrize("options", [{"decay": 0.0}, {"decay": None}], ids=str)
def test_statistics_of_parts_make_those_of_the_whole(options):
    norm = jaxbn.batch_norm(**options)
    merged = jaxbn.merge_batch_stats([{"layer": trained(norm, x)} for x in PARTS], COUNTS)["layer"]
    assert_whole(merged["mean"], merged["var"])


def test_averages_that_are_corrected_when_read_stay_so():
    norm = jaxbn.batch_norm(decay=0.9, debias=True)
    trees = [trained(norm, x, steps) for steps, x in enumerate(PARTS, 1)]
    merged = jaxbn.merge_batch_stats(trees, COUNTS, debias=True)
    assert_whole(*jaxbn.running_moments(merged, debias=True))
    weights = 1 - 0.9 ** np.arange(1, 4)
    np.testing.assert_allclose(merged["weight"], np.average(weights, weights=COUNTS), rtol=1e-6)


@given(
    st.lists(st.tuples(st.floats(-1e3, 1e3, width=32), st.floats(0, 1e3, width=32)), min_size=1, max_size=4),
    st.integers(1, 1000),
)
def test_merging_is_pooling_in_float64(statistics, count):
    counts = [count + i for i in range(len(statistics))]
    trees = [{"mean": jnp.float32(m)[None], "var": jnp.float32(v)[None]} for m, v in statistics]
    merged = jaxbn.merge_batch_stats(trees, counts)
    means, variances = (np.array([np.float64(t[n][0]) for t in trees]) for n in ("mean", "var"))
    mean = np.average(means, weights=counts)
    var = np.average(variances + (means - mean) ** 2, weights=counts)
    # A few roundings of the largest term.
    np.testing.assert_allclose(merged["mean"], mean, rtol=1e-6, atol=1e-6 * np.abs(means).max())
    np.testing.assert_allclose(merged["var"], var, rtol=2e-6, atol=1e-30)


def test_one_network_alone_stays_as_it_is():
    stats = trained(jaxbn.batch_norm(), PARTS[1])
    jax.tree.map(np.testing.assert_array_equal, jaxbn.merge_batch_stats([stats], [17]), stats)


def test_what_is_counted_becomes_the_largest():
    trees = [trained(jaxbn.batch_renorm(), x, steps) for steps, x in zip((2, 1), PARTS, strict=False)]
    assert jaxbn.merge_batch_stats(trees, [1, 1])["step"] == 2


def test_a_mean_alone_is_merged():
    trees = [trained(jaxbn.mean_only_batch_norm(decay=0.0), x) for x in PARTS]
    np.testing.assert_allclose(jaxbn.merge_batch_stats(trees, COUNTS)["mean"], WHOLE.mean(0), rtol=1e-6)


def test_time_steps_and_features_that_a_network_has_not_seen_count_for_nothing():
    norm, x = jaxbn.recurrent_batch_norm(max_length=3, decay=0.0), PARTS[1]
    variables = norm.init(KEY, x)
    step = jax.jit(lambda stats, x, t: norm.apply({**variables, "batch_stats": stats}, x, train=True, step=t)[1])
    one = step(variables["batch_stats"], x, 0)
    two = step(one, x + 1, 1)
    merged = jaxbn.merge_batch_stats([one, two], [5, 1])
    assert merged["length"] == 2
    np.testing.assert_allclose(merged["mean"][1], two["mean"][1], rtol=1e-6)
    np.testing.assert_array_equal(merged["mean"][2], 0)
    np.testing.assert_array_equal(merged["var"][2], 1)


def test_trees_of_linen_and_nnx_are_merged_in_their_own_form():
    variables = jaxbn.linen.BatchNorm(use_running_average=False).init(KEY, PARTS[0])["batch_stats"]
    frozen = nn.FrozenDict(variables)
    assert type(jaxbn.merge_batch_stats([frozen, frozen], [1, 2])) is type(frozen)
    state = nnx.state(jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0)), nnx.BatchStat)
    merged = jaxbn.merge_batch_stats([state, state], [1, 2])
    assert jax.tree.structure(merged) == jax.tree.structure(state)


def test_dtypes_stay():
    stats = {"mean": jnp.ones(2, jnp.bfloat16), "var": jnp.ones(2, jnp.bfloat16)}
    merged = jaxbn.merge_batch_stats([stats, stats], [1, 2])
    assert {v.dtype for v in merged.values()} == {jnp.dtype(jnp.bfloat16)}


def test_counts_may_be_traced():
    stats = [trained(jaxbn.batch_norm(decay=0.0), x) for x in PARTS]
    merged = jax.jit(lambda counts: jaxbn.merge_batch_stats(stats, counts))(jnp.array(COUNTS))
    assert_whole(merged["mean"], merged["var"])


PLAIN = {"norm": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}


@pytest.mark.parametrize(
    ("trees", "counts", "says"),
    [
        ([], [], "at least one network"),
        ([PLAIN, PLAIN], [1], r"shape \(1,\) for 2 trees"),
        ([PLAIN, PLAIN], [1, 0], r"counts=\[1, 0\]; expected finite numbers above 0"),
        ([PLAIN, PLAIN], [1.0, np.nan], "expected finite numbers above 0"),
        ([PLAIN, {"other": PLAIN["norm"]}], [1, 1], r"trees\[1\] has nothing at 'norm/mean'"),
        (
            [PLAIN, {"norm": {"mean": jnp.zeros(4), "var": jnp.ones(4)}}],
            [1, 1],
            r"trees\[1\] has an array of shape \(4,\) at 'norm/mean', where trees\[0\] has an array of shape \(3,\)",
        ),
        (
            [jaxbn.whitening_norm().init(KEY, PARTS[0])["batch_stats"]] * 2,
            [1, 1],
            "'whitening' is neither mean nor variance",
        ),
        (
            [jaxbn.stochastic_batch_norm().init(KEY, PARTS[0])["batch_stats"]] * 2,
            [1, 1],
            "has no merged value",
        ),
    ],
)
def test_what_does_not_fit_is_refused(trees, counts, says):
    with pytest.raises(ValueError, match=says):
        jaxbn.merge_batch_stats(trees, counts)


def test_records_are_refused():
    with pytest.raises(TypeError, match="plain batch_stats, as finish_pooling gives them"):
        jaxbn.merge_batch_stats([jaxbn.start_pooling(PLAIN)], [1])
