"""The linen modules: Flax's ways of calling a layer, what ours takes beyond them, and Norm around any Normalizer."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal
from flax.core import meta
from flax.errors import ModifyScopeVariableError, ScopeParamShapeError

import jaxbn
from jaxbn.linen import BatchNorm, Norm

FEATURES = 3
KEY = jax.random.key(0)


def batch(n=8, key=1):
    return jax.random.normal(jax.random.key(key), (n, FEATURES)) * 2 + 1


def initialized(module, x=None):
    return jax.jit(module.init)(KEY, batch() if x is None else x)


def trained(module, variables, x, **arguments):
    """Output and variables after one training step."""
    y, moved = module.apply(variables, x, mutable=["batch_stats"], **arguments)
    return y, {**variables, **moved}


# BatchNorm: modes and refusals


def test_initialization_normalizes_by_the_batch_and_leaves_the_statistics_at_their_start():
    y, variables = BatchNorm(use_running_average=False).init_with_output(KEY, batch())
    np.testing.assert_allclose(np.mean(y, 0), 0, atol=1e-6)
    np.testing.assert_allclose(np.var(y, 0), 1, rtol=1e-4)  # epsilon is 1e-5 of a variance of about 4
    stats = {"mean": jnp.zeros(FEATURES), "var": jnp.ones(FEATURES)}
    assert_trees_all_equal(variables["batch_stats"], stats)


def test_initialization_needs_no_bound_axis_no_whole_group_and_one_example_only():
    module = BatchNorm(use_running_average=False, axis_name="data", group_size=4, pool_axis_name="model")
    variables = initialized(module, batch(1))
    assert variables["params"]["scale"].shape == (FEATURES,)


def test_training_on_one_value_per_feature_raises_where_it_is_not_allowed():
    module = BatchNorm(use_running_average=False, allow_single_value=False)
    variables = initialized(module, batch(1))
    with pytest.raises(ValueError, match=r"\(1, 3\) has one value per feature.*allow_single_value"):
        trained(module, variables, batch(1))


def test_training_on_one_value_per_feature_gives_the_bias_where_it_is_allowed():
    module = BatchNorm(use_running_average=False, allow_single_value=True, bias_init=nn.initializers.normal())
    variables = initialized(module)
    y, _ = trained(module, variables, batch(1))
    np.testing.assert_allclose(y[0], variables["params"]["bias"], atol=1e-7)


def test_mode_is_given_to_the_constructor_or_the_call_but_once():
    with pytest.raises(ValueError, match="must be passed"):
        BatchNorm().init(KEY, batch())
    with pytest.raises(ValueError, match="passed just once"):
        BatchNorm(use_running_average=True).init(KEY, batch(), use_running_average=True)


def test_training_needs_mutable_statistics_and_evaluation_does_not():
    variables = initialized(BatchNorm(use_running_average=True))
    BatchNorm(use_running_average=True).apply(variables, batch())
    with pytest.raises(ModifyScopeVariableError):
        BatchNorm(use_running_average=False).apply(variables, batch())


def test_wrong_feature_count_raises():
    module = BatchNorm(use_running_average=False)
    with pytest.raises(ScopeParamShapeError):
        trained(module, initialized(module), jnp.ones((4, FEATURES + 1)))


def test_unbound_axis_raises_in_training():
    module = BatchNorm(use_running_average=False, axis_name="data")
    with pytest.raises(ValueError, match="'data' is not bound"):
        trained(module, initialized(module), batch())


def test_statistics_stay_where_they_are_for_a_batch_that_is_not_finite():
    module = BatchNorm(use_running_average=False)
    variables = initialized(module)
    _, after = trained(module, variables, batch().at[0, 0].set(jnp.nan))
    assert_trees_all_equal(after["batch_stats"], variables["batch_stats"])


# BatchNorm: what it hands on to the functions

FURTHER = {
    "activation, unbiased": dict(activation=jax.nn.relu, unbiased=True),
    "debias, group_size": dict(debias=True, group_size=4),
    "plain average": dict(decay=None),
}


@pytest.mark.parametrize("arguments", FURTHER.values(), ids=FURTHER)
def test_arguments_beyond_flax_act_as_in_the_functional_layer(arguments):
    norm = jaxbn.batch_norm(**arguments)
    named = {"momentum" if name == "decay" else name: value for name, value in arguments.items()}
    module = BatchNorm(use_running_average=False, **named)
    variables = initialized(module)
    assert_trees_all_equal(variables, norm.init(KEY, batch()))
    x, further = batch(), dict(weights=jnp.arange(1.0, 9)[:, None], residual=batch(key=2))

    def both(variables):
        return trained(module, variables, x, **further), norm.apply(variables, x, train=True, **further)

    (y, after), (expected_y, expected_stats) = jax.jit(both)(variables)
    assert_trees_all_close((y, after["batch_stats"]), (expected_y, expected_stats), rtol=1e-6, atol=1e-6)


def test_mask_of_numbers_counts_what_is_not_zero():
    module = BatchNorm(use_running_average=False, momentum=0.0)
    mask = np.arange(8)[:, None] % 3
    _, after = trained(module, initialized(module), batch(), mask=mask)
    np.testing.assert_allclose(after["batch_stats"]["mean"], batch()[mask[:, 0] > 0].mean(0), rtol=1e-6)


def test_partitioned_initializers_box_the_parameters_and_train_unboxed():
    boxed = nn.with_partitioning(nn.initializers.ones, ("model",))
    module = BatchNorm(use_running_average=False, scale_init=boxed, bias_init=boxed)
    variables = module.init(KEY, batch())
    assert variables["params"]["scale"].names == ("model",)
    y, _ = trained(module, variables, batch())
    expected, _ = trained(module, meta.unbox(variables), batch())
    assert_trees_all_equal(y, expected)


def test_second_call_of_the_same_shapes_does_not_retrace():
    module, traces = BatchNorm(use_running_average=False), []

    @jax.jit
    def step(variables, x):
        traces.append(1)
        return trained(module, variables, x)

    _, variables = step(initialized(module), batch())
    step(variables, batch(key=2))
    assert len(traces) == 1


# Both modules under Flax's transformations


class Block(nn.Module):
    """Dense and normalization, on a carry, as nn.scan wants it."""

    norm: Any
    train: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(FEATURES)(x)
        return self.norm(use_running_average=not self.train, name="norm")(x), None


def batch_norm_module(**arguments):
    return BatchNorm(**arguments)


def lifted_module(**arguments):
    return Norm(jaxbn.batch_norm(), **arguments)


BOTH = pytest.mark.parametrize("norm", [batch_norm_module, lifted_module], ids=["BatchNorm", "Norm"])


@BOTH
@pytest.mark.parametrize("lift", [nn.jit, nn.remat], ids=["jit", "remat"])
def test_jit_and_remat_change_nothing(norm, lift):
    variables = Block(norm).init(KEY, batch())

    def loss(block, params, x):
        (y, _), moved = block.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y)), moved

    def gradients(block):
        return jax.jit(jax.grad(lambda p, x: loss(block, p, x), (0, 1), has_aux=True))(variables["params"], batch())

    assert_trees_all_close(gradients(lift(Block)(norm)), gradients(Block(norm)), rtol=1e-5, atol=1e-6)


@BOTH
def test_scan_over_layers_keeps_statistics_for_each(norm):
    axes = {"params": 0, "batch_stats": 0}
    stack = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=2)(norm)
    variables = initialized(stack)
    (y, _), after = jax.jit(lambda v, x: trained(stack, v, x))(variables, batch())
    x = batch()
    for layer in range(2):
        alone = jax.tree.map(lambda v, layer=layer: v[layer], variables)
        (x, _), moved = trained(Block(norm), alone, x)
        got = jax.tree.map(lambda v, layer=layer: v[layer], after["batch_stats"])
        assert_trees_all_close(got, moved["batch_stats"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-5)


def test_vmap_over_a_named_axis_gives_the_statistics_of_the_whole():
    shared = {"params": None, "batch_stats": None}
    lifted = nn.vmap(BatchNorm, in_axes=0, variable_axes=shared, split_rngs={"params": False}, axis_name="data")
    module = lifted(use_running_average=False, axis_name="data")
    whole = BatchNorm(use_running_average=False)
    variables = initialized(whole)
    y, after = trained(module, variables, batch().reshape(4, 2, FEATURES))
    expected_y, expected = trained(whole, variables, batch())
    assert_trees_all_close((y.reshape(8, FEATURES), after), (expected_y, expected), rtol=1e-6, atol=1e-6)


# Norm around any Normalizer


def noisy(key_seen):
    """A normalizer of nested variables, of an argument of its own and of random keys: y = a b x + shift + noise."""

    def init(key, x):
        drawn = jax.random.normal(key, x.shape[-1:], x.dtype)
        return {
            "params": {"gain": {"a": drawn, "b": drawn + 1}},
            "batch_stats": {"seen": (jnp.zeros(()), jnp.ones(()))},
        }

    def apply(variables, x, *, train, where=None, weights=None, rng=None, shift=0.0):
        key_seen.append(rng)
        gain = variables["params"]["gain"]["a"] * variables["params"]["gain"]["b"]
        noise = 0 if rng is None else jax.random.normal(rng, x.shape)
        seen = variables["batch_stats"]["seen"]
        count = x.shape[0] if where is None else jnp.sum(where)
        y = x * jnp.expand_dims(gain, 0) + shift + noise
        return y, {"seen": (seen[0] + count, seen[1])} if train else variables["batch_stats"]

    return jaxbn.Normalizer(init, apply)


def test_norm_keeps_nested_variables_that_belong_together():
    variables = Norm(noisy([]), use_running_average=False).init(KEY, batch())
    gain = variables["params"]["gain"]
    np.testing.assert_allclose(gain["b"], gain["a"] + 1)
    assert_trees_all_equal(variables["batch_stats"], {"seen": (jnp.zeros(()), jnp.ones(()))})


def test_norm_moves_the_statistics_in_training_only_and_passes_arguments_on():
    module = Norm(noisy([]))
    variables = module.init(KEY, batch(), use_running_average=False)
    y, after = trained(module, variables, batch(), use_running_average=False, shift=5.0, mask=np.ones((8, 1)))
    plain, still = trained(module, variables, batch(), use_running_average=True)
    np.testing.assert_allclose(y, plain + 5)
    assert after["batch_stats"]["seen"][0] == 8
    assert_trees_all_equal(still, variables)


def test_norm_draws_rng_from_the_norm_stream_where_there_is_one():
    seen = []
    module = Norm(noisy(seen), use_running_average=True)
    variables = module.init(KEY, batch())
    module.apply(variables, batch())
    assert seen == [None, None]
    first, second = (module.apply(variables, batch(), rngs={"norm": jax.random.key(k)}) for k in (1, 2))
    assert np.any(first != second)
    explicit = module.apply(variables, batch(), rngs={"norm": jax.random.key(2)}, rng=jax.random.key(9))
    np.testing.assert_array_equal(explicit, module.apply(variables, batch(), rng=jax.random.key(9)))


def banked(batches):
    """Variables of a stochastic batch norm that has seen batches of means 0, 10, 20, ..."""
    norm = jaxbn.stochastic_batch_norm(bank_size=batches)
    variables = norm.init(KEY, batch())
    for number in range(batches):
        variables["batch_stats"] = norm.apply(variables, batch() + 10.0 * number, train=True)[1]
    return variables


class Repeated(nn.Module):
    """The outputs for one x of two layers in a scan."""

    norm: jaxbn.Normalizer

    @nn.compact
    def __call__(self, x):
        def layer(module, carry, _):
            return carry, Norm(self.norm, use_running_average=True, name="norm")(x)

        axes = dict(variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True, "norm": False})
        return nn.scan(layer, **axes, length=2)(self, 0.0, None)[1]


class Stochastic(nn.Module):
    """The outputs for one x of four layers, in a scan and under remat too."""

    norm: jaxbn.Normalizer

    @nn.compact
    def __call__(self, x):
        first = Norm(self.norm, use_running_average=True, name="first")(x)
        second = nn.remat(Norm)(self.norm, use_running_average=True, name="second")(x)
        return [first, second, *Repeated(self.norm, name="repeated")(x)]


@pytest.mark.parametrize("wrapped", [lambda norm: norm, jaxbn.frozen], ids=["plain", "frozen"])
def test_stochastic_layers_of_one_network_draw_the_same_batch(wrapped):
    network, x, stats = Stochastic(wrapped(jaxbn.stochastic_batch_norm(bank_size=4))), batch(), banked(4)["batch_stats"]
    variables = jax.jit(network.init)(KEY, x)
    stacked = jax.tree.map(lambda v: jnp.stack([v, v]), stats)
    variables = {**variables, "batch_stats": {"first": stats, "second": stats, "repeated": {"norm": stacked}}}
    apply, drawn = jax.jit(lambda variables, key: network.apply(variables, x, rngs={"norm": key})), set()
    for seed in range(8):
        first, *others = apply(variables, jax.random.key(seed))
        for other in others:
            np.testing.assert_array_equal(other, first)
        drawn.add(round(float(first[0, 0])))
    assert len(drawn) > 1


def test_noisy_layers_of_one_network_draw_noise_of_their_own():
    norm, x = jaxbn.noisy(jaxbn.batch_norm()), batch()

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return [Norm(norm, use_running_average=not train, name=name)(x) for name in ("first", "second")]

    variables = Two().init(KEY, x, False)
    (first, second), _ = Two().apply(variables, x, True, rngs={"norm": KEY}, mutable=["batch_stats"])
    assert np.all(first != second)


def test_norm_of_batch_norm_is_batch_norm():
    layers = BatchNorm(use_running_average=False), Norm(jaxbn.batch_norm(), use_running_average=False)
    variables = [initialized(layer) for layer in layers]
    assert_trees_all_equal(*variables)
    results = (trained(layer, v, batch(), mask=batch() > 0) for layer, v in zip(layers, variables, strict=True))
    assert_trees_all_close(*results, rtol=1e-6)


def test_norm_of_identity_has_no_variables():
    y, variables = Norm(jaxbn.identity(), use_running_average=False).init_with_output(KEY, batch())
    np.testing.assert_array_equal(y, batch())
    assert not jax.tree.leaves(variables)


def test_norm_initializes_without_its_axis_and_on_one_example():
    module = Norm(jaxbn.batch_norm(axis_name="data"), use_running_average=False)
    assert initialized(module, batch(1))["params"]["bias"].shape == (FEATURES,)


def test_norm_refuses_mask_beside_where():
    with pytest.raises(ValueError, match="two names for one argument"):
        Norm(jaxbn.identity(), use_running_average=True).init(KEY, batch(), mask=batch() > 0, where=batch() > 0)
