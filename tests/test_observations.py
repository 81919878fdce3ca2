"""The running normalizer: statistics of all observations so far, against Welford's in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from normalizers import KEY, QUICK

import jaxbn

NORM = jaxbn.running_norm()
quick = functools.partial(jax.jit, compiler_options=QUICK)


def welford(batches):
    """Count, mean and variance after each batch, one observation at a time, in float64."""
    count, mean, square, seen = 0, np.zeros(batches[0].shape[-1]), 0.0, []
    for batch in batches:
        for x in np.asarray(batch, np.float64):
            count += 1
            apart = x - mean
            mean = mean + apart / count
            square = square + apart * (x - mean)
        seen.append((count, mean, square / count))
    return seen


def drawn(steps, size, offset=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return [(offset + rng.normal(size=(size, 3)) * [0.1, 1, 30]).astype(np.float32) for _ in range(steps)]


@functools.cache
def _scan(norm):
    def step(batch_stats, x):
        y, batch_stats = norm.apply({"params": {}, "batch_stats": batch_stats}, x, train=True)
        return batch_stats, (y, batch_stats)

    return jax.jit(functools.partial(jax.lax.scan, step))


def scanned(batches, norm=NORM):
    """Statistics after all batches, and [steps, ...] of y and of the statistics."""
    return _scan(norm)(norm.init(KEY, batches[0])["batch_stats"], np.stack(batches))


@pytest.mark.parametrize("offset", [0.0, -100.0])
@pytest.mark.parametrize("size", [1, 4])
def test_statistics_are_welfords(size, offset):
    batches = drawn(50, size, offset)
    _, (_, stats) = scanned(batches)
    for step, (count, mean, var) in enumerate(welford(batches)):
        assert np.all(stats["count"][step] == count)
        np.testing.assert_allclose(stats["mean"][step], mean, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(stats["var"][step], var, rtol=2e-6, atol=1e-9)


def test_statistics_do_not_drift_over_many_steps():
    """One float for each would be off by 1e-6 in the mean and 4e-6 in the variance here, and by more later."""
    batches = drawn(40_000, 1, offset=30.0)
    after, _ = scanned(batches)
    x = np.concatenate(batches).astype(np.float64)
    np.testing.assert_allclose(after["mean"], x.mean(0), rtol=1e-7)
    np.testing.assert_allclose(after["var"], x.var(0), rtol=1e-7)


def test_a_count_goes_on_where_one_float_would_stand_still():
    start = NORM.init(KEY, jnp.zeros((1, 3)))["batch_stats"] | {"count": jnp.full(3, 2.0**24)}
    step = lambda stats, x: (NORM.apply({"batch_stats": stats}, x, train=True)[1], None)
    after, _ = jax.jit(lambda start: jax.lax.scan(step, start, jnp.zeros((5, 1, 3))))(start)
    total = np.asarray(after["count"], np.float64) + np.asarray(after["count_rest"], np.float64)
    np.testing.assert_array_equal(total, 2**24 + 5)


def test_a_batch_is_normalized_by_statistics_that_include_it():
    batches = drawn(5, 4, offset=5.0)
    _, (ys, _) = scanned(batches)
    for y, x, (_, mean, var) in zip(ys, batches, welford(batches), strict=True):
        np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-8), rtol=1e-5, atol=1e-5)


def test_a_first_observation_comes_out_as_zero():
    y, stats = NORM.apply(NORM.init(KEY, jnp.zeros((1, 3))), jnp.full((1, 3), 7.0), train=True)
    np.testing.assert_array_equal(y, 0)
    np.testing.assert_array_equal(stats["mean"], 7)


def test_before_the_first_batch_an_evaluation_changes_nothing():
    x = jnp.full((2, 3), 7.0)
    np.testing.assert_allclose(NORM.apply(NORM.init(KEY, x), x, train=False)[0], x, rtol=1e-6)


def test_evaluation_keeps_digits_far_from_zero():
    """The mean is known beyond one float."""
    batches = drawn(20, 4, offset=1e5)
    after, _ = scanned(batches)
    x = batches[0]
    y, _ = NORM.apply({"batch_stats": after}, x, train=False)
    _, mean, var = welford(batches)[-1]
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-8), rtol=2e-4, atol=2e-4)


def test_a_batch_that_is_not_finite_leaves_them_alone():
    after, _ = scanned(drawn(3, 4))
    _, same = NORM.apply({"batch_stats": after}, jnp.full((4, 3), jnp.nan), train=True)
    jax.tree.map(np.testing.assert_array_equal, same, after)


def test_gradients_flow_through_x_alone():
    batches = drawn(3, 4)
    after, _ = scanned(batches)
    loss = lambda x: jnp.sum(NORM.apply({"batch_stats": after}, x, train=True)[0])
    var = welford([*batches, batches[0]])[-1][2]
    expected = np.broadcast_to(1 / np.sqrt(var + 1e-8), (4, 3))
    np.testing.assert_allclose(quick(jax.grad(loss))(batches[0]), expected, rtol=1e-5)


def test_it_clips_by_its_activation():
    norm = jaxbn.running_norm(activation=functools.partial(jnp.clip, min=-1, max=1))
    y, _ = norm.apply(norm.init(KEY, jnp.zeros((1, 3))), jnp.full((1, 3), 7.0), train=False)
    np.testing.assert_array_equal(y, 1)
