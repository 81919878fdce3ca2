"""What was tried before batch norm: held against batch norm itself, to which each piece is tied by an identity."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbn
from experiments.training import loop, models, predecessors

NORM = jaxbn.batch_norm(epsilon=1e-5)
AFFINE = jaxbn.frozen(NORM)
build = partial(models.mlp, (7, 6), use_bias=True, activation=jax.nn.sigmoid, weights=models.normal_weights(0.5))
IMAGES = jax.random.normal(jax.random.key(1), (32, 5)) + 1
LABELS = jnp.arange(32) % 10
VARIABLES = build(NORM).init(jax.random.key(0), IMAGES)


def gradient(network, variables):
    def loss(params):
        return loop.softmax_loss(network.apply({**variables, "params": params}, IMAGES, train=True)[0], LABELS)

    return jax.grad(loss)(variables["params"])


def test_stopped_gradients_change_neither_outputs_nor_statistics():
    found, expected = (build(n).apply(VARIABLES, IMAGES, train=True) for n in (predecessors.stopped(NORM), NORM))
    chex.assert_trees_all_close(found, expected, atol=1e-6)


def test_stopped_gradients_move_the_bias_and_whole_ones_do_not():
    sizes = [optax.tree.norm([p["layer"]["bias"] for p in gradient(build(norm), VARIABLES)[:-1]])
             for norm in (predecessors.stopped(NORM), NORM)]  # fmt: skip
    assert sizes[0] > 1e-2
    assert sizes[1] < 1e-6


def test_a_renormalized_network_computes_what_batch_norm_does_on_that_batch():
    after = predecessors.renormalizing(build, 1e-5)(VARIABLES, IMAGES)
    found, _ = build(AFFINE).apply(after, IMAGES, train=True)
    expected, _ = build(NORM).apply(VARIABLES, IMAGES, train=True)
    chex.assert_trees_all_close(found, expected, atol=1e-4)  # both have epsilon


def test_the_penalty_is_added_to_the_loss_in_training_alone():
    apply, loss = predecessors.penalized(build, AFFINE, 2.0)
    outputs, _ = apply(VARIABLES, IMAGES, train=True)
    logits, _ = apply(VARIABLES, IMAGES, train=False)
    assert float(loss(outputs, LABELS)) == pytest.approx(float(loop.softmax_loss(logits, LABELS) + 2 * outputs[1]))
    _, (first, _) = build(models.watched(AFFINE, lambda x, y: x)).apply(VARIABLES, IMAGES, train=True)
    expected = np.mean(np.mean(first, 0) ** 2 + (np.std(first, 0) - 1) ** 2)
    assert 0 < expected < float(outputs[1])  # one of two layers


def test_the_delivered_share_is_what_small_steps_show():
    network, through = build(predecessors.stopped(NORM)), build(NORM)
    share = predecessors.delivered(network, through, VARIABLES, IMAGES, LABELS)
    own, rate = gradient(network, VARIABLES), 1e-2
    moved = [
        {**p, "layer": optax.tree.add_scale(p["layer"], -rate, g["layer"])}
        for p, g in zip(VARIABLES["params"][:-1], own[:-1], strict=True)
    ]
    losses = [
        loop.softmax_loss(through.apply({**VARIABLES, "params": params}, IMAGES, train=True)[0], LABELS)
        for params in (VARIABLES["params"], [*moved, VARIABLES["params"][-1]])
    ]
    forecast = rate * optax.tree.norm([g["layer"] for g in own[:-1]], squared=True)
    assert float(share) == pytest.approx(float((losses[0] - losses[1]) / forecast), rel=0.1)
    assert float(predecessors.delivered(through, through, VARIABLES, IMAGES, LABELS)) == pytest.approx(1)


def test_a_stopped_gradient_moves_a_lone_bias_evenly_and_the_loss_not_at_all():
    with jax.enable_x64(True):
        u, head = (
            jax.random.normal(jax.random.key(n), shape, jnp.float64) for n, shape in ((2, (32, 4)), (3, (4, 10)))
        )
        alone = lambda stop: jax.device_get(
            predecessors.bias_alone(u, head, LABELS, stop=jnp.array(stop), rate=0.1, steps=10)
        )
        (loss, length), (_, still) = alone(True), alone(False)
    np.testing.assert_allclose(loss, loss[0], rtol=1e-13)
    np.testing.assert_allclose(length, np.arange(11) * length[1], rtol=1e-12)
    assert still[-1] < 1e-13 * length[-1]
