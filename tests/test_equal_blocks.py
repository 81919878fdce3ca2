"""The network of the experiment `depth` against the network of each arm, written out by hand."""

import jax
import numpy as np
import pytest

import jaxbn
from experiments import depth
from experiments.training.equal_blocks import EqualBlocks, blocks_of

NETWORK = EqualBlocks(jaxbn.batch_norm(decay=0.9, epsilon=1e-3, use_bias=False), layers=6, width=3)
FLOW, APPLY = jax.jit(NETWORK.flow), jax.jit(lambda variables, x: NETWORK.apply(variables, x, train=True)[0])
IMAGES = np.random.default_rng(0).uniform(size=(4, 12, 12, 1)).astype(np.float32)
LABELS = np.arange(4)


def convolution(x, kernel, stride=1):
    """With zero padding, from its definition; at stride 2 XLA pads an even side at its end alone."""
    before = 0 if stride == 2 else 1
    padded = np.pad(x, ((0, 0), (before, 1), (before, 1), (0, 0)))
    rows, columns = (size // stride for size in x.shape[1:3])
    places = [(i, j) for i in range(3) for j in range(3)]
    shifted = [padded[:, i:, j:][:, : rows * stride : stride, : columns * stride : stride] for i, j in places]
    return sum(part @ kernel[place] for part, place in zip(shifted, places, strict=True))


def written_out(run, params):
    """Logits, and the root mean squares of what enters each block and of its branch."""

    def placed(x):
        whole = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-3) if run["normalize"] else x
        return np.maximum(whole, 0)

    x = convolution(IMAGES.reshape(4, 6, 2, 6, 2, 1).mean((2, 4)), params["first"], 2)
    entering, branches = [], []
    for below, above in params["blocks"]["kernel"]:
        branch = run["alpha"] * convolution(placed(convolution(placed(x), below)), above)
        entering.append(np.sqrt((x**2).mean()))
        branches.append(np.sqrt((branch**2).mean()))
        x = run["shortcut"] * x + branch
    return placed(x).mean((1, 2)) @ params["last"]["kernel"], entering, branches


@pytest.mark.parametrize("arm", depth.ARMS)
def test_the_switches_make_the_network_of_each_arm(arm):
    run = {name: np.float32(value) for name, value in depth.ARMS[arm].items()}
    variables = NETWORK.init(run, jax.random.key(0), IMAGES)
    logits, entering, branches = written_out(run, jax.device_get(variables["params"]))
    flow = FLOW(variables, IMAGES, LABELS)
    # float32 sums in another order, through six layers.
    np.testing.assert_allclose(APPLY(variables, IMAGES), logits, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(flow.entering, entering, rtol=1e-4)
    np.testing.assert_allclose(flow.branch, branches, rtol=1e-4, atol=1e-6)


def test_where_branches_are_zero_every_block_has_the_same_gradient():
    run = {name: np.float32(value) for name, value in depth.ARMS[depth.ZERO].items()}
    gradient = FLOW(NETWORK.init(run, jax.random.key(0), IMAGES), IMAGES, LABELS).gradient
    np.testing.assert_allclose(gradient, gradient[0], rtol=1e-6)


def test_layers_that_make_no_blocks_are_refused():
    assert [blocks_of(layers) for layers in (20, 56, 110)] == [9, 27, 54]
    with pytest.raises(ValueError, match="layers=21; expected an even number"):
        blocks_of(21)
