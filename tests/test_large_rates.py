"""The network of the experiment `large_rates` against the network of each arm, written out by hand."""

import jax
import numpy as np
import pytest

import jaxbn
from experiments import large_rates
from experiments.training.residual_mlp import ResidualMLP

NETWORK = ResidualMLP(jaxbn.batch_norm(decay=0.9, epsilon=1e-3), blocks=2, width=5)
INIT, SIZES = jax.jit(NETWORK.init), jax.jit(NETWORK.sizes)  # one program for all arms
APPLY = jax.jit(NETWORK.apply, static_argnames="train")
IMAGES = np.random.default_rng(0).uniform(size=(8, 14, 14, 1)).astype(np.float32)  # of a side that is not averaged


def run_of(arm):
    """Two blocks, shrunk if the arm says so."""
    return {**large_rates.ARMS[arm], "branch": 2**-0.5 if large_rates.ARMS[arm]["shrunk"] else 1.0}


def written_out(run, params):
    """The arm's logits and the root mean square of what enters each block and leaves the last."""

    def norm(place, x):
        return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3) if run[place] else x

    def after_relu(place, x, kernel):
        return np.maximum(norm(place, x), 0) @ kernel

    x = norm("first", IMAGES.reshape(8, -1) @ params["first"]["kernel"])
    sizes = [np.sqrt((x**2).mean())]
    for below, above in params["inner"]["kernel"]:
        x = x + run["branch"] * after_relu("inner", after_relu("inner", x, below), above)
        sizes.append(np.sqrt((x**2).mean()))
    return after_relu("last", x, params["last"]["kernel"]), sizes


@pytest.mark.parametrize("arm", large_rates.ARMS)
def test_the_switches_make_the_network_of_each_arm(arm):
    variables = INIT(run_of(arm), jax.random.key(0), IMAGES)
    logits, sizes = written_out(run_of(arm), jax.device_get(variables["params"]))
    # float32 sums in another order, through six layers.
    np.testing.assert_allclose(APPLY(variables, IMAGES, train=True)[0], logits, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(SIZES(variables, IMAGES), sizes, rtol=1e-4)


def test_all_arms_start_from_the_same_weights():
    plain, norm = (INIT(run_of(arm), jax.random.key(0), IMAGES) for arm in ("plain", "batch norm"))
    jax.tree.map(np.testing.assert_array_equal, plain["params"], norm["params"])
