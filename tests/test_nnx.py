"""The nnx modules: Flax's ways of using a layer, what ours takes beyond them, and Norm around any Normalizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal
from flax import nnx

import jaxbn
from jaxbn.nnx import BatchNorm, Norm

FEATURES = 3


def batch(n=8, key=1):
    return jax.random.normal(jax.random.key(key), (n, FEATURES)) * 2 + 1


def layer(features=FEATURES, **arguments):
    return BatchNorm(features, rngs=nnx.Rngs(0), **arguments)


def lifted(norm=None, **arguments):
    return Norm(jaxbn.batch_norm() if norm is None else norm, FEATURES, rngs=nnx.Rngs(0), **arguments)


def call(module, x, **arguments):
    """One compiled call, which moves the module's statistics: what is traced eagerly compiles piece by piece."""
    return nnx.jit(lambda module, x: module(x, **arguments))(module, x)


def state(module, *filters):
    """A copy of the module's variables as a plain dict."""
    return nnx.to_pure_dict(jax.tree.map(jnp.copy, nnx.state(module, *filters)))


def unchanged(module, action):
    before = state(module, nnx.BatchStat)
    action()
    assert_trees_all_equal(state(module, nnx.BatchStat), before)


BOTH = pytest.mark.parametrize("make", [layer, lifted], ids=["BatchNorm", "Norm"])

# Modes


@BOTH
def test_train_moves_the_statistics_and_eval_leaves_them(make):
    module = make()
    module.train()
    call(module, batch())
    mean = jax.tree.leaves(state(module, nnx.BatchStat))[0]
    np.testing.assert_allclose(mean, 0.01 * batch().mean(0), rtol=1e-5)
    module.eval()
    assert module.use_running_average
    unchanged(module, lambda: call(module, batch()))


@BOTH
def test_mode_of_the_call_goes_before_that_of_the_module(make):
    module = make(use_running_average=False)
    unchanged(module, lambda: call(module, batch(), use_running_average=True))


@BOTH
def test_mode_missing_in_both_raises(make):
    with pytest.raises(ValueError, match=r"use_running_average is None in the module and in the call"):
        make(use_running_average=None)(batch())


@BOTH
def test_view_in_evaluation_mode_shares_the_variables(make):
    module = make()
    view = nnx.view(module, use_running_average=True)
    assert not module.use_running_average
    unchanged(module, lambda: call(view, batch()))
    call(module, batch())
    assert_trees_all_equal(state(view), state(module))


def test_filters_for_flax_layers_find_ours():
    model = nnx.Sequential(nnx.Linear(FEATURES, FEATURES, rngs=nnx.Rngs(0)), layer())
    model.set_attributes(nnx.BatchNorm, use_running_average=True)
    assert model.layers[1].use_running_average


# Variables


def test_variables_have_the_types_of_flax():
    module = layer()
    assert type(module.scale) is type(module.bias) is nnx.Param
    assert type(module.mean) is type(module.var) is nnx.BatchStat


def test_metadata_stays_on_the_parameters():
    module = layer(scale_metadata={"role": "gain"}, bias_metadata={"role": "offset"})
    assert (module.scale.role, module.bias.role) == ("gain", "offset")


SHARDED = ("model",)
SHARDINGS = {
    "metadata": dict(scale_metadata={"out_sharding": SHARDED}),
    "initializer": dict(scale_init=nnx.with_partitioning(jax.nn.initializers.ones, SHARDED)),
}


@pytest.mark.parametrize("arguments", SHARDINGS.values(), ids=SHARDINGS)
def test_sharding_metadata_spreads_the_parameters_and_changes_no_result(arguments):
    mesh = jax.make_mesh((FEATURES,), SHARDED, axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        module = layer(**arguments)
        assert module.scale[...].sharding.spec == jax.P(*SHARDED)
        y = call(module, batch())
    np.testing.assert_allclose(y, call(layer(), batch()), rtol=1e-6)


@BOTH
def test_split_and_merge_give_the_same_module(make):
    module = make()
    call(module, batch())
    again = nnx.merge(*nnx.split(module))
    assert_trees_all_equal(state(again), state(module))
    np.testing.assert_array_equal(call(again, batch()), call(module, batch()))


def test_several_axes_kept_take_a_tuple_of_sizes():
    module = layer((4, FEATURES), axis=(1, -1), momentum=0.0)
    x = jax.random.normal(jax.random.key(0), (5, 4, 2, FEATURES))
    call(module, x)
    np.testing.assert_allclose(module.mean[...], x.mean((0, 2)), rtol=1e-5, atol=1e-6)


def test_narrow_inputs_are_what_the_backward_pass_keeps():
    module = layer()
    x = batch().astype(jnp.bfloat16)
    graph, variables = nnx.split(module)
    _, pullback = jax.vjp(lambda x: nnx.merge(graph, nnx.to_pure_dict(variables))(x), x)
    kept = [leaf for leaf in jax.tree.leaves(pullback) if jnp.shape(leaf) == x.shape]
    assert [leaf.dtype for leaf in kept] == [jnp.bfloat16]


# Refusals


def test_training_on_one_value_per_feature_raises_where_it_is_not_allowed():
    with pytest.raises(ValueError, match=r"\(1, 3\) has one value per feature.*allow_single_value"):
        layer(allow_single_value=False)(batch(1))


def test_training_on_one_value_per_feature_gives_the_bias_where_it_is_allowed():
    np.testing.assert_allclose(call(layer(allow_single_value=True), batch(1)), np.zeros((1, FEATURES)), atol=1e-7)


def test_wrong_feature_count_raises():
    with pytest.raises(ValueError, match=r"scale has shape \(3,\) but x of shape \(8, 4\)"):
        layer()(jnp.ones((8, 4)))


# What is handed on to the functions

FURTHER = {
    "activation, unbiased": dict(activation=jax.nn.relu, unbiased=True),
    "debias, group_size": dict(debias=True, group_size=4),
    "plain average": dict(decay=None),
}


@pytest.mark.parametrize("arguments", FURTHER.values(), ids=FURTHER)
def test_arguments_beyond_flax_act_as_in_the_functional_layer(arguments):
    norm = jaxbn.batch_norm(**arguments)
    module = layer(**{"momentum" if name == "decay" else name: value for name, value in arguments.items()})
    variables = norm.init(jax.random.key(0), batch())
    assert_trees_all_equal(state(module, nnx.BatchStat), variables["batch_stats"])
    x, further = batch(), dict(weights=jnp.arange(1.0, 9)[:, None], residual=batch(key=2))
    expected, stats = jax.jit(lambda v, x: norm.apply(v, x, train=True, **further))(variables, x)
    np.testing.assert_allclose(call(module, x, **further), expected, rtol=1e-6, atol=1e-6)
    assert_trees_all_close(state(module, nnx.BatchStat), stats, rtol=1e-6)


# Flax's transformations


@BOTH
def test_grad_is_by_the_parameters_and_moves_the_statistics(make):
    module = make()

    @nnx.jit
    def gradients(module, x):
        return nnx.grad(lambda module, x: jnp.sum(jnp.sin(module(x))))(module, x)

    found = jax.tree.leaves(gradients(module, batch()))
    x = np.asarray(batch(), np.float64)
    y = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    np.testing.assert_allclose(found[0], np.cos(y).sum(0), rtol=1e-5)
    np.testing.assert_allclose(found[1], (y * np.cos(y)).sum(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.tree.leaves(state(module, nnx.BatchStat))[0], 0.01 * x.mean(0), rtol=1e-5)


@BOTH
def test_second_call_of_the_same_shapes_does_not_retrace(make):
    module, traces = make(), []

    @nnx.jit
    def step(module, x):
        traces.append(1)
        return module(x)

    step(module, batch())
    step(module, batch(key=2))
    assert len(traces) == 1


@BOTH
def test_scan_over_layers_keeps_statistics_for_each(make):
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(_):
        return make()

    @nnx.jit
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def forward(module, x):
        return module(x) + x

    stack = create(jnp.arange(2))
    y = forward(stack, batch())
    x, modules = batch(), [make(), make()]
    for module in modules:
        x = call(module, x) + x
    np.testing.assert_allclose(y, x, rtol=1e-5)
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(state(module) for module in modules))
    assert_trees_all_close(state(stack), expected, rtol=1e-5, atol=1e-7)


def test_remat_changes_nothing():
    def gradients(forward):
        return nnx.jit(nnx.grad(lambda module, x: jnp.sum(jnp.sin(forward(module, x)))))(layer(), batch())

    plain = gradients(lambda module, x: module(x))
    assert_trees_all_close(gradients(nnx.remat(lambda module, x: module(x))), plain, rtol=1e-5, atol=1e-6)


def test_bridge_lifts_the_module_into_linen():
    module = nnx.bridge.to_linen(BatchNorm, FEATURES, momentum=0.0)
    variables = module.init(jax.random.key(0), batch())
    _, moved = module.apply(variables, batch(), mutable=["batch_stats"])
    np.testing.assert_allclose(jax.tree.leaves(moved)[0], batch().mean(0), rtol=1e-5)


# Norm around any Normalizer


def noisy():
    """A normalizer of nested variables, of an argument of its own and of random keys: y = a b x + shift + noise."""

    def init(key, x):
        drawn = jax.random.normal(key, x.shape[-1:], x.dtype)
        return {
            "params": {"gain": {"a": drawn, "b": drawn + 1}},
            "batch_stats": {"seen": (jnp.zeros(()), jnp.ones(()))},
        }

    def apply(variables, x, *, train, where=None, weights=None, rng=None, shift=0.0):
        gain = variables["params"]["gain"]["a"] * variables["params"]["gain"]["b"]
        noise = 0 if rng is None else jax.random.normal(rng, x.shape)
        seen = variables["batch_stats"]["seen"]
        count = x.shape[0] if where is None else jnp.sum(where)
        y = x * jnp.expand_dims(gain, 0) + shift + noise
        return y, {"seen": (seen[0] + count, seen[1])} if train else variables["batch_stats"]

    return jaxbn.Normalizer(init, apply)


def test_norm_holds_any_tree_of_variables_by_kind():
    module = lifted(noisy())
    gain = module.params["gain"]
    np.testing.assert_allclose(gain["b"][...], gain["a"][...] + 1)
    assert all(isinstance(v, nnx.BatchStat) for v in module.batch_stats["seen"])


@pytest.mark.parametrize("x", [FEATURES, np.int64(FEATURES), batch(), jax.ShapeDtypeStruct((8, FEATURES), jnp.float32)])
def test_norm_takes_its_shapes_from_a_number_an_array_or_a_struct(x):
    module = Norm(noisy(), x, rngs=nnx.Rngs(0))
    assert_trees_all_equal(state(module), state(lifted(noisy())))


def test_norm_moves_the_statistics_in_training_only_and_passes_arguments_on():
    module = lifted(noisy())
    y = module(batch(), shift=5.0, mask=np.ones((8, 1)))
    assert module.batch_stats["seen"][0][...] == 8
    unchanged(module, lambda: np.testing.assert_allclose(module(batch(), use_running_average=True) + 5, y))


def test_norm_draws_a_new_key_each_call_from_the_norm_stream_where_there_is_one():
    x = batch()
    plain = Norm(noisy(), x, rngs=nnx.Rngs(0), use_running_average=True)
    np.testing.assert_array_equal(plain(x), plain(x))
    module = Norm(noisy(), x, rngs=nnx.Rngs(0, norm=1), use_running_average=True)
    assert np.all(module(x) != module(x))
    key = jax.random.key(4)
    np.testing.assert_array_equal(module(x, rng=key), module(x, rng=key))


@pytest.mark.slow
def test_stochastic_layers_of_one_network_draw_the_same_batch():
    rngs, norm, x = nnx.Rngs(0, norm=1), jaxbn.stochastic_batch_norm(bank_size=4), batch()
    layers = [Norm(norm, FEATURES, rngs=rngs) for _ in range(2)]
    other = Norm(jaxbn.noisy(jaxbn.batch_norm()), FEATURES, rngs=rngs)
    layers.append(Norm(norm, FEATURES, rngs=rngs))
    model = nnx.List(layers)
    for number in range(4):
        for layer in model:
            call(layer, x + 10.0 * number)
    drawn = set()
    for _ in range(8):
        first, *others = (call(layer, x, use_running_average=True) for layer in model)
        for other_output in others:
            np.testing.assert_array_equal(other_output, first)
        drawn.add(round(float(first[0, 0])))
    assert len(drawn) > 1
    assert np.all(call(other, x) != call(Norm(jaxbn.noisy(jaxbn.batch_norm()), FEATURES, rngs=rngs), x))


def test_norm_of_batch_norm_is_batch_norm():
    modules = layer(), lifted()
    y, expected = (call(module, batch(), mask=batch() > 0) for module in modules)
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    for got, wanted in zip(*(jax.tree.leaves(state(module, nnx.BatchStat)) for module in modules), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_norm_of_identity_has_no_variables():
    module = lifted(jaxbn.identity())
    np.testing.assert_array_equal(module(batch()), batch())
    assert not jax.tree.leaves(state(module))


def test_norm_refuses_mask_beside_where():
    with pytest.raises(ValueError, match="two names for one argument"):
        lifted()(batch(), mask=batch() > 0, where=batch() > 0)
