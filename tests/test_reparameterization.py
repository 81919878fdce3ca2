"""The network whose arms are numbers, against closed forms; float32 rounds each of its three products to 1e-6 or so."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import reparameterization
from experiments.training import reparameterized as network
from experiments.training import same_function

ROUNDING = 1e-5
IMAGES = jax.random.uniform(jax.random.key(1), (32, 28, 28, 1))
X = network.shrink(IMAGES)
LABELS = jnp.arange(32) % 10


def variables_of(arm, **numbers):
    numbers = {**reparameterization.NETWORKS["relu"], **reparameterization.ARMS[arm], "times": 1.0, **numbers}
    return network.init(numbers, jax.random.key(0), IMAGES, width=20)


def test_images_are_averaged_over_squares():
    image = np.asarray(IMAGES[3, ..., 0])
    np.testing.assert_allclose(X[3].reshape(14, 14)[5, 7], image[10:12, 14:16].mean(), rtol=ROUNDING)


def test_the_plain_arm_is_a_plain_network():
    variables = variables_of("plain")
    first, second = (layer["kernel"] for layer in variables["params"]["hidden"])
    expected = jax.nn.relu(jax.nn.relu(X @ first.T) @ second.T) @ variables["params"]["last"]["kernel"].T
    logits, _ = network.apply(variables, IMAGES, train=True)
    np.testing.assert_allclose(logits, expected, atol=ROUNDING)


def test_a_twin_with_batch_norm_computes_the_same_function():
    variables = variables_of("plain")
    twin = network.twin(variables, X)
    assert twin["batch_stats"]["arm"]["normalize"] == 1
    logits, twins = (network.run(v, X, train=True)[0] for v in (variables, twin))
    np.testing.assert_allclose(twins, logits, atol=ROUNDING)


@pytest.mark.parametrize("arm", ["plain", "batch norm"])
def test_own_is_the_mean_only_where_it_is_normalized(arm):
    variables = variables_of(arm)
    for layer in variables["params"]["hidden"]:
        layer |= {"bias": layer["bias"] + 0.3, "shift": layer["shift"] - 0.2}
    normalized = variables["batch_stats"]["arm"]["normalize"]
    _, layers, _ = network.run(variables, X, train=True)
    own = [network.own(layer, normalized) for layer in variables["params"]["hidden"]]
    agree = [np.allclose(o, layer.z.mean(0), atol=ROUNDING) for o, layer in zip(own, layers, strict=True)]
    assert agree == [arm == "batch norm"] * 2


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        ("plain", {"kernel", "bias", "last"}),
        ("normalization alone", {"kernel", "bias", "last"}),
        ("batch norm", {"kernel", "bias", "scale", "shift", "last"}),
        ("last layer alone", {"last"}),
    ],
)
def test_an_arm_trains_what_it_says(arm, expected):
    params = variables_of(arm)["params"]
    updates, _ = network.trained(reparameterization.ARMS[arm]).update(
        jax.tree.map(jnp.ones_like, params), optax.EmptyState()
    )
    moved = {name for layer in updates["hidden"] for name, update in layer.items() if jnp.any(update)}
    assert moved | ({"last"} if jnp.all(updates["last"]["kernel"] == 1) else set()) == expected


def test_a_narrow_network_ignores_the_units_that_are_off():
    variables = variables_of("batch norm", width=5)
    _, layers, _ = network.run(variables, X, train=True)
    assert all(not jnp.any(layer.out[:, 5:]) for layer in layers)
    assert all(jnp.any(layer.out[:, :5]) for layer in layers)


def test_of_a_line_everything_is_linear_and_of_an_even_function_nothing():
    z = jnp.linspace(-1, 1, 21)[:, None]
    assert float(network.linear_part(network.Layer(z, z, 3 * z + 1))) == pytest.approx(1, abs=ROUNDING)
    assert float(network.linear_part(network.Layer(z, z, z**2))) == pytest.approx(0, abs=ROUNDING)


def test_a_walk_of_one_step_is_a_gradient_step_with_decay():
    variables = variables_of("plain")
    gradient = jax.grad(lambda p: network.loss({**variables, "params": p}, X, LABELS)[0])(variables["params"])
    stepped = jax.tree.map(lambda p, g: 0.9 * p - same_function.SGD_RATE * g, variables["params"], gradient)
    for layer, before in zip(stepped["hidden"], variables["params"]["hidden"], strict=True):
        layer |= {name: 0.9 * before[name] for name in ("scale", "shift")}  # not learned, but decayed
    found = same_function.walk(variables, jnp.zeros(()), jnp.zeros(()), jnp.asarray(0.1), X, LABELS, steps=1)
    np.testing.assert_allclose(
        found.logits, network.run({**variables, "params": stepped}, X, train=True)[0], atol=ROUNDING
    )
