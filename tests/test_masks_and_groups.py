"""batch_norm under masks, weights and ghost groups: what counts, what it counts as, and with whom."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hard_inputs import FEATURES, HARD_INPUTS, ROWS, cotangent
from oracle import BOUND, assert_exact, reference

from jaxbn import batch_norm, batch_normalize, identity

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
# Both sides keep the promise of 1e-6 of the values' size, so that they differ by twice that at most.
SAME = {"rtol": 2e-6, "atol": 2e-6}


def draw(*shape, offset=3.0):
    return RNG.normal(offset, 2.0, shape).astype(np.float32)


def train(norm, x, variables=None, **kwargs):
    variables = norm.init(KEY, x) if variables is None else variables
    return jax.jit(lambda v, x: norm.apply(v, x, train=True, **kwargs))(variables, x)


def test_masked_batch_equals_the_smaller_batch():
    x, kept, norm = draw(12, 5), RNG.uniform(size=12) > 0.4, batch_norm()
    y, stats = train(norm, x, where=kept[:, None])
    expected = train(norm, x[kept])
    chex.assert_trees_all_close((y[kept], stats), expected, **SAME)


@pytest.mark.parametrize("axis", [-1, 1])
def test_mask_of_examples_on_images(axis):
    x, kept, norm = draw(6, 4, 4, 4), np.array([1, 1, 0, 1, 0, 1], bool), batch_norm(feature_axis=axis)
    y, stats = train(norm, x, where=kept[:, None, None, None])
    chex.assert_trees_all_close((y[kept], stats), train(norm, x[kept]), **SAME)


def test_masked_places_are_normalized_too():
    x, kept = draw(12, 5), RNG.uniform(size=(12, 1)) > 0.4
    y, _ = train(batch_norm(), x, where=kept)
    assert_exact({"y": y}, *reference(x, axis=0, where=kept), axis=0)


def test_weighted_batch_equals_the_batch_with_repetitions():
    x, times, norm = draw(8, 5), np.array([1, 2, 3, 0, 1, 5, 2, 1]), batch_norm(unbiased=True)
    y, stats = train(norm, x, weights=times[:, None].astype(np.float32))
    y_repeated, stats_repeated = train(norm, np.repeat(x, times, axis=0))
    chex.assert_trees_all_close(jnp.repeat(y, times, axis=0), y_repeated, **SAME)
    chex.assert_trees_all_close(stats, stats_repeated, **SAME)


@pytest.mark.parametrize("options", [{}, {"debias": True}, {"decay": None}], ids=str)
def test_feature_that_saw_nothing_keeps_its_statistics_and_is_finite(options):
    x, norm = draw(8, 3), batch_norm(**options)
    variables = norm.init(KEY, x)
    y, stats = train(norm, x, variables, where=np.array([True, False, True]))
    chex.assert_tree_all_finite((y, stats))
    for name, before in variables["batch_stats"].items():
        assert stats[name][1] == before[1]
        assert stats[name][0] != before[0]


def test_batch_that_is_masked_whole_changes_nothing_and_is_finite():
    x, norm = draw(8, 3), batch_norm()
    variables = norm.init(KEY, x)
    y, stats = train(norm, x, variables, where=np.zeros((8, 1), bool))
    chex.assert_tree_all_finite(y)
    chex.assert_trees_all_equal(stats, variables["batch_stats"])


def test_gradient_of_a_feature_that_saw_nothing_is_finite():
    x, norm = draw(8, 3), batch_norm()
    variables, where = norm.init(KEY, x), np.array([True, False, True])

    def loss(params, x):
        y, _ = norm.apply({**variables, "params": params}, x, train=True, where=where)
        return jnp.sum(jnp.sin(y))

    chex.assert_tree_all_finite(jax.jit(jax.grad(loss, argnums=(0, 1)))(variables["params"], x))


def test_single_value_left_by_a_mask_is_no_error_and_finite():
    # How many values count is known at run time only: no exception can depend on it.
    y, stats = train(batch_norm(unbiased=True), draw(4, 3), where=np.array([[True], [False], [False], [False]]))
    chex.assert_tree_all_finite((y, stats))


def test_evaluation_ignores_the_mask():
    x, norm = draw(8, 3), batch_norm()
    variables = norm.init(KEY, x)
    masked = norm.apply(variables, x, train=False, where=np.zeros((8, 1), bool))
    chex.assert_trees_all_equal(masked, norm.apply(variables, x, train=False))


@pytest.mark.parametrize(("shape", "feature_axis"), [((12, 5), -1), ((12, 3, 3, 5), -1), ((12, 5, 3, 3), 1)])
def test_ghost_groups_are_normalized_each_by_itself(shape, feature_axis):
    x = draw(*shape)
    ghost, whole = batch_norm(group_size=4, feature_axis=feature_axis), batch_norm(feature_axis=feature_axis)
    y, _ = train(ghost, x)
    expected = [train(whole, group)[0] for group in np.split(x, 3)]
    chex.assert_trees_all_close(y, jnp.concatenate(expected), **SAME)


def test_ghost_groups_pool_their_running_statistics():
    x = draw(12, 5) + np.repeat([0.0, 50.0, -100.0], 4).astype(np.float32)[:, None]
    _, stats = train(batch_norm(group_size=4, decay=0.0, unbiased=True), x)
    _, expected = train(batch_norm(decay=0.0, unbiased=True), x)
    chex.assert_trees_all_close(stats, expected, rtol=BOUND)


def test_one_ghost_group_equals_no_groups():
    x = draw(12, 5)
    chex.assert_trees_all_close(train(batch_norm(group_size=12), x), train(batch_norm(), x), **SAME)


def test_ghost_groups_with_unequal_masks_pool_by_count():
    x, where = draw(12, 5), np.arange(12)[:, None] % 4 < np.repeat([1, 4, 2], 4)[:, None]
    y, stats = train(batch_norm(group_size=4, decay=0.0), x, where=where)
    exact, _ = reference(x, axis=0, where=where)
    np.testing.assert_allclose(stats["mean"], exact.mean, rtol=BOUND)
    np.testing.assert_allclose(stats["var"], exact.var, rtol=BOUND)
    parts = [reference(x[i : i + 4], axis=0, where=where[i : i + 4])[0].y for i in (0, 4, 8)]
    np.testing.assert_allclose(y, np.concatenate(parts), rtol=BOUND, atol=BOUND)


def test_ghost_groups_with_an_empty_one_are_finite_and_pool_the_rest():
    x, where = draw(12, 5), np.arange(12)[:, None] >= 4
    y, stats = train(batch_norm(group_size=4, decay=0.0), x, where=where)
    chex.assert_tree_all_finite((y, stats))
    np.testing.assert_allclose(stats["mean"], x[4:].astype(np.float64).mean(0), rtol=BOUND)


GHOSTS = batch_norm(group_size=ROWS // 16, decay=0.0)
GHOST_VARIABLES = GHOSTS.init(KEY, jax.ShapeDtypeStruct((ROWS, FEATURES), jnp.float32))


@jax.jit
def measure_ghosts(x, dy):
    def forward(x):
        return GHOSTS.apply(GHOST_VARIABLES, x, train=True)

    y, vjp, stats = jax.vjp(forward, x, has_aux=True)
    return y, vjp(dy)[0], stats


@pytest.mark.parametrize("name", HARD_INPUTS)
def test_ghost_groups_are_as_exact_as_whole_batches(name):
    x = HARD_INPUTS[name]
    dy = cotangent(x.shape)
    y, dx, stats = measure_ghosts(x, dy)
    for rows in np.split(np.arange(ROWS), 16):
        assert_exact({"y": y[rows], "dx": dx[rows]}, *reference(x[rows], dy[rows], axis=0), axis=0)
    assert_exact(stats, *reference(x, axis=0), axis=0)


@pytest.mark.parametrize("mode", [True, False])
def test_residual_is_added_before_the_activation(mode):
    x, shortcut = draw(8, 5), draw(8, 5, offset=0.0)
    fused, bare = batch_norm(activation=jax.nn.relu), batch_norm()
    variables = bare.init(KEY, x)
    y, stats = fused.apply(variables, x, train=mode, residual=shortcut)
    expected, expected_stats = bare.apply(variables, x, train=mode)
    chex.assert_trees_all_close((y, stats), (jax.nn.relu(expected + shortcut), expected_stats), **SAME)


def test_ghost_groups_take_a_residual():
    x, shortcut = draw(8, 5), draw(8, 5, offset=0.0)
    norm = batch_norm(group_size=4)
    chex.assert_trees_all_close(train(norm, x, residual=shortcut)[0], train(norm, x)[0] + shortcut, **SAME)


def test_identity_gives_its_input_back_and_has_nothing_to_learn():
    x, norm = draw(8, 5), identity()
    variables = norm.init(KEY, x)
    assert variables == {"params": {}, "batch_stats": {}}
    for mode in (True, False):
        y, stats = norm.apply(variables, x, train=mode)
        np.testing.assert_array_equal(y, x)
        assert stats == {}


@pytest.mark.parametrize("activation", [None, jax.nn.gelu])
def test_not_a_number_in_the_padding_stays_out_of_every_gradient(activation):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)
    mask = jnp.asarray([True] * 4 + [False] * 2)[:, None]

    def loss(x, scale, bias):
        how = dict(axis=0, epsilon=1e-5, activation=activation, where=mask)
        y, _ = batch_normalize(x, scale, bias, **how)
        return jnp.sum(jnp.where(mask, jnp.sin(y), 0))

    gradients = jax.grad(loss, (0, 1, 2))
    clean = gradients(x, jnp.ones(3), jnp.zeros(3))
    padded = gradients(jnp.where(mask, x, jnp.nan), jnp.ones(3), jnp.zeros(3))
    jax.tree.map(np.testing.assert_array_equal, padded, clean)
