import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from experiments.training.resnet import patch_convolve, resnet, small_resnet, xla_convolve

KEY = jax.random.key(0)


def sizes(network, shape):
    variables = jax.eval_shape(network.init, KEY, jax.ShapeDtypeStruct(shape, jnp.float32))
    return variables, sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (56, 0.85), (110, 1.7)])
def test_small_networks_have_the_published_number_of_parameters(depth, millions):
    """He et al. 2016, table 6."""
    _, parameters = sizes(small_resnet(depth, jaxbn.batch_norm()), (2, 32, 32, 3))
    assert round(parameters / 1e6, 2 if millions < 1 else 1) == millions


def test_resnet50_has_the_well_known_number_of_parameters():
    variables, parameters = sizes(resnet(50, jaxbn.batch_norm()), (2, 224, 224, 3))
    assert parameters == 25_557_032
    assert len(variables["batch_stats"]) == 53


def test_depth_counts_the_weighted_layers():
    variables, _ = sizes(small_resnet(56, jaxbn.identity()), (2, 32, 32, 3))
    assert len(variables["params"]) == 56


def test_a_network_of_one_stage_has_2n_plus_2_layers():
    variables, _ = sizes(small_resnet(4, jaxbn.identity(), stages=1), (2, 28, 28, 1))
    assert list(variables["params"]) == ["head", "stage0/block0/conv1", "stage0/block0/conv2", "stem"]


@pytest.mark.parametrize("depth", [1, 2, 18, 21])
def test_a_depth_that_is_not_6n_plus_2_is_refused(depth):
    with pytest.raises(ValueError, match=r"expected 6 n \+ 2"):
        small_resnet(depth, jaxbn.batch_norm())


def test_another_depth_than_50_or_101_is_refused():
    with pytest.raises(ValueError, match=r"depth=18; expected one of \[50, 101\]"):
        resnet(18, jaxbn.batch_norm())


def test_without_shortcuts_a_zero_kernel_cuts_the_network():
    """With them the input still gets through."""
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)

    @jax.jit
    def spread_of_logits():
        spreads = []
        for residual in (True, False):
            network = small_resnet(8, jaxbn.identity(), width=4, residual=residual)
            variables = network.init(KEY, x)
            first = variables["params"]["stage0/block0/conv1"]
            first["kernel"] = jnp.zeros_like(first["kernel"])
            spreads.append(jnp.std(network.apply(variables, x, train=True)[0], axis=0).max())
        return spreads

    with_shortcuts, without = spread_of_logits()
    assert with_shortcuts > 0.01
    assert without == 0


def test_training_moves_the_statistics_of_every_unit_and_test_mode_none():
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    network = small_resnet(8, jaxbn.batch_norm(decay=0.9), width=4)

    @jax.jit
    def both(variables):
        return [network.apply(variables, x, train=train)[1] for train in (True, False)]

    variables = jax.jit(network.init)(KEY, x)
    trained, kept = both(variables)
    for name, before in variables["batch_stats"].items():
        assert not np.array_equal(trained[name]["mean"], before["mean"])
        np.testing.assert_array_equal(kept[name]["mean"], before["mean"])


def test_convolution_by_patches_is_the_same_network():
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    networks = [small_resnet(8, jaxbn.identity(), width=4, convolve=c) for c in (xla_convolve, patch_convolve)]
    variables = networks[0].init(KEY, x)
    ours, theirs = (jax.jit(network.apply, static_argnames="train")(variables, x, train=True) for network in networks)
    # Two orders of summing 36 products, through seven layers.
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4, atol=1e-5)


def test_bfloat16_activations_leave_weights_and_logits_float32():
    network = resnet(50, jaxbn.batch_norm(), dtype=jnp.bfloat16)
    variables = jax.eval_shape(network.init, KEY, jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32))
    logits, batch_stats = jax.eval_shape(
        lambda v, x: network.apply(v, x, train=True), variables, jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, logits, batch_stats))} == {jnp.dtype(jnp.float32)}
