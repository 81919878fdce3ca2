"""What is refused, with which exception, at trace time, in words that say what came in and what to do.

Every call runs under `jax.eval_shape`: what raises here raises before anything is compiled or computed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from jaxbn import batch_norm
from jaxbn._checks import SingleValueError

KEY = jax.random.key(0)


def refused(exception, call, *arguments, says):
    """Check that the traced call raises, and that the message holds every fragment in `says`."""
    with pytest.raises(exception) as error:
        jax.eval_shape(call, *arguments)
    assert type(error.value) in (ValueError, TypeError, SingleValueError)
    missing = [fragment for fragment in says if fragment not in str(error.value)]
    assert not missing, f"the message lacks {missing}: {error.value}"


def train(norm, x, init_from=None, **kwargs):
    variables = norm.init(KEY, jnp.zeros((8, 5)) if init_from is None else init_from)
    return norm.apply(variables, x, train=True, **kwargs)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("shape", [(8, 4), (8, 1), (2, 3, 3, 6)])
def test_wrong_feature_count(shape, mode):
    norm = batch_norm()
    variables = norm.init(KEY, jnp.zeros((8, 5)))
    refused(
        ValueError,
        lambda x: norm.apply(variables, x, train=mode),
        jnp.zeros(shape),
        says=[str(shape), "(5,)", "feature_axis=-1"],
    )


def test_features_on_another_axis_than_the_one_named():
    norm = batch_norm(feature_axis=1)
    variables = norm.init(KEY, jnp.zeros((2, 5, 4, 4)))
    refused(
        ValueError,
        lambda x: norm.apply(variables, x, train=True),
        jnp.zeros((2, 4, 4, 5)),
        says=["(2, 4, 4, 5)", "(5,)", "feature_axis=1"],
    )


@pytest.mark.parametrize("mode", [True, False])
def test_scalar(mode):
    norm = batch_norm()
    variables = norm.init(KEY, jnp.zeros((8, 5)))
    refused(
        ValueError, lambda x: norm.apply(variables, x, train=mode), jnp.zeros(()), says=["feature_axis=-1", "rank 0"]
    )


def test_rank_that_leaves_no_axis_to_reduce():
    refused(ValueError, lambda x: train(batch_norm(), x), jnp.zeros(5), says=["(5,)", "feature_axis=-1"])


def test_rank_too_low_for_the_feature_axis():
    norm = batch_norm(feature_axis=(1, 2))
    variables = norm.init(KEY, jnp.zeros((8, 4, 5)))
    refused(
        ValueError,
        lambda x: norm.apply(variables, x, train=True),
        jnp.zeros((8, 4)),
        says=["feature_axis=(1, 2)", "rank 2"],
    )


@pytest.mark.parametrize("axis", [2, -3, (0, 5)])
def test_feature_axis_out_of_range(axis):
    refused(
        ValueError,
        lambda x: batch_norm(feature_axis=axis).init(KEY, x),
        jnp.zeros((8, 5)),
        says=[f"feature_axis={axis}", "rank 2"],
    )


@pytest.mark.parametrize("axis", [(1, 1), (1, -1), (-1, 1)])
def test_feature_axis_named_twice(axis):
    refused(
        ValueError,
        lambda x: batch_norm(feature_axis=axis).init(KEY, x),
        jnp.zeros((8, 5)),
        says=[f"feature_axis={axis}", "twice"],
    )


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_])
def test_integer_input(dtype, mode):
    norm = batch_norm()
    variables = norm.init(KEY, jnp.zeros((8, 5)))
    refused(
        TypeError,
        lambda x: norm.apply(variables, x, train=mode),
        jnp.zeros((8, 5), dtype),
        says=[jnp.dtype(dtype).name, "astype"],
    )


def test_integer_input_to_the_functions():
    x = jnp.zeros((8, 5), jnp.int32)
    refused(TypeError, lambda x: jaxbn.moments(x, 0), x, says=["int32", "astype"])
    refused(TypeError, lambda x: jaxbn.batch_normalize(x, axis=0, epsilon=1e-5), x, says=["int32", "astype"])
    refused(
        TypeError,
        lambda x: jaxbn.normalize(x, jnp.zeros(5), jnp.ones(5), axis=0, epsilon=1e-5),
        x,
        says=["int32", "astype"],
    )


def test_unbound_axis_name():
    norm = batch_norm(axis_name="data")
    refused(
        ValueError,
        lambda x: train(norm, x),
        jnp.zeros((8, 5)),
        says=["axis_name='data'", "shard_map", "axis_name=None"],
    )


def test_unbound_axis_name_does_not_matter_to_init_and_evaluation():
    norm, x = batch_norm(axis_name="data"), jnp.zeros((8, 5))
    assert norm.apply(norm.init(KEY, x), x, train=False)[0].shape == x.shape


@pytest.mark.parametrize(
    ("shape", "options"),
    [((1, 5), {}), ((1, 1, 1, 5), {}), ((1, 5, 1, 1), {"feature_axis": 1}), ((8, 5), {"group_size": 1})],
)
def test_single_value_per_feature(shape, options):
    refused(
        ValueError,
        lambda x: train(batch_norm(**options), x, init_from=x),
        jnp.zeros(shape),
        says=[str(shape), "one value per feature", "train=False", "allow_single_value=True"],
    )


def test_single_value_is_fine_in_evaluation():
    norm, x = batch_norm(), jnp.zeros((1, 5))
    assert norm.apply(norm.init(KEY, x), x, train=False)[0].shape == x.shape


def test_one_image_has_many_values_per_feature():
    norm = batch_norm()
    jax.eval_shape(lambda x: train(norm, x, init_from=x), jnp.zeros((1, 3, 3, 5)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32])
def test_mask_that_is_not_boolean(dtype):
    refused(
        TypeError,
        lambda x, where: train(batch_norm(), x, where=where),
        jnp.zeros((8, 5)),
        jnp.ones((8, 1), dtype),
        says=["where", jnp.dtype(dtype).name, "weights"],
    )


def test_complex_weights():
    refused(
        TypeError,
        lambda x, w: train(batch_norm(), x, weights=w),
        jnp.zeros((8, 5)),
        jnp.ones((8, 1), jnp.complex64),
        says=["weights", "complex64"],
    )


@pytest.mark.parametrize("name", ["where", "weights"])
@pytest.mark.parametrize("shape", [(8,), (7, 1), (8, 4), (1, 8, 5), (2, 1, 1)])
def test_mask_or_weights_that_do_not_broadcast(shape, name):
    refused(
        ValueError,
        lambda x, v: train(batch_norm(), x, **{name: v}),
        jnp.zeros((8, 5)),
        jnp.ones(shape, bool if name == "where" else jnp.float32),
        says=[name, str(shape), "(8, 5)", "(8, 1)"],
    )


@pytest.mark.parametrize("epsilon", [-1e-5, float("nan"), float("inf")])
def test_bad_epsilon(epsilon):
    with pytest.raises(ValueError, match="epsilon"):
        batch_norm(epsilon=epsilon)


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan"), 99, np.float32(1.5)])
def test_bad_decay(decay):
    with pytest.raises(ValueError, match="decay"):
        batch_norm(decay=decay)


def test_debias_without_decay():
    with pytest.raises(ValueError, match="debias"):
        batch_norm(decay=None, debias=True)


@pytest.mark.parametrize("group_size", [0, -4])
def test_group_size_below_one(group_size):
    with pytest.raises(ValueError, match=f"group_size={group_size}"):
        batch_norm(group_size=group_size)


@pytest.mark.parametrize("group_size", [3, 16])
def test_group_size_that_does_not_divide_the_batch(group_size):
    refused(
        ValueError,
        lambda x: train(batch_norm(group_size=group_size), x),
        jnp.zeros((8, 5)),
        says=[f"group_size={group_size}", "(8, 5)", "divi"],
    )


def test_groups_of_devices_without_an_axis():
    with pytest.raises(ValueError, match="axis_name"):
        batch_norm(axis_index_groups=[[0, 1]])


def test_groups_of_devices_of_unequal_size():
    with pytest.raises(ValueError, match="unequal"):
        batch_norm(axis_name="data", axis_index_groups=[[0, 1, 2], [3]])


def test_traced_mode():
    norm = batch_norm()
    variables = norm.init(KEY, jnp.zeros((8, 5)))
    refused(
        TypeError,
        lambda x, mode: norm.apply(variables, x, train=mode),
        jnp.zeros((8, 5)),
        jnp.array(True),
        says=["train=", "static"],
    )


def test_variables_without_statistics():
    norm = batch_norm()
    params = {"params": norm.init(KEY, jnp.zeros((8, 5)))["params"]}
    refused(ValueError, lambda x: norm.apply(params, x, train=True), jnp.zeros((8, 5)), says=["params", "batch_stats"])


@pytest.mark.parametrize("mode", [True, False], ids=["train", "test"])
@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ()),
        ({}, ("mean",)),
        ({}, ("mean", "var", "weight")),
        (dict(debias=True), ("mean", "var")),
        (dict(decay=None), ("mean", "var")),
    ],
    ids=["nothing", "no variance", "weight without debias", "old checkpoint and debias", "old checkpoint and no decay"],
)
def test_statistics_that_the_hyperparameters_do_not_expect(options, names, mode):
    norm = batch_norm(**options)
    variables = norm.init(KEY, jnp.zeros((8, 5))) | {"batch_stats": {name: jnp.ones(5) for name in names}}
    expected = "['mean', 'var', 'weight']" if options else "['mean', 'var']"
    refused(
        ValueError,
        lambda x: norm.apply(variables, x, train=mode),
        jnp.zeros((8, 5)),
        says=["batch_stats", str(sorted(names)), f"expected {expected}"],
    )


@pytest.mark.parametrize("missing", ["scale", "bias"])
def test_variables_without_a_parameter_that_is_used(missing):
    # Taken as "no scale" it would be a silent change of the model.
    norm = batch_norm()
    variables = norm.init(KEY, jnp.zeros((8, 5)))
    del variables["params"][missing]
    refused(ValueError, lambda x: norm.apply(variables, x, train=True), jnp.zeros((8, 5)), says=[missing])


def test_residual_of_another_shape():
    refused(
        ValueError,
        lambda x, r: train(batch_norm(), x, residual=r),
        jnp.zeros((8, 5)),
        jnp.zeros((8, 1)),
        says=["residual", "(8, 1)", "(8, 5)"],
    )


def test_statistics_of_another_shape_than_the_features():
    refused(
        ValueError,
        lambda x, v: jaxbn.normalize(x, v, v, axis=0, epsilon=1e-5),
        jnp.zeros((8, 5)),
        jnp.zeros(4),
        says=["mean", "(4,)", "(5,)"],
    )


@pytest.mark.parametrize("axis", [2, -3, (0, 0), (0, -2)])
def test_reduced_axis_out_of_range_or_named_twice(axis):
    refused(ValueError, lambda x: jaxbn.moments(x, axis), jnp.zeros((8, 5)), says=[f"axis={axis}", "rank 2"])
