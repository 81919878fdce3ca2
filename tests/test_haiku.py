"""Any Normalizer as a Haiku module: the values of the normalizer, and Haiku's way of keeping state."""

import jax
import numpy as np
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal
from normalizers import CASES, draw

import jaxbn

hk = pytest.importorskip("haiku", reason="the Haiku module needs the package: pip install dm-haiku")


def network(norm, **arguments):
    @hk.without_apply_rng
    @hk.transform_with_state
    def apply(x, is_training):
        return jaxbn.haiku.Norm(norm, name="norm")(x, is_training, **arguments)

    return apply


@pytest.mark.parametrize(
    "name", ["batch_norm", "batch_renorm", "batch_norm, cumulative", "conditional_batch_norm, vectors", "group_norm"]
)
def test_it_is_the_normalizer(name):
    case, x = CASES[name], draw()
    norm, net = case.build(None), network(case.build(None), **case.arguments)
    variables = norm.init(jax.random.key(0), x)
    params, state = net.init(jax.random.key(0), x, True)
    assert jax.tree.structure(params.get("norm", {})) == jax.tree.structure(variables["params"])
    assert_trees_all_equal(state.get("norm", {}), variables["batch_stats"])
    variables["params"] = params["norm"]
    for mode in (True, False):
        y, state = jax.jit(net.apply, static_argnums=3)(params, state, x, mode)
        expected, stats = jax.jit(norm.apply, static_argnames="train")(variables, x, train=mode, **case.arguments)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
        assert_trees_all_close(state.get("norm", {}), stats, rtol=1e-6)
        variables["batch_stats"] = stats


def test_it_is_made_without_its_axis_and_on_one_example():
    params, _ = network(jaxbn.batch_norm(axis_name="data")).init(jax.random.key(0), draw()[:1], True)
    assert params["norm"]["scale"].shape == (4,)


def test_statistics_pool_over_a_named_axis():
    x, whole, net = draw(), jaxbn.batch_norm(), network(jaxbn.batch_norm(axis_name="data"))
    params, state = net.init(jax.random.key(0), x, True)
    parts = x.reshape(2, 4, *x.shape[1:])
    y, _ = jax.vmap(lambda x: net.apply(params, state, x, True), axis_name="data")(parts)
    expected, _ = whole.apply(whole.init(jax.random.key(0), x), x, train=True)
    np.testing.assert_allclose(y.reshape(x.shape), expected, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_haikus_own_layer_comes_over():
    """Statistics of `hk.BatchNorm`, converted, are what the module evaluates by."""
    x = draw()

    @hk.without_apply_rng
    @hk.transform_with_state
    def theirs(x, is_training):
        return hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9, name="bn")(x, is_training)

    with jax.numpy_rank_promotion("allow"):
        params, state = theirs.init(jax.random.key(0), x, True)
        _, state = theirs.apply(params, state, x, True)
        expected, _ = theirs.apply(params, state, x, False)
    ours = jaxbn.convert.from_haiku(params, state, "bn", decay=0.9)
    net = network(jaxbn.batch_norm(decay=0.9, debias=True))
    y, _ = net.apply({"norm": ours["params"]}, {"norm": ours["batch_stats"]}, x, False)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
