"""The switched LSTM of the experiment `recurrent`: the library's with all switches on, Flax's LSTM with none."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.training import switched_lstm
from experiments.training.loop import softmax_loss
from experiments.training.switched_lstm import PARTS, averaged_over_time, gradient_sizes, sequence, switches
from jaxbn.variants import batch_norm_lstm

TIME, BATCH, INPUTS, FEATURES = 4, 6, 3, 5
X = jax.random.normal(jax.random.key(1), (TIME, BATCH, INPUTS))
LABELS = jnp.arange(BATCH)
NETWORK = switched_lstm.switched_lstm(FEATURES, TIME)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # some hundred operations of float32 on values of size one


def variables(*parts, **numbers):
    return NETWORK.init(switches(*parts, **numbers), jax.random.key(0), X)


def test_with_every_switch_on_it_is_the_batch_normalized_lstm_of_the_library():
    ours = variables(*PARTS, noise=0.0)
    params = ours["params"]
    cell = batch_norm_lstm(FEATURES, TIME, decay=switched_lstm.DECAY)
    theirs = cell.init(jax.random.key(0), X[0])
    of = {part: {"scale": params["scale"][part]} for part in PARTS}
    for part in ("input", "recurrent"):
        of[part]["kernel"] = params["kernel"][part]
    of |= {"cell": of["cell"] | {"bias": params["bias"]["cell"]}, "bias": params["bias"]["gates"]}

    def step(state, x):
        carry, stats = state
        carry, _, stats = cell.apply({"params": of, "batch_stats": stats}, carry, x, train=True)
        return (carry, stats), None

    (carry, stats), _ = jax.lax.scan(step, (cell.initial_carry(X[0]), theirs["batch_stats"]), X)
    logits, moved = NETWORK.apply(ours, X, train=True)
    np.testing.assert_allclose(logits, carry.hidden @ params["kernel"]["head"], **CLOSE)
    jax.tree.map(partial(np.testing.assert_allclose, **CLOSE), moved["rows"], stats)


@pytest.mark.parametrize("train", [True, False])
def test_with_no_switch_on_it_is_an_lstm(train):
    ours = variables(noise=0.0)
    params = ours["params"]
    names = {"f": 0, "i": 1, "o": 2, "g": 3}
    parts = {key: jnp.split(params["kernel"][key], 4, axis=1) for key in ("input", "recurrent")}
    bias = jnp.split(params["bias"]["gates"], 4)
    theirs = {f"i{name}": {"kernel": parts["input"][place]} for name, place in names.items()}
    theirs |= {f"h{name}": {"kernel": parts["recurrent"][place], "bias": bias[place]} for name, place in names.items()}
    rnn = nn.RNN(nn.OptimizedLSTMCell(FEATURES), time_major=True)
    hidden = rnn.apply({"params": {"cell": theirs}}, X)[-1]
    logits, _ = NETWORK.apply(ours, X, train=train)
    np.testing.assert_allclose(logits, hidden @ params["kernel"]["head"], **CLOSE)


def test_noise_differs_between_examples_and_from_step_to_step():
    ours = variables(noise=1.0)
    same = jnp.broadcast_to(X[:, :1], X.shape)
    first, moved = NETWORK.apply(ours, same, train=True)
    second, _ = NETWORK.apply({**ours, "batch_stats": moved}, same, train=True)
    assert jnp.all(jnp.std(first, axis=0) > 0)
    assert not jnp.any(first == second)


def test_averaging_over_time_leaves_statistics_alone_that_are_the_same_in_every_step():
    ours = variables(*PARTS)
    rows = averaged_over_time(ours)["batch_stats"]["rows"]
    jax.tree.map(np.testing.assert_array_equal, rows, ours["batch_stats"]["rows"])
    mean = jnp.arange(4.0 * TIME * FEATURES).reshape(TIME, 4 * FEATURES)
    ours["batch_stats"]["rows"]["input"]["mean"] = mean
    shared = averaged_over_time(ours)["batch_stats"]["rows"]["input"]["mean"]
    np.testing.assert_allclose(shared, jnp.broadcast_to(mean.mean(0), mean.shape))


def test_gradient_by_the_last_state_is_that_of_the_head():
    ours = variables(*PARTS)
    by_states, by_params = gradient_sizes(NETWORK, softmax_loss, ours, X, LABELS)
    logits, _ = NETWORK.apply(ours, X, train=True)
    by_logits = jax.grad(softmax_loss)(logits, LABELS)
    expected = jnp.log10(jnp.linalg.norm(by_logits @ ours["params"]["kernel"]["head"].T))
    assert by_states.shape == (TIME,)
    assert jnp.isfinite(by_params)
    np.testing.assert_allclose(by_states[-1], expected, rtol=1e-5)


@pytest.mark.parametrize(("value", "power"), [(1e30, 30.5), (0.0, -38.0), (np.inf, 38.0), (np.nan, 38.0)])
def test_powers_of_ten_neither_overflow_nor_are_lost(value, power):
    np.testing.assert_allclose(switched_lstm._power_of_ten(jnp.full(10, value)), power, rtol=1e-6)


def test_every_order_shows_every_pixel_once():
    images = jnp.arange(2 * 16.0).reshape(2, 4, 4, 1)
    rows, pixels, permuted = (sequence(images, order) for order in switched_lstm.ORDERS)
    assert rows.shape == (4, 2, 4)
    assert pixels.shape == permuted.shape == (16, 2, 1)
    np.testing.assert_array_equal(rows[1, 0], [4, 5, 6, 7])
    np.testing.assert_array_equal(pixels[:, 0, 0], np.arange(16))
    np.testing.assert_array_equal(np.sort(permuted[:, 1, 0]), np.arange(16, 32))
    assert not np.array_equal(permuted, pixels)
