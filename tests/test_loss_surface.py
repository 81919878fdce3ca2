"""What `experiments.loss_surface` takes for flat, and the optimizer that is chosen by a number."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray as xr

from experiments import loss_surface
from experiments.loss_surface import LINE, OPTIMIZERS, PLAIN, STATISTICS


def results(line: np.ndarray) -> xr.Dataset:
    """Results in which the loss of one seed is the same on every line."""
    names = list(OPTIMIZERS)
    along = np.broadcast_to(line, (2, len(names), 1, len(names), len(STATISTICS), len(line)))
    axes = ("arm", "optimizer", "seed", "other", "statistics", "point")
    return xr.Dataset({"along": (axes, along)}, {"arm": [PLAIN, "batch norm"], "optimizer": names, "seed": [0]})


def share(line: np.ndarray) -> float:
    """The share of `line` that is flat."""
    found = loss_surface.flat(results(line))
    assert float(found.max() - found.min()) == 0
    return float(found.mean())


def test_half_of_a_line_is_a_plateau():
    assert share(np.maximum(LINE, 0.5)) == 0.5


def test_straight_line_has_no_plateau():
    assert share(3 - LINE) == 0


def test_hill_has_four_percent_on_average():
    hills = [np.sin(np.pi * (LINE + top)) ** 2 for top in np.linspace(0, 1 / 16, 50, endpoint=False)]
    # The slope is below a tenth of its mean, 2 / pi of the steepest, on 2 asin(0.2 / pi) / pi of the way.
    np.testing.assert_allclose(np.mean([share(hill) for hill in hills]), 2 * np.arcsin(0.2 / np.pi) / np.pi, atol=0.005)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_chosen_optimizer_steps_like_the_one_of_that_name(name):
    make, rate = OPTIMIZERS[name]
    run = {"factor": jnp.float32(3), "number": jnp.float32(list(OPTIMIZERS).index(name))}
    start = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[0.5]])}
    found = []
    for optimizer in (loss_surface.chosen(run), make(3 * rate)):
        params, state = start, optimizer.init(start)
        for _ in range(3):
            updates, state = optimizer.update(jax.tree.map(jnp.sin, params), state, params)
            params = optax.apply_updates(params, updates)
        found.append(params)
    # A few roundings of float32: the rate is computed, and the leaves lie in one array.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *found)
