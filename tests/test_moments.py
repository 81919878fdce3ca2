"""Count, mean and variance: any axes, masks as subsets, weights as repetition, dtypes, derivatives."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import TINY, assert_exact, plain, reference

import jaxbn
from jaxbn import Moments

moments = jax.jit(jaxbn.moments, static_argnames=("axis",))
RNG = np.random.default_rng(0)


def draw(*shape, offset=0.5):
    return RNG.normal(offset, 1.0, shape).astype(np.float32)


def assert_moments(actual, x, axis, **weighting):
    """Compare with the oracle within the library's promise of 1e-6."""
    assert_exact(actual._asdict(), *reference(x, axis=axis, **weighting), axis=axis)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((7,), 0),
        ((6, 5), 0),
        ((6, 5), 1),
        ((6, 5), -1),
        ((6, 5), (0, 1)),
        ((4, 3, 2, 5), (0, 1, 2)),
        ((4, 3, 2, 5), (0, 2, 3)),
        ((4, 3, 2, 5), (-1, 0, -2)),
        ((2, 3, 2, 3, 2, 3), (0, 2, 4)),
    ],
)
def test_any_axes_equal_the_oracle(shape, axis):
    x = draw(*shape)
    assert_moments(moments(x, axis), x, axis)


def test_axis_may_be_a_list():
    x = draw(4, 3, 2)
    assert_moments(jaxbn.moments(x, [0, 2]), x, (0, 2))


def test_no_axis_reduces_all():
    x = draw(4, 3)
    chex.assert_trees_all_equal(moments(x), moments(x, (0, 1)))


def test_fields_have_the_shape_of_the_features():
    m = moments(draw(4, 3, 2, 5), (0, 2))
    assert isinstance(m, Moments)
    assert m.mean.shape == m.var.shape == (3, 5)
    assert m.count.shape in ((), (3, 5))


def test_variance_is_the_biased_one():
    # 1, 2, 3, 4: mean 2.5, squared deviations 2.25 + 0.25 + 0.25 + 2.25 over 4. All exact in binary.
    m = moments(jnp.array([1.0, 2.0, 3.0, 4.0]), 0)
    assert (m.count, m.mean, m.var) == (4, 2.5, 1.25)


def test_numpy_input_is_taken():
    assert moments(np.ones((3, 2), np.float32), 0).mean.shape == (2,)


@pytest.mark.parametrize("shape", [(40, 3), (40, 1), (3,), ()])
def test_mask_broadcasts_as_in_jnp_mean(shape):
    x, where = draw(40, 3), np.ones(shape, bool) if shape == () else RNG.uniform(size=shape) > 0.3
    m = moments(x, 0, where=where)
    assert_moments(m, x, 0, where=where)
    expected = jnp.mean(x, 0, where=jnp.asarray(where))  # NaN where nothing counts; ours is zero.
    np.testing.assert_allclose(m.mean, np.nan_to_num(expected), rtol=1e-6, atol=1e-6)


def test_mask_of_examples_on_images():
    x, where = draw(6, 4, 4, 3), np.array([1, 1, 0, 1, 0, 0], bool)
    masked = moments(x, (0, 1, 2), where=where[:, None, None, None])
    assert_moments(masked, x[where], (0, 1, 2))
    np.testing.assert_array_equal(np.broadcast_to(masked.count, (3,)), 3 * 16)


def test_mask_equals_subset():
    x, where = draw(30, 4, offset=100), RNG.uniform(size=30) > 0.5
    assert_moments(moments(x, 0, where=where[:, None]), x[where], 0)


def test_mask_that_hides_nothing_changes_nothing():
    x = draw(30, 4)
    masked, unmasked = moments(x, 0, where=np.ones((30, 1), bool)), moments(x, 0)
    # The same sums in another order: a few roundings of 6e-8.
    chex.assert_trees_all_close(masked.mean, unmasked.mean, rtol=5e-7)
    chex.assert_trees_all_close(masked.var, unmasked.var, rtol=5e-7)


@pytest.mark.parametrize("hidden", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("weighting", ["where", "weights"])
def test_what_is_masked_may_be_anything(hidden, weighting):
    x, where = draw(20, 3), RNG.uniform(size=(20, 3)) > 0.3
    dirty = np.where(where, x, hidden).astype(np.float32)
    mask = {"where": where} if weighting == "where" else {"weights": where.astype(np.float32)}
    assert_moments(moments(dirty, 0, **mask), np.where(where, x, 0), 0, where=where)


def test_nan_under_the_mask_does_not_reach_the_gradient():
    x, where = draw(20, 3), RNG.uniform(size=(20, 3)) > 0.3
    dirty = np.where(where, x, np.nan).astype(np.float32)
    gradient = jax.grad(lambda x: jnp.sum(moments(x, 0, where=where).var))(dirty)
    chex.assert_tree_all_finite(gradient)


def test_nan_that_counts_shows():
    x = draw(5, 3)
    x[2, 1] = np.nan
    m = moments(x, 0)
    np.testing.assert_array_equal(np.isnan(m.mean), [False, True, False])


def test_weight_equals_repetition():
    x, times = draw(12, 3, offset=20), RNG.integers(0, 5, 12)
    weighted = moments(x, 0, weights=times[:, None].astype(np.float32))
    assert_moments(weighted, np.repeat(x, times, axis=0), 0)


def test_integer_weights_are_taken():
    x, times = draw(12, 3), RNG.integers(0, 5, (12, 1))
    chex.assert_trees_all_equal(moments(x, 0, weights=times), moments(x, 0, weights=times.astype(np.float32)))


def test_weights_and_mask_multiply():
    x, weights, where = draw(12, 3), RNG.uniform(0.1, 2, (12, 1)).astype(np.float32), RNG.uniform(size=12) > 0.4
    assert_moments(moments(x, 0, weights=weights, where=where[:, None]), x[where], 0, weights=weights[where])


def test_common_factor_of_the_weights_scales_the_count_alone():
    x, weights = draw(12, 3), RNG.uniform(0.1, 2, (12, 1)).astype(np.float32)
    m, scaled = moments(x, 0, weights=weights), moments(x, 0, weights=weights / 1024)
    # A power of two: exact in every step.
    chex.assert_trees_all_equal((m.count / 1024, m.mean, m.var), tuple(scaled))


def test_feature_that_saw_nothing_has_zeros():
    where = np.array([True, False, True])
    m = moments(draw(8, 3), 0, where=where)
    np.testing.assert_array_equal(m.count, [8, 0, 8])
    assert m.mean[1] == 0
    assert m.var[1] == 0
    chex.assert_tree_all_finite(m)


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.bfloat16, 1e-6), (jnp.float16, 1e-6)])
def test_low_precision_is_measured_in_float32(dtype, bound):
    # The input is rounded first; its statistics are then as exact as those of float32.
    x = jnp.asarray(draw(200, 4, offset=30), dtype)
    m = moments(x, 0)
    chex.assert_type([m.count, m.mean, m.var], jnp.float32)
    assert_exact(m._asdict(), *reference(np.asarray(x, np.float64), axis=0), axis=0, bound=bound)


def test_low_precision_does_not_overflow():
    # 60,000 squared is far beyond float16's 65,504.
    x = jnp.asarray([[60000.0], [-60000.0], [60000.0], [-60000.0]], jnp.float16)
    assert moments(x, 0).var[0] == np.float32(60000.0**2)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        x = RNG.normal(1e6, 1.0, (500, 3))
        m = moments(x, 0)
        chex.assert_type([m.count, m.mean, m.var], jnp.float64)
        # Eight roundings of 1.1e-16, as 1e-6 is of 6e-8 with room; the oracle itself is float64.
        assert_exact(m._asdict(), *reference(x, axis=0), axis=0, bound=1e-14)


def test_complex_mean_is_complex_and_variance_real():
    x = (draw(50, 3) + 1j * draw(50, 3, offset=-2)).astype(np.complex64)
    m = moments(x, 0)
    chex.assert_type([m.count, m.mean, m.var], [jnp.float32, jnp.complex64, jnp.float32])
    assert_moments(m, x, 0)


def test_jit_and_vmap_agree_with_plain_calls():
    x = draw(2, 40, 3)
    rows = [jaxbn.moments(v, 0) for v in x]
    batched = jax.jit(jax.vmap(lambda v: jaxbn.moments(v, 0)))(x)
    for name in ("mean", "var"):
        # The same sums, fused in another order: a few roundings of 6e-8 of values of size one.
        np.testing.assert_allclose(getattr(batched, name), [getattr(m, name) for m in rows], rtol=5e-7, atol=1e-7)


@pytest.mark.parametrize("weights", [None, np.linspace(0, 2, 12)[:, None]], ids=["plain", "weights"])
def test_derivatives_equal_closed_form(weights):
    with jax.enable_x64(True):
        x, share = RNG.normal(3.0, 1.0, (12, 2)), np.ones((12, 1)) if weights is None else weights
        share = share / share.sum() if weights is not None else share / 12
        m = moments(x, 0, weights=weights)
        dmean, dvar = (
            jax.jit(jax.grad(lambda x, f=f: jnp.sum(f(moments(x, 0, weights=weights)))))(x)
            for f in (lambda m: m.mean, lambda m: m.var)
        )
        # float64 on both sides: some roundings of 1e-16 of values of size one.
        np.testing.assert_allclose(dmean, np.broadcast_to(share, x.shape), atol=1e-14)
        np.testing.assert_allclose(dvar, 2 * share * (x - np.asarray(m.mean)), atol=1e-14)


def test_second_derivative_of_the_variance():
    with jax.enable_x64(True):
        x = RNG.normal(3.0, 1.0, 6)
        hessian = jax.jit(jax.hessian(lambda x: moments(x, 0).var))(x)
        # var is quadratic: its hessian is 2 / n (I - 1 1^T / n) everywhere.
        np.testing.assert_allclose(hessian, 2 / 6 * (np.eye(6) - 1 / 6), atol=1e-14)


def test_gradient_of_a_function_of_moments_equals_autodiff_of_the_plain_formula():
    with jax.enable_x64(True):
        x = RNG.normal(1.0, 1.0, (9, 2))

        def ours(x):
            m = moments(x, 0)
            return jnp.sum(jnp.sin((x - m.mean[None]) / jnp.sqrt(m.var[None] + 0.1)))

        expected = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(plain(x, axis=0, epsilon=0.1)))))(x)
        np.testing.assert_allclose(jax.jit(jax.grad(ours))(x), expected, atol=1e-13)  # float64 roundings.


def test_count_carries_no_gradient():
    gradient = jax.grad(lambda x: jnp.sum(moments(x, 0, weights=np.ones((4, 1))).count))(draw(4, 2))
    np.testing.assert_array_equal(gradient, 0)


def test_variance_of_a_constant_is_zero():
    # sum(x^2) / n - mean^2 is 12 here, or -20: the squares are rounded.
    assert moments(np.full((1000, 1), 12345.678, np.float32), 0).var[0] == 0


def test_empty_array_has_zero_count_and_finite_moments():
    m = moments(np.zeros((0, 3), np.float32), 0)
    np.testing.assert_array_equal(np.broadcast_to(m.count, 3), 0)
    chex.assert_tree_all_finite(m)


def test_smallest_normal_numbers_are_not_lost():
    x = np.full((16, 1), 4 * TINY, np.float32)
    assert moments(x, 0).mean[0] == np.float32(4 * TINY)
