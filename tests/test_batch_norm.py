"""The Normalizer that batch_norm builds: what it computes, and the contract that every Normalizer keeps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import BOUND, assert_exact, reference

from jaxbn import batch_norm

RNG = np.random.default_rng(0)
# Both sides keep the promise of 1e-6 of the values' size, so that they differ by twice that at most.
SAME = {"rtol": 2e-6, "atol": 2e-6}
KEY = jax.random.key(0)
OPTIONS = {
    "defaults": {},
    "debias": {"debias": True},
    "cumulative": {"decay": None},
    "unbiased": {"unbiased": True},
    "ghost": {"group_size": 4},
    "fused": {"activation": jax.nn.relu},
    "no affine": {"use_scale": False, "use_bias": False},
    "bfloat16 output": {"dtype": jnp.bfloat16},
}


def draw(*shape, offset=3.0):
    return RNG.normal(offset, 2.0, shape).astype(np.float32)


def trained(norm, x):
    """Variables with random params and random running statistics, as if in the midst of training."""
    variables = norm.init(KEY, x)
    params = {name: jnp.asarray(draw(*v.shape, offset=1.0)) for name, v in variables["params"].items()}
    stats = {name: jnp.asarray(draw(*v.shape) ** 2 + 0.5, v.dtype) for name, v in variables["batch_stats"].items()}
    return {"params": params, "batch_stats": stats}


def train(norm, variables, x, **kwargs):
    return jax.jit(lambda v, x: norm.apply(v, x, train=True, **kwargs))(variables, x)


@pytest.mark.parametrize(
    ("shape", "feature_axis"),
    [
        ((12, 5), -1),
        ((4, 3, 3, 5), -1),
        ((4, 5, 3, 3), 1),
        ((6, 4, 5), (1, 2)),
        ((6, 4, 5), (-1, -2)),
        ((3, 6, 2, 5, 2), (0, 3)),
        ((12,), ()),
    ],
)
def test_training_equals_the_oracle_for_any_feature_axis(shape, feature_axis):
    x, norm = draw(*shape), batch_norm(feature_axis=feature_axis, decay=0.75)
    variables = trained(norm, x)
    y, batch_stats = train(norm, variables, x)
    kept = {a % len(shape) for a in np.atleast_1d(feature_axis).astype(int)}
    axis = tuple(a for a in range(len(shape)) if a not in kept)
    exact, sizes = reference(x, scale=variables["params"]["scale"], bias=variables["params"]["bias"], axis=axis)
    assert_exact({"y": y}, exact, sizes, axis=axis)
    for name in ("mean", "var"):
        expected = 0.75 * np.asarray(variables["batch_stats"][name]) + 0.25 * getattr(exact, name)
        np.testing.assert_allclose(batch_stats[name], expected, rtol=BOUND)


def test_evaluation_takes_the_running_statistics():
    x, norm = draw(12, 5), batch_norm(epsilon=0.1)
    variables = trained(norm, x)
    params, stats = jax.tree.map(np.float64, (variables["params"], variables["batch_stats"]))
    other = draw(7, 5)
    y, _ = norm.apply(variables, other, train=False)
    expected = params["scale"] * (other - stats["mean"]) / np.sqrt(stats["var"] + 0.1) + params["bias"]
    np.testing.assert_allclose(y, expected, **SAME)


def test_evaluation_does_not_depend_on_the_rest_of_the_batch():
    x, norm = draw(12, 5), batch_norm()
    variables = trained(norm, x)
    apply = jax.jit(lambda x: norm.apply(variables, x, train=False)[0])
    chex.assert_trees_all_close(apply(x)[:1], apply(x[:1]), **SAME)


def test_debiased_evaluation_equals_the_batch_after_one_step():
    x, norm = draw(12, 5), batch_norm(debias=True)
    variables = norm.init(KEY, x)
    y, stats = train(norm, variables, x)
    chex.assert_trees_all_close(norm.apply({**variables, "batch_stats": stats}, x, train=False)[0], y, **SAME)


def test_initial_values_names_shapes_and_dtypes():
    variables = batch_norm(feature_axis=1).init(KEY, draw(4, 5, 3, 3))
    chex.assert_trees_all_equal(
        variables,
        {
            "params": {"scale": jnp.ones(5), "bias": jnp.zeros(5)},
            "batch_stats": {"mean": jnp.zeros(5), "var": jnp.ones(5)},
        },
    )


def test_unused_parameters_have_no_entry():
    x = draw(4, 5)
    for scale in (False, True):
        for bias in (False, True):
            params = batch_norm(use_scale=scale, use_bias=bias).init(KEY, x)["params"]
            assert ("scale" in params, "bias" in params) == (scale, bias)


def test_initializers_and_param_dtype_are_used():
    norm = batch_norm(
        scale_init=jax.nn.initializers.constant(2.0),
        bias_init=jax.nn.initializers.normal(),
        param_dtype=jnp.bfloat16,
    )
    variables = norm.init(KEY, draw(4, 5))
    chex.assert_type(list(variables["params"].values()), jnp.bfloat16)
    np.testing.assert_array_equal(variables["params"]["scale"], 2)
    assert np.std(variables["params"]["bias"]) > 0
    chex.assert_type(list(variables["batch_stats"].values()), jnp.float32)


@pytest.mark.parametrize("options", OPTIONS)
def test_nothing_is_mutated(options):
    x, norm = draw(8, 5), batch_norm(**OPTIONS[options])
    variables = trained(norm, x)
    before = {collection: dict(entries) for collection, entries in variables.items()}
    for mode in (True, False):
        # Arrays cannot change and dictionaries could: tracing is enough to see it.
        jax.eval_shape(lambda x, mode=mode: norm.apply(variables, x, train=mode), x)
    assert {collection: set(entries) for collection, entries in variables.items()} == {
        collection: set(entries) for collection, entries in before.items()
    }
    for collection, entries in before.items():
        assert all(variables[collection][name] is value for name, value in entries.items())


def test_second_eager_call_compiles_nothing():
    x, norm = draw(8, 5), batch_norm()
    variables, compiled = norm.init(KEY, x), []
    norm.apply(variables, x, train=True)

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        norm.apply(variables, x, train=True)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(compiled) == 0, f"{len(compiled)} programs compiled, {sum(compiled):.2f} s"


class TestTransformations(chex.TestCase):
    """Jit, vmap, scan, checkpoint and grad around apply."""

    @chex.all_variants(without_device=False, with_pmap=False)
    def test_every_way_to_run_it_gives_the_same(self):
        x, norm = draw(8, 5), batch_norm()
        variables = trained(norm, x)
        actual = self.variant(lambda v, x: norm.apply(v, x, train=True))(variables, x)
        chex.assert_trees_all_close(actual, train(norm, variables, x), **SAME)

    def test_checkpoint_gives_the_same_gradient(self):
        x, norm = draw(8, 5), batch_norm(activation=jax.nn.silu)
        variables = trained(norm, x)

        def loss(x, wrap):
            return jnp.sum(jnp.sin(wrap(lambda x: norm.apply(variables, x, train=True)[0])(x)))

        plain, checkpointed = (jax.jit(jax.grad(lambda x, w=w: loss(x, w)))(x) for w in (lambda f: f, jax.checkpoint))
        chex.assert_trees_all_close(plain, checkpointed, **SAME)


def test_dense_equals_one_by_one_convolution():
    x, norm = draw(12, 5), batch_norm()
    variables = trained(norm, x)
    dense, spatial = train(norm, variables, x), train(norm, variables, x[:, None, None, :])
    chex.assert_trees_all_close(dense[0], spatial[0][:, 0, 0], **SAME)
    chex.assert_trees_all_close(dense[1], spatial[1], **SAME)


@pytest.mark.parametrize("mode", [True, False])
def test_channels_first_equals_channels_last(mode):
    x = draw(4, 3, 6, 5)
    last, first = batch_norm(), batch_norm(feature_axis=1)
    variables = trained(last, x)
    y, stats = last.apply(variables, x, train=mode)
    y_first, stats_first = first.apply(variables, np.moveaxis(x, -1, 1), train=mode)
    chex.assert_trees_all_close(y, jnp.moveaxis(y_first, 1, -1), **SAME)
    chex.assert_trees_all_close(stats, stats_first, **SAME)


def test_output_has_mean_bias_and_deviation_scale():
    x, norm = draw(64, 5), batch_norm(epsilon=0.0)
    variables = trained(norm, x)
    y = np.asarray(train(norm, variables, x)[0], np.float64)
    np.testing.assert_allclose(y.mean(0), variables["params"]["bias"], **SAME)
    np.testing.assert_allclose(y.std(0), np.abs(variables["params"]["scale"]), **SAME)


def test_shift_and_positive_scale_of_the_input_drop_out():
    x, norm = draw(64, 5), batch_norm(epsilon=0.0)
    variables = trained(norm, x)
    # A scale that is a power of two changes no digit; a shift costs x roundings of its new size.
    chex.assert_trees_all_close(train(norm, variables, x)[0], train(norm, variables, 16 * x)[0], **SAME)
    shifted = train(norm, variables, x + np.float32(0.125))[0]
    chex.assert_trees_all_close(train(norm, variables, x)[0], shifted, rtol=1e-5, atol=1e-5)


def test_epsilon_stands_inside_the_square_root():
    x = jnp.array([[-1.0], [1.0]])
    y, _ = batch_norm(epsilon=3.0).apply(batch_norm().init(KEY, x), x, train=True)
    np.testing.assert_array_equal(y, x / 2)  # sqrt(1 + 3) is 2.


def test_single_value_gives_the_bias_where_it_is_allowed():
    x = draw(1, 5)
    norm = batch_norm(allow_single_value=True)
    variables = trained(norm, x)
    y, stats = norm.apply(variables, x, train=True)
    np.testing.assert_array_equal(y[0], variables["params"]["bias"])
    chex.assert_tree_all_finite(stats)


def test_flags_are_read_as_numpy_booleans_too():
    x, norm = draw(8, 5), batch_norm()
    variables = norm.init(KEY, x)
    chex.assert_trees_all_equal(norm.apply(variables, x, train=np.bool_(False)), norm.apply(variables, x, train=False))


def test_statistics_that_are_not_finite_leave_the_running_ones_alone():
    x, norm = draw(8, 5), batch_norm()
    variables = trained(norm, x)
    x[3, 2] = np.nan
    chex.assert_trees_all_equal(train(norm, variables, x)[1], variables["batch_stats"])
    _, stats = train(batch_norm(skip_nonfinite=False), variables, x)
    np.testing.assert_array_equal(np.isnan(stats["mean"]), np.arange(5) == 2)


@pytest.mark.parametrize(
    ("dtype", "out", "expected"),
    [
        (jnp.float32, None, jnp.float32),
        (jnp.bfloat16, None, jnp.bfloat16),
        (jnp.float16, None, jnp.float16),
        (jnp.bfloat16, jnp.float32, jnp.float32),
        (jnp.float32, jnp.bfloat16, jnp.bfloat16),
        (jnp.complex64, None, jnp.complex64),
    ],
)
def test_dtypes(dtype, out, expected):
    x, norm = jnp.asarray(draw(8, 5), dtype), batch_norm(dtype=out)
    variables = norm.init(KEY, x)
    mean_dtype = jnp.complex64 if dtype == jnp.complex64 else jnp.float32
    for mode in (True, False):
        y, stats = jax.eval_shape(lambda x, mode=mode: norm.apply(variables, x, train=mode), x)
        assert (y.dtype, stats["mean"].dtype, stats["var"].dtype) == (expected, mean_dtype, jnp.float32)


def test_low_precision_output_is_the_float32_one_rounded_once():
    x = jnp.asarray(draw(64, 5, offset=20), jnp.bfloat16)
    wide, narrow = batch_norm(dtype=jnp.float32), batch_norm()
    variables = trained(narrow, x)
    expected = train(wide, variables, x)[0].astype(jnp.bfloat16)
    actual = train(narrow, variables, x)[0]
    # Where float32 programs differ in the last place a tie may round the other way: one bfloat16 step of 2^-8 at most.
    chex.assert_trees_all_close(*(v.astype(jnp.float32) for v in (actual, expected)), rtol=2**-7)
    assert np.mean(np.asarray(actual == expected)) > 0.99


def test_float64_throughout_under_x64():
    with jax.enable_x64(True):
        x = RNG.normal(1e4, 1.0, (50, 3))
        norm = batch_norm(param_dtype=jnp.float64)
        variables = norm.init(KEY, x)
        y, stats = norm.apply(variables, x, train=True)
        chex.assert_type([y, stats["mean"], stats["var"]], jnp.float64)
        assert_exact({"y": y}, *reference(x, axis=0), axis=0, bound=1e-13)  # BOUND, by the ratio of the precisions.
