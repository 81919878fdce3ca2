"""Which params weight decay reaches: no scale and bias of a norm, whatever it is called and wherever it stands."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from normalizers import CASES, ready

import jaxbn

X = jnp.ones((4, 6))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, name="a")(nn.Dense(6, name="dense")(x))
        x = nn.LayerNorm(name="b", use_scale=False)(x)
        x = jaxbn.linen.Norm(jaxbn.conditional_batch_norm(condition_size=2), name="c", use_running_average=True)(
            x, condition=jnp.ones((4, 2))
        )
        return nn.Embed(3, 6, name="embed").attend(x)


def test_norms_of_a_linen_network_are_left_out_and_other_layers_are_not():
    mask = jaxbn.decay_mask(jax.eval_shape(Net().init, jax.random.key(0), X))
    assert {name: set(jax.tree.leaves(part)) for name, part in mask.items()} == {
        "a": {False},
        "b": {False},
        "c": {False},
        "dense": {True},
        "embed": {True},
    }


def test_biases_of_other_layers_can_be_left_out_too():
    mask = jaxbn.decay_mask(jax.eval_shape(Net().init, jax.random.key(0), X), biases=False)
    assert mask["dense"] == {"kernel": True, "bias": False}


def test_statistics_tell_a_norm_whose_params_have_names_of_their_own():
    params = {"n": {"gamma": X}, "m": {"gamma": X}}
    assert jaxbn.decay_mask({"params": params, "batch_stats": {"n": {"mean": X}}}) == {
        "n": {"gamma": False},
        "m": {"gamma": True},
    }


@pytest.mark.parametrize("name", CASES)
def test_no_param_of_any_normalizer_decays(name):
    assert not any(jax.tree.leaves(jaxbn.decay_mask(ready(name).variables)))


def test_optax_takes_the_mask_for_an_nnx_model():
    model = nnx.Sequential(nnx.Linear(6, 6, rngs=nnx.Rngs(0)), jaxbn.nnx.BatchNorm(6, rngs=nnx.Rngs(0)))
    stats = nnx.state(model, nnx.BatchStat)
    decay = optax.add_decayed_weights(0.5, mask=lambda p: jaxbn.decay_mask({"params": p, "batch_stats": stats}))
    optimizer = nnx.Optimizer(model, decay, wrt=nnx.Param)
    scale, kernel = model.layers[1].scale[...], model.layers[0].kernel[...]
    optimizer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
    np.testing.assert_array_equal(model.layers[1].scale[...], scale)
    np.testing.assert_allclose(model.layers[0].kernel[...], 1.5 * kernel)


def test_variables_without_params_are_refused():
    with pytest.raises(ValueError, match=r"variables has \['kernel'\]"):
        jaxbn.decay_mask({"kernel": X})
