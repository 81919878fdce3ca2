"""The measures and the networks of the experiment `gradient_flow`."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.training import data, loop
from experiments.training.similarity import linear_cka
from experiments.training.switched_towers import NEVER, task
from experiments.training.towers import BY_BATCH, CONSTANT, NONE

X = np.random.default_rng(0).normal(1.0, 2.0, (50, 4)).astype(np.float32)
WHITE = np.linalg.qr(X - X.mean(0))[0]  # four orthonormal columns of mean 0


def test_cka_ignores_rotation_scale_and_shift():
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]
    np.testing.assert_allclose(linear_cka(X, -3 * X @ rotation + 5), 1, rtol=1e-5)


def test_cka_of_orthogonal_representations_is_zero():
    np.testing.assert_allclose(linear_cka(WHITE[:, :2], WHITE[:, 2:]), 0, atol=1e-6)


def test_cka_of_white_representations_is_the_share_of_common_directions():
    # |Y'X|^2 is the number of common columns, |X'X| the root of the number of columns.
    np.testing.assert_allclose(linear_cka(WHITE[:, :3], WHITE[:, 2:]), 1 / np.sqrt(3 * 2), rtol=1e-5)


def test_cka_with_a_constant_is_zero():
    assert linear_cka(X, jnp.ones((50, 3))) == 0


@pytest.mark.parametrize(("half", "layer"), [("lower", 0), ("upper", 2)])
def test_half_of_the_layers_stands_still_from_its_step_on(half, layer):
    run = {"seed": 0, "number": 0, "rate": 0.1, "lower": NEVER, "upper": NEVER, half: 0}
    runs = [{**run, "kind": kind} for kind in (NONE, BY_BATCH, CONSTANT)]
    arrays, numbers = loop.on_device(data.load("mnist5k")), loop.stacked(runs, len(runs))
    programs = loop.compile_grid(task("mnist5k", 3, 8), loop.Schedule(2, 2, 50), len(runs))
    before = kernels(programs.start(numbers, arrays))
    states, _ = programs.advance(programs.start(numbers, arrays), numbers, arrays, 0)
    after = kernels(states)
    moved = [np.abs(b - a).max((1, 2)) > 0 for a, b in zip(before, after, strict=True)]
    np.testing.assert_array_equal(moved, [[number != layer] * len(runs) for number in range(4)])


def kernels(states):
    """Those of three hidden layers and of the head, each [runs, units, inputs]."""
    first, rest, head = (states["variables"]["params"][name] for name in ("first", "rest", "head"))
    rest = np.array(rest["layer"]["kernel"])
    return [np.array(first["layer"]["kernel"]), rest[:, 0], rest[:, 1], np.array(head["kernel"])]
