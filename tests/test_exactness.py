"""y, mean, var and all three gradients within 1e-6 of the float64 oracle, on inputs chosen to be hard.

The bound is the library's promise and the same everywhere (`oracle.BOUND`): per feature, the norm of the error over the
size of the terms, as `oracle.reference` defines it. An ideal float32 program stays near 1e-7.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hard_inputs import BIAS, FEATURES, HARD_INPUTS, ROWS, SCALE, cotangent
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from oracle import BOUND, TINY, assert_exact, reference

import jaxbn
from jaxbn import _cpu, _measure
from jaxbn._measure import sample


def measure(x, dy, scale, bias, where=None, weights=None, *, axis, epsilon):
    def forward(x, scale, bias):
        return jaxbn.batch_normalize(x, scale, bias, axis=axis, epsilon=epsilon, where=where, weights=weights)

    y, vjp, moments = jax.vjp(forward, x, scale, bias, has_aux=True)
    return {"y": y, **moments._asdict(), **dict(zip(("dx", "dscale", "dbias"), vjp(dy), strict=True))}


# The promise holds for programs as users compile them.
FULL = {"xla_backend_optimization_level": 3}
FULL |= {"xla_cpu_use_fusion_emitters": True} if jax.__version_info__ < (0, 11) else {}


def measure_by(code, *arguments, **options):
    with _cpu.force(code):
        return measure(*arguments, **options)


measure_jit = jax.jit(measure_by, static_argnums=0, static_argnames=("axis", "epsilon"), compiler_options=FULL)
# Both run on a CPU here: the code for CPUs and that for all other platforms.
both_codes = pytest.mark.parametrize("code", ["cpu", "default"])


def check(x, dy=None, *, code="cpu", axis, epsilon=1e-5, scale=None, bias=None, sensitivity=0.0, **weighting):
    x = np.asarray(x, np.float32)
    features = tuple(n for a, n in enumerate(x.shape) if a not in np.atleast_1d(axis) % x.ndim)
    dy = cotangent(x.shape) if dy is None else np.asarray(dy, np.float32)
    scale = np.full(features, 1.5, np.float32) if scale is None else scale
    bias = np.zeros(features, np.float32) if bias is None else bias
    actual = measure_jit(code, x, dy, scale, bias, axis=axis, epsilon=epsilon, **weighting)
    exact, sizes = reference(x, dy, scale, bias, axis=axis, epsilon=epsilon, **weighting)
    assert_exact(actual, exact, sizes, axis=axis, sensitivity=sensitivity)


@both_codes
@pytest.mark.parametrize("name", HARD_INPUTS)
def test_hard_input(name, code):
    check(HARD_INPUTS[name], code=code, axis=0, scale=SCALE, bias=BIAS)


@both_codes
@pytest.mark.parametrize("positions", [(8,), (8, 8)])
@pytest.mark.parametrize("name", HARD_INPUTS)
def test_hard_input_of_several_positions_an_example(name, positions, code):
    x = HARD_INPUTS[name].reshape(-1, *positions, FEATURES)
    check(x, code=code, axis=tuple(range(x.ndim - 1)), scale=SCALE, bias=BIAS)


@both_codes
@pytest.mark.parametrize("distance", [30.0, 1e3, 1e6])
def test_sampled_positions_far_from_the_others(distance, code):
    """The worst case for a shift by the mean of a sample: all that is in it lies far away, 3.9 std from the mean."""
    x = np.random.default_rng(0).normal(1.0, 1.0, (32, 8, 8, FEATURES))
    x[sample(jnp.zeros(x.shape), (1, 2))] += distance
    x = x.astype(np.float32)
    with _cpu.force(code):
        found = jax.jit(lambda x: jaxbn.moments(x, (0, 1, 2)), compiler_options=FULL)(x)
    # The variance may lose sixteen times what rounding costs a sum of squares; no other input comes so close to that.
    bound = BOUND if code == "cpu" else 5e-6
    assert_exact(found._asdict(), *reference(x, axis=(0, 1, 2)), axis=(0, 1, 2), bound=bound)


@pytest.mark.parametrize("gathered", [8, 1], ids=["gathered", "in two sums"])
@pytest.mark.parametrize("name", ["mean 1e+06 std", "magnitude 1e18", "sorted", "constants", "first 64 rows far away"])
def test_hard_input_in_eight_shards(name, gathered, monkeypatch):
    monkeypatch.setattr(_measure, "GATHERED", gathered)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    moments = jax.shard_map(
        lambda x: jaxbn.moments(x, 0, axis_name="data"), mesh=mesh, in_specs=P("data"), out_specs=P()
    )
    x = HARD_INPUTS[name]
    assert_exact(jax.jit(moments)(x)._asdict(), *reference(x, axis=0), axis=0)


@both_codes
@pytest.mark.parametrize("name", HARD_INPUTS)
def test_hard_input_with_a_mask(name, code):
    where = np.random.default_rng(3).uniform(size=(ROWS, FEATURES)) > 0.4
    check(HARD_INPUTS[name], code=code, axis=0, scale=SCALE, bias=BIAS, where=where)


@pytest.mark.parametrize("name", HARD_INPUTS)
def test_hard_input_with_weights(name):
    weights = np.random.default_rng(4).uniform(0.1, 3.0, (ROWS, 1)).astype(np.float32)
    check(HARD_INPUTS[name], axis=0, scale=SCALE, bias=BIAS, weights=weights)


@pytest.fixture(scope="module")
def vmapped():
    """All hard inputs in one batched program, in which a `lax.cond` has become a select."""
    stacked = np.stack(list(HARD_INPUTS.values()))
    run = jax.jit(
        jax.vmap(functools.partial(measure, axis=0, epsilon=1e-5), in_axes=(0, None, None, None)), compiler_options=FULL
    )
    return jax.tree.map(np.asarray, run(stacked, cotangent((ROWS, FEATURES)), SCALE, BIAS))


@pytest.mark.parametrize("index", range(len(HARD_INPUTS)), ids=list(HARD_INPUTS))
def test_hard_input_under_vmap(vmapped, index):
    x = list(HARD_INPUTS.values())[index]
    exact, sizes = reference(x, cotangent(x.shape), SCALE, BIAS, axis=0)
    assert_exact({name: v[index] for name, v in vmapped.items()}, exact, sizes, axis=0)


@pytest.mark.parametrize("name", ["mean 0 std", "mean 1e+06 std", "magnitude 1e18", "outlier in the first row"])
@pytest.mark.parametrize("kind", ["ones", "normalized input", "large offset", "tiny", "large", "alternating"])
def test_hard_cotangent(name, kind):
    # Ones and the normalized input are the two directions whose gradient is zero but for epsilon.
    x, noise = HARD_INPUTS[name], cotangent((ROWS, FEATURES))
    wide = x.astype(np.float64)
    dy = {
        "ones": np.ones_like(x),
        "normalized input": (wide - wide.mean(0)) / wide.std(0),
        "large offset": 1e6 + noise,
        "tiny": 1e-15 * noise,
        "large": 1e15 * noise,
        "alternating": np.where(np.arange(ROWS)[:, None] % 2, 1.0, -1.0) + 0 * x,
    }[kind]
    check(x, dy, axis=0, scale=SCALE, bias=BIAS)


@pytest.mark.parametrize("name", ["mean 0 std", "mean 10 std", "mean 1e+06 std", "magnitude 1e18"])
def test_epsilon_that_does_not_dampen(name):
    check(HARD_INPUTS[name], axis=0, epsilon=1e-12, scale=SCALE, bias=BIAS)


def test_small_magnitude_with_an_epsilon_smaller_still():
    # var is 1e-30 and 1 / sqrt(var)^3 overflows float32. (Below 1e-16 squares of deviations would be flushed.)
    check(1e-15 * HARD_INPUTS["mean 0 std"], axis=0, epsilon=1e-32, scale=SCALE, bias=BIAS)


def test_small_magnitude_and_large_offset_with_an_epsilon_smaller_still():
    check(1e-9 * (1e6 + HARD_INPUTS["mean 0 std"]), axis=0, epsilon=1e-24, scale=SCALE, bias=BIAS)


def test_denormal_input():
    x = TINY / 8 * HARD_INPUTS["mean 0 std"]
    # The platform may read any of these as zero: an error of x below the smallest normal number, times scale r.
    check(x, axis=0, sensitivity=2.0 / np.sqrt(1e-5))


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("gap", [1.0, 0.25])
def test_two_values_per_feature(offset, gap):
    x = offset + np.array([[0.0, 1, 2, -3], [gap, 1 - gap, 2 + 2 * gap, gap]])
    check(x, axis=0, scale=SCALE, bias=BIAS)


@pytest.mark.parametrize("value", [0.1, 1e4, -3e10, 1e18])
@pytest.mark.parametrize("rows", [60, 61, 1000])
def test_constant_feature_whose_count_is_no_power_of_two(rows, value):
    # The sum of equal values over a count that is no power of two is rounded; the deviations are zero all the same.
    check(np.broadcast_to(value * np.array([1, 1.5, -0.7, 3]), (rows, 4)), axis=0, scale=SCALE, bias=BIAS)


@pytest.mark.parametrize(
    "offset", [1e2, pytest.param(0.0, marks=pytest.mark.slow), pytest.param(1e4, marks=pytest.mark.slow)]
)
def test_three_million_values_per_feature(offset):
    x = np.random.default_rng(0).normal(offset, 1.0, (3_000_000, 2))
    check(x, axis=0)


def test_three_million_values_in_one_feature_map():
    x = np.random.default_rng(0).normal(1e3, 1.0, (3, 1000, 1000, 1))
    check(x, axis=(0, 1, 2))


LAYOUTS = {
    "lesson": ((60, 100), (0,)),
    "channels last": ((8, 14, 14, 32), (0, 1, 2)),
    "channels first": ((8, 32, 14, 14), (0, 2, 3)),
    "one feature for all": ((8, 14, 3), (0, 1, 2)),
    "several feature axes": ((64, 5, 7), (0,)),
    "first axis kept": ((6, 200), (1,)),
}


@pytest.mark.parametrize("offset", [1e5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout, offset):
    shape, axis = LAYOUTS[layout]
    check(np.random.default_rng(5).normal(offset, 1.0, shape), axis=axis)


@pytest.mark.parametrize("name", ["mean 1e+06 std", "magnitude 1e18", "features of very different size"])
def test_moments_alone_are_as_exact(name):
    actual = jax.jit(functools.partial(jaxbn.moments, axis=0))(HARD_INPUTS[name])
    assert_exact(actual._asdict(), *reference(HARD_INPUTS[name], axis=0), axis=0)


def test_mean_keeps_what_its_rounding_to_float32_lost():
    # At |mean| / std = 1e6 a float32 mean is wrong by up to 3% of std; y then has a mean of its own of that size.
    y, _ = jaxbn.batch_normalize(jnp.asarray(HARD_INPUTS["mean 1e+06 std"]), axis=0, epsilon=1e-5)
    # 1,024 values of about one, each rounded by at most 2^-24 times a few operations.
    np.testing.assert_allclose(np.mean(np.asarray(y, np.float64), axis=0), 0.0, atol=1e-6)


@pytest.mark.parametrize("name", ["mean 1e+06 std", "magnitude 1e18", "outlier in the first row"])
def test_complex_hard_input(name):
    real, imaginary = HARD_INPUTS[name], np.roll(HARD_INPUTS[name], 1, axis=1)
    x, dy = (real + 1j * imaginary).astype(np.complex64), cotangent(real.shape) + 1j * cotangent(real.shape, 8)
    actual = measure_jit("cpu", x, dy.astype(np.complex64), SCALE, BIAS, axis=0, epsilon=1e-5)
    exact, sizes = reference(x, dy, SCALE, BIAS, axis=0)
    assert_exact(actual, exact, sizes, axis=0)


@pytest.mark.slow
def test_counts_beyond_the_integers_of_float32():
    # 2^24 + 1 is no float32: a running sum of ones would stop at 2^24.
    x = np.random.default_rng(0).normal(3.0, 1.0, (20_000_000,)).astype(np.float32)
    where = np.ones_like(x, bool)
    actual = jax.jit(functools.partial(jaxbn.moments, axis=0))(x, where=where)
    assert_exact(actual._asdict(), *reference(x, axis=0), axis=0)
