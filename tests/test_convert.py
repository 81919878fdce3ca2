"""Conversion against the packages themselves: outputs agree, training goes on alike, numbers come back as they went."""

import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from normalizers import CASES, ready

import jaxbn
from jaxbn import convert

os.environ.setdefault("KERAS_BACKEND", "jax")  # Read when keras is imported.

# Two float32 implementations of the same formula, each a few roundings from the exact result, on values up to 10.
CLOSE = dict(rtol=1e-5, atol=1e-5)
IMAGES = np.random.default_rng(0).normal(1, 2, size=(6, 3, 5, 4)).astype(np.float32)  # NCHW
LAST = np.ascontiguousarray(np.moveaxis(IMAGES, 1, -1))


def drawn(seed=1, features=3):
    """Variables in which no entry is trivial."""
    draw = np.random.default_rng(seed).normal(size=(4, features)).astype(np.float32)
    params = {"scale": jnp.array(1 + 0.3 * draw[0]), "bias": jnp.array(draw[1])}
    return {"params": params, "batch_stats": {"mean": jnp.array(draw[2]), "var": jnp.exp(jnp.array(draw[3]))}}


def assert_same(actual, expected):
    jax.tree.map(partial(np.testing.assert_allclose, **CLOSE), actual, expected)


def assert_identical(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def train_step(arguments, variables, x):
    y, stats = jaxbn.batch_norm(**arguments).apply(variables, x, train=True)
    return y, {**variables, "batch_stats": stats}


def evaluated(arguments, variables, x):
    return jaxbn.batch_norm(**arguments).apply(variables, x, train=False)[0]


# torch


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="the torch half of the conversion is checked against torch")


TORCH_ARGUMENTS = {
    "defaults": {},
    "own": dict(eps=1e-2, momentum=0.3),
    "plain": dict(affine=False),
    "cumulative": dict(momentum=None),
}


def trained_torch(torch, **arguments):
    """A torch layer with every number drawn, trained for two steps."""
    layer = torch.nn.BatchNorm2d(3, **arguments)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
        for scale in (1, 3):
            layer(scale * torch.from_numpy(IMAGES) + scale)
    return layer


@pytest.mark.parametrize("name", TORCH_ARGUMENTS)
def test_torch_layer_gives_the_same_outputs_at_test_time(torch, name):
    arguments = TORCH_ARGUMENTS[name]
    layer = trained_torch(torch, **arguments).eval()
    variables = convert.from_torch(layer.state_dict(), cumulative=name == "cumulative")
    y = evaluated(convert.arguments_from_torch(**arguments), variables, IMAGES)
    assert_same(y, layer(torch.from_numpy(IMAGES)).detach().numpy())


@pytest.mark.parametrize("name", TORCH_ARGUMENTS)
def test_torch_layer_trains_on_alike(torch, name):
    arguments = TORCH_ARGUMENTS[name]
    layer = trained_torch(torch, **arguments)
    variables = convert.from_torch(layer.state_dict(), cumulative=name == "cumulative")
    y, variables = train_step(convert.arguments_from_torch(**arguments), variables, IMAGES)
    assert_same(y, layer(torch.from_numpy(IMAGES)).detach().numpy())
    stats = {"mean": layer.running_mean.numpy(), "var": layer.running_var.numpy()}
    assert_same({name: variables["batch_stats"][name] for name in stats}, stats)


@pytest.mark.parametrize("name", TORCH_ARGUMENTS)
def test_torch_state_comes_back_as_it_went(torch, name):
    layer = trained_torch(torch, **TORCH_ARGUMENTS[name])
    variables = convert.from_torch(layer.state_dict(), cumulative=name == "cumulative")
    back = convert.to_torch(variables, num_batches_tracked=None if name == "cumulative" else 2)
    expected = {key: value.numpy() for key, value in layer.state_dict().items()}
    assert_identical(back, expected)
    assert {k: v.dtype for k, v in back.items()} == {k: v.dtype for k, v in expected.items()}


def test_torch_takes_our_variables(torch):
    variables, layer = drawn(), torch.nn.BatchNorm2d(3).eval()
    tensors = {name: torch.from_numpy(value) for name, value in convert.to_torch(variables).items()}
    layer.load_state_dict(tensors, strict=True)
    ours = evaluated(dict(feature_axis=1), variables, IMAGES)
    assert_same(layer(torch.from_numpy(IMAGES)).detach().numpy(), ours)


def test_torch_network_converts_by_prefix_and_path(torch):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), trained_torch(torch), torch.nn.BatchNorm2d(3))
    state = network.state_dict()
    assert convert.torch_prefixes(state) == ["1", "2"]
    paths = {"1": "stem/norm", "2": "last"}
    variables = convert.layers_from_torch(state, paths)
    back = convert.layers_to_torch(variables, paths)
    network.load_state_dict({name: torch.from_numpy(value) for name, value in back.items()}, strict=False)
    assert_identical(variables["batch_stats"]["stem"]["norm"]["mean"], network[1].running_mean.numpy())
    assert set(back) == {name for name in state if not name.startswith("0.")}


def test_torch_parameters_that_need_a_gradient_and_bfloat16_are_read(torch):
    layer = torch.nn.BatchNorm2d(3).to(torch.bfloat16)
    state = dict(layer.named_parameters()) | dict(layer.named_buffers())
    variables = convert.from_torch(state)
    assert variables["params"]["scale"].dtype == jnp.bfloat16
    assert variables["batch_stats"]["var"].dtype == jnp.float32


def test_variables_do_not_share_memory_with_torch(torch):
    layer = torch.nn.BatchNorm2d(3)
    variables = convert.from_torch(layer.state_dict())
    layer.running_mean.fill_(7)
    assert_identical(variables["batch_stats"]["mean"], np.zeros(3, np.float32))


def test_safetensors_files_carry_a_state_dict_both_ways(torch, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="files are checked against the safetensors package")
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    state = convert.to_torch(drawn(), "bn")
    convert.write_safetensors(ours, state)
    assert_identical({name: value.numpy() for name, value in safetensors.load_file(ours).items()}, state)
    safetensors.save_file(trained_torch(torch).state_dict(), theirs)
    expected = convert.from_torch(trained_torch(torch).state_dict())
    assert_identical(convert.from_torch(convert.read_safetensors(theirs)), expected)


def test_debiased_averages_are_corrected_for_torch():
    stats = {"mean": jnp.full(3, 0.5), "var": jnp.full(3, 1.0), "weight": jnp.full(3, 0.25)}
    state = convert.to_torch({"params": {}, "batch_stats": stats}, debias=True)
    assert_identical(state["running_mean"], np.full(3, 2.0))
    assert_identical(state["running_var"], np.full(3, 4.0))
    assert state["num_batches_tracked"] == 0


def test_a_scale_alone_gets_the_bias_that_torch_wants():
    variables = drawn()
    del variables["params"]["bias"]
    assert_identical(convert.to_torch(variables)["bias"], np.zeros(3))


def test_a_prefix_without_statistics_is_answered_with_those_that_have_them():
    with pytest.raises(ValueError, match=r"'a\.bn', 'b'"):
        convert.from_torch({"a.bn.running_mean": 0, "b.running_mean": 0, "c.weight": 0}, "c")


# Keras


@pytest.fixture
def keras():
    return pytest.importorskip("keras", reason="the Keras half of the conversion is checked against Keras")


KERAS_ARGUMENTS = {
    "defaults": {},
    "own": dict(momentum=0.7, epsilon=1e-2, axis=1),
    "no scale": dict(scale=False),
    "no center": dict(center=False),
}


def trained_keras(keras, **arguments):
    layer = keras.layers.BatchNormalization(**arguments)
    layer.build(IMAGES.shape if arguments.get("axis") == 1 else LAST.shape)
    rng = np.random.default_rng(3)
    layer.set_weights([np.exp(rng.normal(size=3)).astype(np.float32) for _ in layer.weights])
    return layer, IMAGES if arguments.get("axis") == 1 else LAST


@pytest.mark.parametrize("name", KERAS_ARGUMENTS)
def test_keras_layer_gives_the_same_outputs_and_trains_on_alike(keras, name):
    layer, x = trained_keras(keras, **KERAS_ARGUMENTS[name])
    arguments = convert.arguments_from_keras(layer.get_config())
    variables = convert.from_keras({w.name: w for w in layer.weights})
    with jax.numpy_rank_promotion("allow"):
        assert_same(evaluated(arguments, variables, x), layer(x, training=False))
        y, moved = train_step(arguments, variables, x)
        assert_same(y, layer(x, training=True))
    assert_same(moved["batch_stats"], {"mean": layer.moving_mean, "var": layer.moving_variance})


@pytest.mark.parametrize("name", KERAS_ARGUMENTS)
def test_keras_weights_come_back_as_they_went(keras, name):
    layer, _ = trained_keras(keras, **KERAS_ARGUMENTS[name])
    weights = convert.to_keras(convert.from_keras({w.path: w for w in layer.weights}))
    assert_identical(list(weights.values()), [np.asarray(w) for w in layer.weights])


def test_weights_without_moving_statistics_are_refused():
    with pytest.raises(ValueError, match="gamma"):
        convert.from_keras({"gamma": np.ones(3)})


# Haiku


@pytest.fixture
def haiku():
    return pytest.importorskip("haiku", reason="the Haiku half of the conversion is checked against Haiku")


HAIKU_ARGUMENTS = {
    "both": dict(create_scale=True, create_offset=True, decay_rate=0.9),
    "scale": dict(create_scale=True, create_offset=False, decay_rate=0.99, eps=1e-2),
    "first": dict(create_scale=False, create_offset=True, decay_rate=0.5, data_format="channels_first"),
    "plain": dict(create_scale=False, create_offset=False, decay_rate=0.0),
}


def haiku_layer(haiku, arguments):
    transformed = haiku.transform_with_state(lambda x, train: haiku.BatchNorm(**arguments)(x, train))
    return jax.jit(partial(transformed.apply, rng=None), static_argnames="train"), transformed.init


def trained_haiku(haiku, arguments, x):
    """Apply function, params drawn, and state after two steps."""
    apply, init = haiku_layer(haiku, arguments)
    params, state = init(jax.random.key(0), x, True)
    params = jax.tree.map(lambda p: p + jnp.arange(3.0).reshape(p.shape), params)
    for scale in (1, 3):
        _, state = apply(params, state, x=scale * x + scale, train=True)
    return apply, params, state


@pytest.mark.parametrize("name", HAIKU_ARGUMENTS)
def test_haiku_layer_gives_the_same_outputs_and_trains_on_alike(haiku, name):
    arguments = HAIKU_ARGUMENTS[name]
    x = IMAGES if "data_format" in arguments else LAST
    with jax.numpy_rank_promotion("allow"):
        apply, params, state = trained_haiku(haiku, arguments, x)
        variables = convert.from_haiku(params, state, decay=arguments["decay_rate"])
        ours = convert.arguments_from_haiku(**arguments)
        assert_same(evaluated(ours, variables, x), apply(params, state, x=x, train=False)[0])
        y, moved = train_step(ours, variables, x)
        expected, state = apply(params, state, x=x, train=True)
    assert_same(y, expected)
    averages = [state[f"batch_norm/~/{name}_ema"]["average"].ravel() for name in ("mean", "var")]
    assert_same(list(jaxbn.running_moments(moved["batch_stats"], debias=True)), averages)


@pytest.mark.parametrize("name", HAIKU_ARGUMENTS)
def test_haiku_state_comes_back_as_it_went(haiku, name):
    arguments = HAIKU_ARGUMENTS[name]
    x, axis = (IMAGES, 1) if "data_format" in arguments else (LAST, -1)
    decay = arguments["decay_rate"]
    with jax.numpy_rank_promotion("allow"):
        _, params, state = trained_haiku(haiku, arguments, x)
    variables = convert.from_haiku(params, state, decay=decay)
    back = convert.to_haiku(variables, decay=decay, ndim=4, feature_axis=axis, debias=True)
    if not decay:  # Of a single batch nothing tells how many came before.
        state = {key: value | {"counter": np.asarray(1)} for key, value in state.items()}
    assert_same(back, (params, state))
    assert jax.tree.map(np.shape, back) == jax.tree.map(np.shape, (params, state))


def test_averages_without_a_start_to_correct_reach_haiku_as_they_are(haiku):
    variables, arguments = drawn(), HAIKU_ARGUMENTS["both"]
    params, state = convert.to_haiku(variables, decay=0.9, ndim=4)
    apply, _ = haiku_layer(haiku, arguments)
    with jax.numpy_rank_promotion("allow"):
        y, _ = apply(params, state, x=LAST, train=False)
        _, trained = apply(params, state, x=LAST, train=True)
    assert_same(y, evaluated({}, variables, LAST))
    _, moved = train_step(dict(decay=0.9), variables, LAST)
    assert_same(trained["batch_norm/~/var_ema"]["average"].ravel(), moved["batch_stats"]["var"])


def test_a_haiku_module_that_is_not_there_is_answered_with_those_that_are():
    with pytest.raises(ValueError, match="net/norm"):
        convert.from_haiku({}, {"net/norm/~/mean_ema": {}}, decay=0.9)


# Flax


def test_flax_linen_takes_our_variables_and_arguments():
    arguments = dict(decay=0.9, epsilon=1e-2, use_bias=False)
    variables = drawn()
    del variables["params"]["bias"]
    layer = nn.BatchNorm(**convert.arguments_to_flax(**arguments), use_running_average=True)
    assert_same(layer.apply(variables, LAST), evaluated(arguments, variables, LAST))


def test_our_arguments_come_from_flax():
    theirs = dict(momentum=0.9, axis=(1, 2), epsilon=1e-3, use_running_average=True, use_fast_variance=False)
    assert convert.arguments_from_flax(**theirs) == dict(decay=0.9, feature_axis=(1, 2), epsilon=1e-3)


def test_flax_nnx_takes_our_variables_and_gives_them_back():
    variables, layer = drawn(), nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(0))
    state = nnx.state(layer)
    nnx.replace_by_pure_dict(state, convert.to_nnx(variables))
    nnx.update(layer, state)
    with jax.numpy_rank_promotion("allow"):
        assert_same(layer(LAST), evaluated({}, variables, LAST))
    assert_identical(convert.from_nnx(nnx.to_pure_dict(nnx.state(layer))), variables)


# Refusals


def through_torch(variables):
    names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    flat = variables["params"] | variables["batch_stats"]
    return convert.from_torch({f"bn.{names[name]}": value for name, value in flat.items()}, "bn")


def through_keras(variables):
    names = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"}
    flat = variables["params"] | variables["batch_stats"]
    return convert.from_keras({f"bn/{names[name]}:0": value for name, value in flat.items()})


def through_haiku(variables):
    params = {"scale": variables["params"]["scale"], "offset": variables["params"]["bias"]}
    averages = {f"bn/~/{n}_ema": {"counter": 7, "hidden": v} for n, v in variables["batch_stats"].items()}
    return convert.from_haiku({"bn": params}, averages, "bn", decay=0.9)


def through_nnx(variables):
    return convert.from_nnx(variables["params"] | variables["batch_stats"])


# Into jaxbn and out of it.
CONVERSIONS = {
    "from torch": through_torch,
    "from Keras": through_keras,
    "from Haiku": through_haiku,
    "from nnx": through_nnx,
    "to torch": convert.to_torch,
    "to Keras": convert.to_keras,
    "to Haiku": lambda variables: convert.to_haiku(variables, decay=0.9, ndim=2),
    "to nnx": convert.to_nnx,
}
EACH_WAY = pytest.mark.parametrize("conversion", CONVERSIONS.values(), ids=CONVERSIONS)


@EACH_WAY
def test_variables_of_one_batch_norm_convert(conversion):
    assert conversion(drawn())


@EACH_WAY
def test_a_negative_variance_is_refused(conversion):
    variables = drawn()
    variables["batch_stats"]["var"] = np.array([1.0, -0.5, 1.0], np.float32)
    with pytest.raises(ValueError, match=r"a variance of -0\.5; expected none below 0"):
        conversion(variables)


@EACH_WAY
@pytest.mark.parametrize("name", ["scale", "bias", "mean", "var"])
def test_shapes_that_do_not_belong_together_are_refused(conversion, name):
    variables = drawn()
    collection = "params" if name in ("scale", "bias") else "batch_stats"
    variables[collection][name] = np.ones(4, np.float32)
    with pytest.raises(ValueError, match=rf"arrays of shapes .*'{name}': \(4,\)"):
        conversion(variables)


@pytest.mark.parametrize("name", [n for n, c in CONVERSIONS.items() if n.startswith("to ")])
@pytest.mark.parametrize("norm", CASES)
def test_every_normalizer_converts_or_is_refused(norm, name):
    variables = ready(norm).variables
    if norm.startswith(("batch_norm", "ghost", "batch_renorm", "stochastic", "noisy", "frozen")):
        assert CONVERSIONS[name](variables)
        return
    if norm == "split_batch_norm" and name == "to nnx":
        return  # All of its arrays are [domains, features], and go as they are.
    with pytest.raises(ValueError, match="the batch norm has"):
        CONVERSIONS[name](variables)


def test_a_torch_layer_without_its_variance_is_refused():
    with pytest.raises(ValueError, match="no running_mean and running_var under 'bn'"):
        convert.from_torch({"bn.running_mean": np.zeros(3)}, "bn")


# Hyperparameters


@pytest.mark.parametrize("momentum", [0.1, 0.01, 0.9, 0.003, None])
def test_torch_arguments_come_back_exactly(momentum):
    theirs = dict(eps=1e-3, momentum=momentum, affine=True)
    assert convert.arguments_to_torch(**convert.arguments_from_torch(**theirs)) == theirs


def test_torch_momentum_is_what_decay_leaves():
    assert convert.arguments_from_torch(momentum=0.1)["decay"] == 0.9


def test_keras_arguments_come_back_exactly():
    theirs = dict(momentum=0.7, epsilon=1e-2, axis=1, scale=False, center=True)
    assert convert.arguments_to_keras(**convert.arguments_from_keras(theirs)) == theirs


def test_haiku_arguments_come_back_exactly():
    theirs = dict(create_scale=True, create_offset=False, decay_rate=0.9, eps=1e-3)
    theirs |= dict(data_format="channels_first", cross_replica_axis="data")
    assert convert.arguments_to_haiku(**convert.arguments_from_haiku(**theirs)) == theirs


@pytest.mark.parametrize("to", ["torch", "keras", "haiku", "flax"])
def test_what_a_package_does_not_have_is_refused(to):
    with pytest.raises(ValueError, match="group_size=4"):
        getattr(convert, f"arguments_to_{to}")(group_size=4)


def test_an_argument_that_batch_norm_does_not_have_is_refused():
    with pytest.raises(TypeError, match="momentum"):
        convert.arguments_to_keras(momentum=0.9)


def test_keras_renormalization_is_refused():
    with pytest.raises(ValueError, match="renorm"):
        convert.arguments_from_keras({"renorm": True})
