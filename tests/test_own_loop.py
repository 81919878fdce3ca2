"""Gradient accumulation in a loop of one's own: microbatches pool their moments, and the statistics move once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_network
from normalizers import KEY, QUICK, draw

import jaxbn

EVERY = 4  # Microbatches a step.
PARTS = jax.tree.map(lambda v: v.reshape(EVERY, -1, *v.shape[1:]), small_network.FIRST)
# Sums of 64 terms in another order.
ROUNDED = {"rtol": 2e-6, "atol": 2e-6}


NORM = jaxbn.batch_norm(decay=None)
START = small_network.initial(NORM)


@functools.cache
def accumulated():
    """Params and statistics after each of two steps of `optax.MultiSteps`, and what is pooled then."""
    loss, optimizer = small_network.loss_of(NORM), optax.MultiSteps(optax.sgd(0.1), every_k_schedule=EVERY)

    def microbatch(carry, batch):
        params, opt_state, batch_stats, pooled = carry

        def mean_loss(params):
            output = loss({"params": params, "batch_stats": pooled}, batch, KEY)
            return output.loss_sum / output.weight_sum, output.batch_stats

        gradient, pooled = jax.grad(mean_loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        full = optimizer.has_updated(opt_state)
        moved = jaxbn.finish_pooling(pooled, batch_stats)
        batch_stats = jax.tree.map(lambda new, old: jnp.where(full, new, old), moved, batch_stats)
        pooled = jax.tree.map(lambda new, old: jnp.where(full, new, old), jaxbn.start_pooling(batch_stats), pooled)
        return (params, opt_state, batch_stats, pooled), None

    step = jax.jit(lambda carry: jax.lax.scan(microbatch, carry, PARTS)[0], compiler_options=QUICK)
    params, batch_stats = START["params"], START["batch_stats"]
    first = step((params, optimizer.init(params), batch_stats, jaxbn.start_pooling(batch_stats)))
    return first, step(first)


def test_statistics_of_the_first_layer_move_as_by_the_whole_batch():
    (_, _, batch_stats, pooled), _ = accumulated()
    expected = small_network.apply(NORM, START, small_network.FIRST)[1][0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **ROUNDED), batch_stats[0], expected)
    jax.tree.map(np.testing.assert_array_equal, pooled, jaxbn.start_pooling(batch_stats))


def test_each_step_moves_them_once():
    for number, (_, _, batch_stats, _) in enumerate(accumulated(), 1):
        np.testing.assert_array_equal(batch_stats[1]["weight"], number)


def test_plain_statistics_are_no_pooled_ones():
    stats = jaxbn.batch_norm().init(KEY, draw())["batch_stats"]
    with pytest.raises(ValueError, match=r"expected what the network made of start_pooling"):
        jaxbn.finish_pooling(stats, stats)


def test_what_pools_already_is_refused():
    stats = jaxbn.batch_norm().init(KEY, draw())["batch_stats"]
    with pytest.raises(TypeError, match="finish_pooling first"):
        jaxbn.start_pooling(jaxbn.start_pooling(stats))


def test_nothing_pooled_moves_nothing():
    stats = jaxbn.batch_norm(decay=None).init(KEY, draw())["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, jaxbn.finish_pooling(jaxbn.start_pooling(stats), stats), stats)


def test_a_network_without_statistics_pools_none():
    assert jaxbn.finish_pooling(jaxbn.start_pooling({}), {}) == {}
