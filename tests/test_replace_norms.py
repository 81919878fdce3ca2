"""Other normalizers in networks that are finished: every norm by path, with the variables that fit."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_trees_all_equal
from flax import nnx

import jaxbn

FEATURES = 4
X = np.random.default_rng(0).normal(3, 2, (8, FEATURES)).astype(np.float32)
CLOSE = dict(rtol=1e-5, atol=1e-5)  # Values of a few units, through two layers of float32.


class Net(nn.Module):
    """Two blocks of one norm class, the second called twice."""

    norm: type = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train):
        x = self.norm(use_running_average=not train, name="first")(nn.Dense(FEATURES)(x))
        again = self.norm(use_running_average=not train, name="second")
        return again(nn.relu(again(x)))


def variables_of(net):
    """Params and statistics that are not where they started."""
    variables = jax.jit(net.init, static_argnames="train")(jax.random.key(0), X, train=False)
    return jax.tree.map(lambda v: v + 0.3 if v.ndim else v, variables)


def trained(net, variables, make, where="", **options):
    @jax.jit
    def apply(variables):
        with jaxbn.linen.replace_norms(make, where, **options):
            return net.apply(variables, X, train=True, mutable=["batch_stats"])

    return apply(variables)


LAYERS = pytest.mark.parametrize("norm", [nn.BatchNorm, jaxbn.linen.BatchRenorm])


@LAYERS
def test_linen_frozen_norms_train_as_they_evaluate(norm):
    net = Net(norm)
    variables = variables_of(net)
    y, moved = trained(net, variables, jaxbn.frozen)
    np.testing.assert_allclose(y, net.apply(variables, X, train=False), **CLOSE)
    assert_trees_all_equal(moved["batch_stats"], variables["batch_stats"])


def test_linen_norms_are_chosen_by_path():
    net = Net()
    variables = variables_of(net)
    _, moved = trained(net, variables, jaxbn.frozen, "second$")
    assert_trees_all_equal(moved["batch_stats"]["second"], variables["batch_stats"]["second"])
    assert np.all(moved["batch_stats"]["first"]["mean"] != variables["batch_stats"]["first"]["mean"])


def test_linen_group_norm_takes_over_scale_and_bias():
    variables = variables_of(Net())
    y, _ = trained(Net(), variables, jaxbn.group_norm(2))
    params, norm = variables["params"], jaxbn.group_norm(2)
    x = X @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None]
    x, _ = norm.apply({"params": params["first"], "batch_stats": {}}, x, train=True)
    for _ in range(2):
        x, _ = norm.apply({"params": params["second"], "batch_stats": {}}, jax.nn.relu(x) if _ else x, train=True)
    np.testing.assert_allclose(y, x, **CLOSE)


def test_linen_init_makes_the_variables_of_the_new_norms():
    with jaxbn.linen.replace_norms(jaxbn.batch_renorm()):
        variables = Net().init(jax.random.key(0), X, train=False)
    assert set(variables["batch_stats"]["first"]) == {"mean", "var", "step"}


def test_linen_other_classes_are_replaced_where_they_are_named():
    layer = nn.LayerNorm(use_bias=False)
    variables = layer.init(jax.random.key(0), X)
    with jaxbn.linen.replace_norms(jaxbn.rms_norm(), kind=nn.LayerNorm):
        y = layer.apply(variables, X)
    np.testing.assert_allclose(y, X / np.sqrt((X**2).mean(1, keepdims=True)), rtol=1e-4)


def test_linen_a_function_traced_before_is_not_silently_left_as_it_was():
    net = Net()
    variables, apply = variables_of(net), jax.jit(lambda v: net.apply(v, X, train=False))
    apply(variables)
    with (
        pytest.raises(ValueError, match=r"chooses none.*enter the context inside"),
        jaxbn.linen.replace_norms(jaxbn.identity()),
    ):
        apply(variables)


def test_linen_a_path_that_is_not_there_is_answered_with_those_that_are():
    with pytest.raises(ValueError, match=r"'third' chooses none of the norms, which are \['first', 'second'\]"):
        trained(Net(), variables_of(Net()), jaxbn.frozen, "third")


# nnx


class Model(nnx.Module):
    """A norm used twice, and one in a list."""

    def __init__(self, norm):
        self.dense = nnx.Linear(FEATURES, FEATURES, rngs=nnx.Rngs(0))
        self.twice = norm(FEATURES, rngs=nnx.Rngs(0))
        self.blocks = nnx.List([self.twice, norm(FEATURES, rngs=nnx.Rngs(0))])

    def __call__(self, x):
        x = self.twice(self.dense(x))
        for block in self.blocks:
            x = block(nnx.relu(x))
        return x


def lifted(features, rngs):
    return jaxbn.nnx.Norm(jaxbn.batch_norm(), features, rngs=rngs)


NNX = [nnx.BatchNorm, jaxbn.nnx.BatchRenorm, lifted]


def pure(module, kind=nnx.BatchStat):
    return jax.tree.leaves(nnx.to_pure_dict(nnx.state(module, kind)))


def forward(model, x=X):
    with jax.numpy_rank_promotion("allow"):  # Flax's own norm broadcasts.
        return nnx.jit(lambda model, x: model(x))(model, x)


@pytest.mark.parametrize("norm", NNX)
def test_nnx_frozen_norms_train_as_they_evaluate(norm):
    model = Model(norm)
    forward(model)
    still = jaxbn.nnx.replace_norms(model, jaxbn.frozen)
    before = pure(still)
    y = forward(still)
    assert_trees_all_equal(pure(still), before)
    model.eval()
    np.testing.assert_allclose(y, forward(model), **CLOSE)
    assert still.twice is still.blocks[0]
    assert not still.twice.use_running_average


def test_nnx_replaced_model_shares_nothing_with_the_model():
    model = Model(jaxbn.nnx.BatchNorm)
    before = pure(model), pure(model, nnx.Param)
    private = jaxbn.nnx.replace_norms(model, jaxbn.group_norm(2))
    assert not pure(private)
    nnx.update(private, jax.tree.map(jnp.zeros_like, nnx.state(private)))
    assert_trees_all_equal((pure(model), pure(model, nnx.Param)), before)


def test_nnx_norms_are_chosen_by_path_and_keep_their_values():
    model = Model(jaxbn.nnx.BatchNorm)
    model.blocks[1].scale[...] = jnp.arange(1.0, 5)
    changed = jaxbn.nnx.replace_norms(model, jaxbn.layer_norm(), r"blocks/1")
    assert isinstance(changed.twice, jaxbn.nnx.BatchNorm)
    np.testing.assert_array_equal(changed.blocks[1].params["scale"][...], np.arange(1.0, 5))


def test_nnx_a_norm_alone_is_replaced():
    norm = jaxbn.nnx.replace_norms(nnx.BatchNorm(FEATURES, rngs=nnx.Rngs(0)), jaxbn.rms_norm())
    assert isinstance(norm, jaxbn.nnx.Norm)


def test_nnx_hyperparameters_reach_the_function_that_makes_the_new_norm():
    norm = jaxbn.nnx.normalizer_of(nnx.BatchNorm(3, momentum=0.7, epsilon=1e-2, use_bias=False, rngs=nnx.Rngs(0)))
    assert norm == jaxbn.batch_norm(decay=0.7, epsilon=1e-2, use_bias=False, allow_single_value=True)


def test_nnx_a_path_that_is_not_there_is_answered_with_those_that_are():
    with pytest.raises(ValueError, match=r"chooses none of the norms, which are \['blocks/0', 'blocks/1'\]"):
        jaxbn.nnx.replace_norms(Model(nnx.BatchNorm), jaxbn.frozen, "third")


@pytest.mark.parametrize(("make", "kind"), [(lambda norm: 3, nnx.BatchNorm), (3, nnx.BatchNorm)])
def test_what_makes_no_normalizer_is_refused(make, kind):
    with pytest.raises(TypeError, match="make gave 3; expected a Normalizer"):
        jaxbn.nnx.replace_norms(Model(nnx.BatchNorm), make, kind=kind)


def test_a_module_that_stands_for_no_normalizer_is_refused():
    with pytest.raises(TypeError, match="LayerNorm stands for no Normalizer"):
        jaxbn.nnx.replace_norms(nnx.LayerNorm(3, rngs=nnx.Rngs(0)), jaxbn.frozen, kind=nnx.LayerNorm)


def test_a_norm_of_several_feature_axes_is_refused():
    norm = jaxbn.nnx.BatchNorm((2, 3), axis=(1, 2), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"features of shape \(2, 3\) cannot be replaced"):
        jaxbn.nnx.replace_norms(norm, jaxbn.frozen)
