"""Any Normalizer as a stateful layer of Equinox: its conventions, and the values of the normalizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn

eqx = pytest.importorskip("equinox", reason="the Equinox layer needs the package: pip install equinox")

X = np.random.default_rng(0).normal(3, 2, (8, 4, 5)).astype(np.float32)  # [examples, features, positions]
OVER_BATCH = dict(in_axes=(0, None), out_axes=(0, None), axis_name="batch")
NORMS = {
    "batch_norm": lambda **o: jaxbn.batch_norm(activation=jax.nn.relu, **o),
    "batch_renorm": lambda **o: jaxbn.batch_renorm(r_max=1.1, d_max=0.1, **o),
    "debias": lambda **o: jaxbn.batch_norm(debias=True, **o),
}


def made(norm, x=None, **options):
    return eqx.nn.make_with_state(jaxbn.equinox.Norm)(norm, X.shape[1] if x is None else x, **options)


@eqx.filter_jit
def forward(layer, state, x, **options):
    return jax.vmap(lambda x, state: layer(x, state, **options), **OVER_BATCH)(x, state)


@pytest.mark.parametrize("name", NORMS)
def test_under_vmap_it_is_the_normalizer_of_the_whole_batch(name):
    whole = NORMS[name](feature_axis=1)
    variables = whole.init(jax.random.key(0), X)
    layer, state = made(NORMS[name](feature_axis=0, axis_name="batch"))
    for mode in (True, False):
        y, state = forward(layer, state, X)
        expected, stats = jax.jit(whole.apply, static_argnames="train")(variables, X, train=mode)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
        variables["batch_stats"] = stats
        layer = eqx.nn.inference_mode(layer)
    np.testing.assert_allclose(state.get(layer.index)["mean"], stats["mean"], rtol=1e-6)


def test_inference_of_the_call_goes_before_that_of_the_layer_and_leaves_the_state():
    layer, state = made(jaxbn.batch_norm(feature_axis=0, axis_name="batch"))
    before = state.get(layer.index)
    y, state = forward(layer, state, X, inference=True)
    np.testing.assert_allclose(y, X / np.sqrt(1 + 1e-5), rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, state.get(layer.index), before)


def test_sequential_models_train_it():
    class Model(eqx.Module):
        layers: eqx.nn.Sequential

        def __init__(self, key):
            norm = jaxbn.batch_norm(axis_name="batch")
            self.layers = eqx.nn.Sequential(
                [eqx.nn.Linear(3, 4, key=key), jaxbn.equinox.Norm(norm, 4), eqx.nn.Lambda(jax.nn.tanh)]
            )

        def __call__(self, x, state):
            return self.layers(x, state)

    model, state = eqx.nn.make_with_state(Model)(jax.random.key(0))
    x = X.reshape(-1, 20)[:, :3]

    @eqx.filter_jit
    @eqx.filter_grad(has_aux=True)
    def gradient(model, state):
        y, state = jax.vmap(model, **OVER_BATCH)(x, state)
        return jnp.sum(jnp.sin(y) * jnp.arange(y.size).reshape(y.shape)), state

    found, moved = gradient(model, state)
    scale, bias = found.layers[1].params["scale"], found.layers[1].params["bias"]
    assert np.all(scale != 0)
    assert np.all(bias != 0)
    index = model.layers[1].index
    assert np.all(moved.get(index)["mean"] != state.get(index)["mean"])


def test_normalizers_without_statistics_need_no_axis():
    layer, state = made(jaxbn.layer_norm(axis=0), jax.ShapeDtypeStruct((4,), jnp.float32))
    y, _ = layer(X[0, :, 0], state)
    np.testing.assert_allclose(y.mean(), 0, atol=1e-6)


def test_keys_reach_normalizers_that_draw():
    layer, state = made(jaxbn.noisy(jaxbn.batch_norm(feature_axis=0, axis_name="batch"), feature_axis=0))
    first, second = (forward(layer, state, X, key=jax.random.key(seed))[0] for seed in (1, 2))
    assert np.all(first != second)


def test_training_without_the_axis_says_which_is_missing():
    layer, state = made(jaxbn.batch_norm(feature_axis=0, axis_name="batch"))
    with pytest.raises(ValueError, match="'batch' is not bound"):
        layer(X[0], state)
