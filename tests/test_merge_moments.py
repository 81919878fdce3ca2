"""The laws of pooling: merged parts are the whole, in any order, and an empty part changes nothing."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_exact, reference

import jaxbn
from jaxbn import Moments

merge_moments = jax.jit(jaxbn.merge_moments)
moments = jax.jit(jaxbn.moments, static_argnames=("axis",))
FEATURES = 3
real = lambda low, high: st.floats(low, high, width=32)


@st.composite
def any_moments(draw):
    values = lambda low, high: np.array(
        draw(st.lists(real(low, high), min_size=FEATURES, max_size=FEATURES)), np.float32
    )
    count = np.array(draw(st.lists(st.integers(0, 1000), min_size=FEATURES, max_size=FEATURES)), np.float32)
    seen = count > 0
    return Moments(count, values(-8, 8) * seen, values(0, 8) * seen)


def assert_same(a, b):
    # A merge takes about ten roundings of 6e-8; means are at most 8, and var at most 8 + (16 / 2)^2 = 72.
    np.testing.assert_array_equal(a.count, b.count)
    np.testing.assert_allclose(a.mean, b.mean, rtol=0, atol=10 * 6e-8 * 8)
    np.testing.assert_allclose(a.var, b.var, rtol=0, atol=10 * 6e-8 * 72)


@given(any_moments(), any_moments())
def test_merge_is_commutative(a, b):
    assert_same(merge_moments(a, b), merge_moments(b, a))


@given(any_moments(), any_moments(), any_moments())
def test_merge_is_associative(a, b, c):
    assert_same(merge_moments(merge_moments(a, b), c), merge_moments(a, merge_moments(b, c)))


@given(any_moments(), real(-8, 8), real(0, 8))
def test_zero_count_is_the_neutral_element_whatever_else_it_holds(a, mean, var):
    empty = Moments(jnp.zeros(FEATURES), jnp.full(FEATURES, mean), jnp.full(FEATURES, var))
    seen = a.count > 0
    for merged in (merge_moments(a, empty), merge_moments(empty, a)):
        np.testing.assert_array_equal(merged.count, a.count)
        np.testing.assert_array_equal(merged.mean[seen], a.mean[seen])
        np.testing.assert_array_equal(merged.var[seen], a.var[seen])
        chex.assert_tree_all_finite(merged)


@given(st.integers(0, 20), st.floats(-100, 100, width=32), st.floats(-100, 100, width=32))
def test_merged_halves_equal_the_whole(split, offset_a, offset_b):
    rng = np.random.default_rng(split)
    x = rng.normal(size=(20, FEATURES)).astype(np.float32)
    x[:split] += offset_a
    x[split:] += offset_b
    first = np.arange(20)[:, None] < split  # Masks and not slices: one compiled program serves every split.
    merged = merge_moments(moments(x, 0, where=first), moments(x, 0, where=~first))
    exact, sizes = reference(x, axis=0)
    # Each half's mean is one float32, wrong by 2^-24 of up to 100: the variance feels that times the gap, so by
    # the mean square of the values and not by the variance alone.
    sizes = sizes._replace(var=np.mean(x.astype(np.float64) ** 2, 0), mean=np.maximum(sizes.mean, 100))
    assert_exact(merged._asdict(), exact, sizes, axis=0)


def test_merge_pools_by_count_and_not_by_part():
    a = Moments(jnp.array(1.0), jnp.array(0.0), jnp.array(0.0))
    b = Moments(jnp.array(3.0), jnp.array(4.0), jnp.array(1.0))
    merged = merge_moments(a, b)
    # Values 0 and three of mean 4 and variance 1: mean 3, variance 3/4 + 16 * 1 * 3 / 16. Exact in binary.
    assert tuple(merged) == (4.0, 3.0, 3.75)


def test_merge_of_two_empty_parts_is_empty_and_finite():
    empty = Moments(jnp.zeros(2), jnp.zeros(2), jnp.zeros(2))
    chex.assert_trees_all_equal(merge_moments(empty, empty), empty)


def test_merge_takes_a_scalar_count_beside_one_per_feature():
    x = np.random.default_rng(0).normal(size=(10, FEATURES)).astype(np.float32)
    merged = merge_moments(moments(x[:4], 0), moments(x[4:], 0, where=np.ones((6, 1), bool)))
    assert_exact(merged._asdict(), *reference(x, axis=0), axis=0)


def test_merge_of_complex_moments():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(10, 2)) + 1j * rng.normal(2, 1, (10, 2))).astype(np.complex64)
    merged = merge_moments(moments(x[:3], 0), moments(x[3:], 0))
    assert_exact(merged._asdict(), *reference(x, axis=0), axis=0)


def test_gradient_through_a_merge_is_finite_beside_an_empty_part():
    x = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)

    def pooled(x):
        return jnp.sum(merge_moments(moments(x[:3], 0), moments(x[3:], 0, where=np.zeros((3, 1), bool))).var)

    gradient = jax.jit(jax.grad(pooled))(x)
    chex.assert_tree_all_finite(gradient)
    np.testing.assert_array_equal(gradient[3:], 0)


def test_folding_single_rows_equals_the_whole():
    x = np.random.default_rng(0).normal(2.0, 1.0, (50, FEATURES)).astype(np.float32)
    empty = Moments(jnp.zeros(FEATURES), jnp.zeros(FEATURES), jnp.zeros(FEATURES))

    def fold(m, row):
        one = Moments(jnp.ones(FEATURES), row, jnp.zeros(FEATURES))
        return merge_moments(m, one), None

    # The bound holds even for 50 merges in a row: their rounding errors shrink with 1 / n.
    assert_exact(jax.lax.scan(fold, empty, x)[0]._asdict(), *reference(x, axis=0), axis=0)
