"""Fine-tuning: normalizers that stand still, and parts of a network chosen by path."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from normalizers import KEY, draw, in_training

import jaxbn
import jaxbn.linen
from jaxbn import variants

X = draw(0, (6, 4))
TREE = {
    "Dense_0": {"kernel": jnp.ones((4, 4))},
    "Norm_0": {"scale": jnp.ones(4), "bias": jnp.zeros(4)},
    "Block": {"Norm_1": {"scale": jnp.ones(4)}},
}


def test_frozen_training_is_evaluation():
    plain = jaxbn.batch_norm()
    variables = in_training(plain, X)
    y, stats = variants.frozen(plain).apply(variables, X, train=True)
    np.testing.assert_array_equal(y, plain.apply(variables, X, train=False)[0])
    jax.tree.map(np.testing.assert_array_equal, stats, variables["batch_stats"])


@pytest.mark.parametrize("freeze_params", [False, True])
def test_params_are_frozen_by_choice(freeze_params):
    norm = variants.frozen(jaxbn.batch_norm(), freeze_params=freeze_params)
    variables = in_training(norm, X)
    loss = lambda params: jnp.sum(norm.apply(variables | {"params": params}, X, train=True)[0] ** 2)
    grads = jax.grad(loss)(variables["params"])
    assert all(np.all(g == 0) == freeze_params for g in grads.values())


def test_frozen_takes_the_variables_of_the_norm_it_freezes():
    plain = variants.batch_renorm()
    made, expected = variants.frozen(plain).init(KEY, X), plain.init(KEY, X)
    jax.tree.map(np.testing.assert_array_equal, made, expected)


@pytest.mark.parametrize(
    ("path_filter", "chosen"),
    [
        ("Norm", {"Norm_0/scale", "Norm_0/bias", "Block/Norm_1/scale"}),
        ("^Norm", {"Norm_0/scale", "Norm_0/bias"}),
        ("scale$", {"Norm_0/scale", "Block/Norm_1/scale"}),
        (lambda path: path.startswith("Dense"), {"Dense_0/kernel"}),
    ],
)
def test_path_filter_chooses_leaves(path_filter, chosen):
    mask = variants.path_mask(TREE, path_filter)
    found = {
        jax.tree_util.keystr(p, simple=True, separator="/") for p, v in jax.tree_util.tree_leaves_with_path(mask) if v
    }
    assert found == chosen
    assert jax.tree.structure(mask) == jax.tree.structure(TREE)


def test_optimizer_leaves_masked_params_alone():
    optimizer = optax.chain(optax.sgd(0.1), optax.masked(optax.set_to_zero(), variants.path_mask(TREE, "Norm")))
    updates, _ = optimizer.update(TREE, optimizer.init(TREE), TREE)
    assert jnp.all(updates["Dense_0"]["kernel"] == -0.1)
    assert jnp.all(updates["Norm_0"]["scale"] == 0)


def test_no_gradient_flows_through_chosen_leaves():
    total = lambda tree: sum(jnp.sum(v) for v in jax.tree.leaves(variants.stop_gradient_at(tree, "Norm")))
    grads = jax.grad(total)(TREE)
    assert jnp.all(grads["Dense_0"]["kernel"] == 1)
    assert jnp.all(grads["Block"]["Norm_1"]["scale"] == 0)


def test_chosen_statistics_of_a_network_are_kept():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = jaxbn.linen.Norm(jaxbn.batch_norm(), name="stem")(x, use_running_average=not train)
            return jaxbn.linen.Norm(jaxbn.batch_norm(), name="head")(x, use_running_average=not train)

    variables = Net().init(KEY, X, train=False)
    _, moved = Net().apply(variables, X, train=True, mutable="batch_stats")
    kept = variants.keep_at(variables["batch_stats"], moved["batch_stats"], "stem")
    np.testing.assert_array_equal(kept["stem"]["mean"], np.zeros(4))
    np.testing.assert_array_equal(kept["head"]["var"], moved["batch_stats"]["head"]["var"])


def boxed(tree):
    return jax.tree.map(lambda v: nn.Partitioned(v, names=(None,) * v.ndim), tree)


@pytest.mark.parametrize("make", [boxed, nnx.State, lambda tree: nnx.State(jax.tree.map(nnx.Param, tree))])
def test_paths_are_as_users_write_them_in_boxes_and_states(make):
    tree = make(TREE)
    mask = variants.path_mask(tree, "(scale|bias)$")
    assert jax.tree.structure(mask) == jax.tree.structure(tree)
    assert jax.tree.leaves(mask) == jax.tree.leaves(variants.path_mask(TREE, "(scale|bias)$"))
    total = lambda tree: sum(jnp.sum(v) for v in jax.tree.leaves(variants.stop_gradient_at(tree, "scale$")))
    sums = [float(jnp.sum(g)) for g in jax.tree.leaves(jax.grad(total)(tree))]
    assert sums == [0.0, 16.0, 4.0, 0.0]  # Block/Norm_1/scale, Dense_0/kernel, Norm_0/bias, Norm_0/scale.


@pytest.mark.parametrize(
    "choose", [variants.path_mask, variants.stop_gradient_at, lambda tree, f: variants.keep_at(tree, tree, f)]
)
@pytest.mark.parametrize("path_filter", ["BatchNorm", "scale/value$", lambda path: False])
def test_a_filter_that_chooses_nothing_is_refused(choose, path_filter):
    with pytest.raises(ValueError, match=r"chooses none of the paths.*Norm_0/scale"):
        choose(TREE, path_filter)


def test_a_tree_without_leaves_has_nothing_to_choose():
    assert variants.path_mask({"params": {}}, "scale") == {"params": {}}
