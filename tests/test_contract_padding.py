"""Padding is silent in every normalizer: NaN and infinity under a mask change no output, statistic or gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from normalizers import AGAIN, CASES, KEY, QUICK, SHAPE, draw, ready

import jaxbn

WHERE = np.arange(SHAPE[0])[:, None, None] < 6
FILLS = (0.0, np.nan, np.inf)
run = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in AGAIN else ()) for name in CASES]
)


@functools.cache
def observed(name):
    """Outputs, statistics and gradients by params, x and the residual, [fills, ...] each, in both modes."""
    arguments = CASES[name].arguments
    # The derivative of tanh at NaN is NaN, which that of relu hides.
    norm = CASES[name].build(None, activation=jnp.tanh)
    variables = ready(name).variables

    def measured(mode, fill):
        x, residual = (jnp.where(WHERE, draw(seed), fill) for seed in (0, 1))

        def loss(params, x, residual):
            batch = dict(where=WHERE, residual=residual, **arguments)
            y, stats = norm.apply({**variables, "params": params}, x, train=mode, **batch)
            return jnp.sum(jnp.where(WHERE, y * draw(2), 0)), (jnp.where(WHERE, y, 0), stats)

        return jax.grad(loss, (0, 1, 2), has_aux=True)(variables["params"], x, residual)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def program(fills):
        return [jax.lax.map(functools.partial(measured, mode), fills) for mode in (True, False)]

    return program(jnp.asarray(FILLS))


@run
@pytest.mark.parametrize("fill", [1, 2], ids=["NaN", "infinity"])
@pytest.mark.parametrize("mode", [0, 1], ids=["training", "evaluation"])
def test_padding_changes_nothing_that_counts(name, mode, fill):
    for values in jax.tree.leaves(observed(name)[mode]):
        assert np.all(np.isfinite(values[0]))
        np.testing.assert_array_equal(values[fill], values[0])


def test_padding_of_a_sequence_changes_no_gradient_of_a_cell():
    cell = jaxbn.batch_norm_lstm(3, 4)
    x = draw(0, (6, 5))
    variables, where = cell.init(KEY, x), np.arange(6) < 4

    def loss(params, x):
        carry = cell.initial_carry(x)
        for _ in range(2):
            carry, y, _ = cell.apply({**variables, "params": params}, carry, x, train=True, where=where)
        return jnp.sum(jnp.where(where[:, None], y, 0))

    gradient = jax.jit(jax.grad(loss), compiler_options=QUICK)
    silent, loud = (gradient(variables["params"], jnp.where(where[:, None], x, fill)) for fill in (0.0, jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, loud, silent)
