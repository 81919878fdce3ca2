"""Folding against the two layers applied one after the other, and insertion against the network without the norm."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from normalizers import CASES, draw, ready

import jaxbn
from jaxbn._fold import Following, Preceding, fold_following, fold_preceding, fold_variables, unfold, unfold_variables
from jaxbn._population import input_moments
from jaxbn._recording import recordable
from jaxbn.linen import Norm

EPSILON = 1e-3  # Large enough to show where it is left out.
NORM = recordable(jaxbn.batch_norm(epsilon=EPSILON))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def trained_norm(features, seed=1):
    """Batch norm variables in which no entry is trivial."""
    draw = normal(4, features, seed=seed)
    params = {"scale": 1 + 0.3 * draw[0], "bias": draw[1]}
    return {"params": params, "batch_stats": {"mean": draw[2], "var": np.exp(draw[3])}}


def normalized(norm, x):
    return NORM.apply(norm, x, train=False)[0]


def assert_equal_to_rounding(actual, expected):
    """Within 16 units in the last place of the largest output: a sum of at most 54 terms in another order."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=16 * 2**-23 * np.max(np.abs(expected)))


def trained(layer, x):
    """Kernel and bias drawn, the bias too."""
    variables = layer.init(jax.random.key(0), x)
    return jax.tree.map(lambda v: normal(*v.shape, seed=v.ndim), variables["params"])


IMAGES = normal(2, 6, 5, 4, seed=7)
PRECEDING = {
    "dense": (nn.Dense(3), IMAGES, -1),
    "dense without bias": (nn.Dense(3, use_bias=False), IMAGES, -1),
    "convolution with zero padding": (nn.Conv(3, (3, 3), strides=2), IMAGES, -1),
    "grouped": (nn.Conv(6, (3, 3), feature_group_count=2), IMAGES, -1),
    "depthwise": (nn.Conv(8, (3, 3), feature_group_count=4), IMAGES, -1),
    "dilated": (nn.Conv(3, (3, 3), kernel_dilation=2), IMAGES, -1),
    "transposed": (nn.ConvTranspose(3, (3, 3), strides=(2, 2)), IMAGES, -1),
    "transposed with a transposed kernel": (
        nn.ConvTranspose(3, (3, 3), strides=(2, 2), transpose_kernel=True),
        IMAGES,
        -2,
    ),
}
FOLLOWING = {
    "dense": nn.Dense(3),
    "dense without bias": nn.Dense(3, use_bias=False),
    "1x1 convolution with SAME": nn.Conv(3, (1, 1)),
    "VALID": nn.Conv(3, (3, 3), padding="VALID"),
    "no padding in numbers": nn.Conv(3, (3, 3), padding=((0, 0), (0, 0))),
    "CIRCULAR": nn.Conv(3, (3, 3), padding="CIRCULAR", strides=2),
    "REFLECT": nn.Conv(3, (3, 3), padding="REFLECT"),
    "grouped": nn.Conv(6, (3, 3), padding="VALID", feature_group_count=2),
    "depthwise": nn.Conv(8, (3, 3), padding="VALID", feature_group_count=4),
}


@pytest.mark.parametrize("name", PRECEDING)
def test_folding_into_the_layer_before_keeps_the_outputs(name):
    layer, x, output_axis = PRECEDING[name]
    params = trained(layer, x)
    y = layer.apply({"params": params}, x)
    norm = trained_norm(y.shape[-1])
    kernel, bias = fold_preceding(params["kernel"], params.get("bias"), norm, epsilon=EPSILON, output_axis=output_axis)
    folded = layer.clone(use_bias=True).apply({"params": {"kernel": kernel, "bias": bias}}, x)
    assert_equal_to_rounding(folded, normalized(norm, y))


@pytest.mark.parametrize("name", FOLLOWING)
def test_folding_into_the_layer_after_keeps_the_outputs(name):
    layer, x = FOLLOWING[name], IMAGES
    params, norm = trained(layer, x), trained_norm(4)
    expected = layer.apply({"params": params}, normalized(norm, x))
    layout = {} if isinstance(layer, nn.Dense) else {k: getattr(layer, k) for k in ("padding", "feature_group_count")}
    kernel, bias = fold_following(params["kernel"], params.get("bias"), norm, epsilon=EPSILON, **layout)
    folded = layer.clone(use_bias=True).apply({"params": {"kernel": kernel, "bias": bias}}, x)
    assert_equal_to_rounding(folded, expected)


def test_features_along_several_axes_fold():
    layer, x = nn.DenseGeneral((2, 3)), normal(5, 4)
    params = trained(layer, x)
    norm = recordable(jaxbn.batch_norm(epsilon=EPSILON, feature_axis=(-2, -1)), feature_axis=(-2, -1))
    y = layer.apply({"params": params}, x)
    variables = jax.tree.map(lambda v: v.reshape(2, 3), trained_norm(6))
    kernel, bias = fold_preceding(**params, norm=variables, epsilon=EPSILON, output_axis=(-2, -1))
    folded = layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    assert_equal_to_rounding(folded, norm.apply(variables, y, train=False)[0])


@pytest.mark.parametrize("missing", ["scale", "bias"])
def test_a_norm_without_scale_or_bias_folds(missing):
    x, norm = normal(5, 4), trained_norm(3)
    del norm["params"][missing]
    kernel, bias = fold_preceding(normal(4, 3, seed=3), None, norm, epsilon=EPSILON)
    without = jaxbn.batch_norm(epsilon=EPSILON, **{f"use_{missing}": False})
    y, _ = without.apply(norm, x @ normal(4, 3, seed=3), train=False)
    assert_equal_to_rounding(x @ kernel + bias[None], y)


def test_debiased_statistics_are_corrected_before_folding():
    norm = trained_norm(3)
    biased = {name: 0.25 * value for name, value in norm["batch_stats"].items()} | {"weight": np.full(3, 0.25, "f")}
    expected = fold_preceding(normal(4, 3), None, norm, epsilon=EPSILON)
    actual = fold_preceding(normal(4, 3), None, norm | {"batch_stats": biased}, epsilon=EPSILON, debias=True)
    jax.tree.map(assert_equal_to_rounding, actual, expected)


def test_kernels_keep_their_dtype():
    kernel, bias = fold_preceding(jnp.ones((4, 3), jnp.bfloat16), None, trained_norm(3), epsilon=EPSILON)
    assert (kernel.dtype, bias.dtype) == (jnp.bfloat16, jnp.bfloat16)


PADDED = [("SAME", 3), ("CAUSAL", 3), (1, 3), (1, 1), (((0, 1), (0, 0)), 3), (((0, 1), (0, 0)), 1), ((0, 1), 1)]


@pytest.mark.parametrize(("padding", "size"), PADDED, ids=str)
def test_zero_padding_after_the_norm_is_refused(padding, size):
    with pytest.raises(ValueError, match="pads its input with zeros"):
        fold_following(normal(size, size, 4, 2), None, trained_norm(4), epsilon=EPSILON, padding=padding)


# The normalizers that are one affine map of each feature at test time; "frozen" and "noisy" are batch norm then.
FOLDABLE = ("batch_norm", "ghost_batch_norm", "batch_renorm", "stochastic_batch_norm", "mean_only", "frozen", "noisy")


def folds(name):
    return name.startswith(FOLDABLE) and name != "batch_norm, other axis"


def hyperparameters(norm):
    """Arguments for folding, and the activation, which is not folded."""
    epsilon = inspect.signature(norm._origin.factory).parameters.get("epsilon")
    passed = {"epsilon": epsilon.default if epsilon else 1e-5, "debias": False, "activation": None}
    passed |= norm._origin.passed
    return {n: passed[n] for n in ("epsilon", "debias")}, passed["activation"] or (lambda y: y)


@pytest.mark.parametrize("name", CASES)
def test_every_normalizer_folds_or_is_refused(name):
    case, kernel = ready(name), normal(4, 4, seed=3)
    further, activation = hyperparameters(case.norm)
    params = {"dense": {"kernel": kernel}, "norm": case.variables["params"]}
    network = {"params": params, "batch_stats": {"norm": case.variables["batch_stats"]}}
    if not folds(name):
        for layer in (Preceding("dense"), Following("dense")):
            with pytest.raises(ValueError, match=r"no batch norm at 'norm'|'norm' cannot be folded into 'dense': "):
                fold_variables(network, {"norm": layer}, **further)
        return
    # Without a key stochastic batch norm draws nothing.
    arguments = {key: value for key, value in case.arguments.items() if key != "rng"}
    x = np.asarray(draw())
    before = fold_variables(network, {"norm": "dense"}, **further)["params"]["dense"]
    y, _ = case.evaluate(case.variables, x @ kernel, **arguments)
    assert_equal_to_rounding(activation(x @ np.asarray(before["kernel"]) + np.asarray(before["bias"])), y)
    if activation(-1.0) == -1.0:  # What lies between the norm and the layer after it has to be linear.
        after = fold_variables(network, {"norm": Following("dense")}, **further)["params"]["dense"]
        y, _ = case.evaluate(case.variables, x, **arguments)
        assert_equal_to_rounding(x @ np.asarray(after["kernel"]) + np.asarray(after["bias"]), y @ kernel)


@pytest.mark.parametrize("layer", [Preceding("Dense_0"), Following("Dense_0", padding="VALID")])
def test_a_partitioned_kernel_folds_and_stays_partitioned(layer):
    boxed = nn.with_partitioning(nn.initializers.normal(), ("inputs", "outputs"))
    features = 4 if isinstance(layer, Following) else 3
    dense = nn.Dense(3, kernel_init=boxed, bias_init=nn.with_partitioning(nn.initializers.normal(), ("outputs",)))
    params = dense.init(jax.random.key(0), normal(5, 4))["params"]
    norm = trained_norm(features)
    variables = {name: {"norm": values} for name, values in norm.items()}
    variables["params"]["Dense_0"] = params
    folded = fold_variables(variables, {"norm": layer}, epsilon=EPSILON)["params"]["Dense_0"]
    assert folded["kernel"].names == ("inputs", "outputs")
    assert folded["bias"].names == ("outputs",)
    plain = variables | {"params": nn.meta.unbox(variables["params"])}
    expected = fold_variables(plain, {"norm": layer}, epsilon=EPSILON)["params"]["Dense_0"]
    jax.tree.map(np.testing.assert_array_equal, nn.meta.unbox(folded), expected)


def test_a_network_without_statistics_folds_nothing():
    variables = {"params": {"dense": {"kernel": normal(4, 3)}}}
    assert fold_variables(variables, {}, epsilon=EPSILON) == variables | {"batch_stats": {}}
    with pytest.raises(ValueError, match=r"no batch norm at 'norm'; there are \[\]"):
        fold_variables(variables, {"norm": "dense"}, epsilon=EPSILON)
    assert unfold_variables(variables, epsilon=EPSILON) == variables


def test_features_that_do_not_fit_the_layer_before_are_refused():
    with pytest.raises(ValueError, match=r"transpose_kernel"):
        fold_preceding(normal(3, 3, 4, 2), None, trained_norm(4), epsilon=EPSILON)


def test_features_that_do_not_fit_the_layer_after_are_refused():
    with pytest.raises(ValueError, match="takes 8 inputs"):
        fold_following(
            normal(3, 3, 4, 2), None, trained_norm(4), epsilon=EPSILON, padding="VALID", feature_group_count=2
        )


class Stage(nn.Module):
    norm: jaxbn.Normalizer
    use_bias: bool

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3), use_bias=self.use_bias)(x)
        return nn.relu(Norm(self.norm, name="norm")(x, not train))


class Network(nn.Module):
    """A norm after a convolution, twice, and one straight before the last dense layer."""

    norm: jaxbn.Normalizer
    use_bias: bool

    @nn.compact
    def __call__(self, x, train=False):
        x = Stage(self.norm, self.use_bias)(x, train)
        x = Stage(self.norm, self.use_bias)(x, train).mean((1, 2))
        x = Norm(self.norm, name="last_norm")(x, not train)
        return nn.Dense(3, name="head")(x)


PAIRS = {
    "Stage_0/norm": "Stage_0/Conv_0",
    "Stage_1/norm": Preceding("Stage_1/Conv_0"),
    "last_norm": Following("head"),
}


def trained_network():
    network = Network(NORM, use_bias=False)
    variables = network.init(jax.random.key(0), IMAGES)
    draw = trained_norm(4)
    params = jax.tree_util.tree_map_with_path(
        lambda path, v: draw["params"].get(path[-1].key, v) if "norm" in str(path) else v, variables["params"]
    )
    stats = jax.tree_util.tree_map_with_path(
        lambda path, v: draw["batch_stats"][path[-1].key], variables["batch_stats"]
    )
    return network, {"params": params, "batch_stats": stats}


def test_a_folded_network_without_norms_keeps_the_outputs():
    network, variables = trained_network()
    plain = Network(jaxbn.identity(), use_bias=True)
    folded = fold_variables(variables, PAIRS, epsilon=EPSILON)
    assert_equal_to_rounding(plain.apply(folded, IMAGES), network.apply(variables, IMAGES))


def test_a_folded_network_has_the_variables_of_the_network_without_norms():
    _, variables = trained_network()
    plain = Network(jaxbn.identity(), use_bias=True).init(jax.random.key(0), IMAGES)
    folded = fold_variables(variables, PAIRS, epsilon=EPSILON)
    assert jax.tree.map(jnp.shape, folded["params"]) == jax.tree.map(jnp.shape, plain["params"])
    assert folded["batch_stats"] == {}


def test_folding_changes_nothing_in_what_it_was_given():
    _, variables = trained_network()
    before = jax.tree.map(np.array, variables)
    fold_variables(variables, PAIRS, epsilon=EPSILON)
    jax.tree.map(np.testing.assert_array_equal, variables, before)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [({"norm": "head"}, "Stage_0/norm"), ({"last_norm": "heads"}, "no kernel at 'heads'.*'head'")],
)
def test_a_path_that_is_not_there_is_answered_with_those_that_are(pairs, message):
    with pytest.raises(ValueError, match=message):
        fold_variables(trained_network()[1], pairs, epsilon=EPSILON)


def test_an_inserted_norm_is_the_identity():
    x = 100 + normal(64, 3)
    norm = unfold(x.mean(0), x.var(0), epsilon=EPSILON)
    assert_equal_to_rounding(normalized(norm, x), x)


def test_an_inserted_norm_standardizes():
    x = 3 + 2 * normal(64, 3)
    norm = unfold(x.mean(0), x.var(0), epsilon=EPSILON)
    y, _ = NORM.apply({**norm, "params": {"scale": np.ones(3, "f"), "bias": np.zeros(3, "f")}}, x, train=False)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + EPSILON)
    np.testing.assert_allclose(y, expected, atol=2e-6)


def moved_batch_stats(variables, x):
    network = Network(NORM, use_bias=True)
    return network.apply(variables, x, train=True, mutable=["batch_stats"])[1]["batch_stats"]


def test_norms_inserted_into_a_trained_network_keep_its_outputs():
    plain = Network(jaxbn.identity(), use_bias=True)
    trained_params = plain.init(jax.random.key(5), IMAGES)["params"]
    network = Network(NORM, use_bias=True)
    fresh = network.init(jax.random.key(0), IMAGES)
    grafted = fresh | {"params": {**fresh["params"], "head": trained_params["head"]}}
    for stage in ("Stage_0", "Stage_1"):
        grafted["params"][stage] = {**fresh["params"][stage], **trained_params[stage]}
    identity = unfold_variables(grafted, epsilon=EPSILON)
    moments = input_moments(moved_batch_stats, identity, [IMAGES])
    inserted = unfold_variables(grafted, moments, epsilon=EPSILON)
    assert_equal_to_rounding(network.apply(inserted, IMAGES), plain.apply({"params": trained_params}, IMAGES))
    # And they do normalize: by the mean of what the plain network computes there.
    _, state = plain.apply({"params": trained_params}, IMAGES, capture_intermediates=True)
    first = np.asarray(state["intermediates"]["Stage_0"]["Conv_0"]["__call__"][0], np.float64)
    np.testing.assert_allclose(inserted["batch_stats"]["Stage_0"]["norm"]["mean"], first.mean((0, 1, 2)), atol=1e-6)


def test_folding_undoes_unfolding():
    kernel, bias = normal(4, 3), normal(3, seed=2)
    norm = unfold(normal(3, seed=4), np.exp(normal(3, seed=5)), epsilon=EPSILON)
    folded = fold_preceding(kernel, bias, norm, epsilon=EPSILON)
    jax.tree.map(assert_equal_to_rounding, folded, (kernel, bias))


def test_inserting_needs_a_norm_at_the_path():
    with pytest.raises(ValueError, match="last_norm"):
        unfold_variables(trained_network()[1], epsilon=EPSILON, paths=["first_norm"])
