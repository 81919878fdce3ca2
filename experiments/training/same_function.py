"""From one function on: what a factor on a layer's weights changes, and where gradient descent goes.

A plain network, the same with a scale and a bias to be learned, and its twin with batch norm compute one function. They
walk from there, on one batch, and the twin also with weight decay and with Adam.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from jax import Array

from experiments.training import data
from experiments.training import reparameterized as network

DIGITS = 256  # the batch
SGD_RATE, ADAM_RATE = 0.1, 0.001
WALKS = {  # normalize, learned, adam, share of the params that weight decay takes off in a step
    "plain": (0, 0, 0, 0),
    "scale and bias alone": (0, 1, 0, 0),
    "batch norm": (1, 1, 0, 0),
    "batch norm, decay": (1, 1, 0, 0.01),
    "batch norm, Adam": (1, 1, 1, 0),
    "batch norm, AdamW": (1, 1, 1, 0.01),
}
START = {"normalize": 0, "activation": network.RELU, "width": network.WIDTH, "times": 1.0}
FACTORS, EPSILONS = (0.01, 0.1, 10.0, 100.0), (0.0, 1e-5)
COMPARED = ("output", "gradient below", "own gradient times factor")
AXES = {  # of what is measured, beside "seed"
    "starts": ("walk",),
    "losses": ("walk", "update"),
    "apart": ("walk",),
    "elsewhere": ("walk", "layer"),
    "drift": ("walk",),
    "change": ("epsilon", "factor", "compared"),
    "bias_gradient": ("layer",),
}


def scaled(variables: dict, factor: Array | float) -> dict:
    """The same variables, the weights of the last hidden layer times `factor`."""
    *below, layer = variables["params"]["hidden"]
    hidden = [*below, {**layer, "kernel": layer["kernel"] * factor}]
    return {**variables, "params": {**variables["params"], "hidden": hidden}}


class AtScale(NamedTuple):
    """Logits and gradients with the weights of the last hidden layer times a factor."""

    logits: Array  # [batch, classes]
    below: Array  # gradient of the first layer's weights, which comes through the scaled layer
    times_factor: Array  # gradient of the scaled weights, times the factor
    of_bias: Array  # largest gradient of a layer's bias over that of its shift, [hidden layers]


def at_scale(variables: dict, x: Array, labels: Array, factor: Array, epsilon: float) -> AtScale:
    """What a factor on the last hidden layer's weights leaves of logits and gradients."""
    variables = scaled(variables, factor)

    def loss_of(params: dict) -> tuple[Array, Array]:
        return network.loss({**variables, "params": params}, x, labels, epsilon)

    gradient, logits = jax.grad(loss_of, has_aux=True)(variables["params"])
    hidden = gradient["hidden"]
    of_bias = [jnp.max(jnp.abs(g["bias"])) / jnp.max(jnp.abs(g["shift"])) for g in hidden]
    return AtScale(logits, hidden[0]["kernel"], hidden[-1]["kernel"] * factor, jnp.stack(of_bias))


def relative(a: Array, b: Array) -> Array:
    """The largest difference over the largest value of b."""
    return jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))


class Walk(NamedTuple):
    """What one walk did: gradient descent on one batch, from variables that are given.

    Attributes:
      losses: before each step, [steps].
      first: logits at the start, [batch, classes].
      logits: at the end.
      elsewhere: share of the change of the mean of z that the layer's own shift does not account for:
        |change of mean - change of `own`| / |change of mean|, Euclidean over units, [hidden layers].
      drift: of the bias in front of the normalization, its largest distance from bias (1 - shrinkage)^steps over the
        root mean square of the bias at the start: [].
    """

    losses: Array
    first: Array
    logits: Array
    elsewhere: Array
    drift: Array


def walk(
    variables: dict, learned: Array, adam: Array, shrinkage: Array, x: Array, labels: Array, *, steps: int
) -> Walk:
    """`steps` steps on all of x, plain gradient descent at SGD_RATE or, where `adam` is 1, Adam at ADAM_RATE.

    Weight decay takes the share `shrinkage` of every param off at each step, apart from the gradient, as in AdamW.
    """
    optimizer = optax.scale_by_adam()
    only = network.trained({"lower": jnp.ones(()), "learned": learned})

    def body(carry: tuple, _: None) -> tuple[tuple, Array]:
        params, state = carry
        value, gradient = jax.value_and_grad(lambda p: network.loss({**variables, "params": p}, x, labels)[0])(params)
        by_adam, state = optimizer.update(gradient, state)
        chosen = jax.tree.map(lambda a, g: jnp.where(adam > 0, ADAM_RATE * a, SGD_RATE * g), by_adam, gradient)
        taken, _ = only.update(chosen, optax.EmptyState())
        return (jax.tree.map(lambda p, u: (1 - shrinkage) * p - u, params, taken), state), value

    start = variables["params"]
    (params, _), losses = jax.lax.scan(body, (start, optimizer.init(start)), length=steps)
    end = {**variables, "params": params}
    (first, before, _), (logits, after, _) = (network.run(v, x, train=True) for v in (variables, end))
    normalized = variables["batch_stats"]["arm"]["normalize"]
    pairs = list(zip(start["hidden"], params["hidden"], strict=True))
    moved = [a.z.mean(0) - b.z.mean(0) for b, a in zip(before, after, strict=True)]
    by_own = [network.own(a, normalized) - network.own(b, normalized) for b, a in pairs]
    elsewhere = [jnp.linalg.norm(m - o) / jnp.linalg.norm(m) for m, o in zip(moved, by_own, strict=True)]
    bias, moved_bias = (jnp.stack([pair[number]["bias"] for pair in pairs]) for number in (0, 1))
    drift = jnp.max(jnp.abs(moved_bias - (1 - shrinkage) ** steps * bias)) / jnp.sqrt(jnp.mean(bias**2))
    return Walk(losses, first, logits, jnp.stack(elsewhere), drift)


def measure(dataset: data.Dataset, seeds: range, *, width: int, steps: int) -> xr.Dataset:
    """Everything of `walks_of_all` and `exact_relations`, on DIGITS digits drawn for each seed, biases not at 0."""
    found = [_of_seed(dataset, seed, width, steps) for seed in seeds]
    names = {"walk": list(WALKS), "layer": range(1, network.HIDDEN + 1), "factor": list(FACTORS)}
    names |= {"epsilon": list(EPSILONS), "compared": list(COMPARED), "seed": seeds}
    arrays = {name: (("seed", *axes), np.stack([one[name] for one in found])) for name, axes in AXES.items()}
    return xr.Dataset(arrays, names)


def _of_seed(dataset, seed, width, steps) -> dict:
    keys = jax.random.split(jax.random.key(seed), 2 + network.HIDDEN)
    chosen = np.asarray(jax.random.choice(keys[0], len(dataset.train_labels), (DIGITS,), replace=False))
    images = data.pixels(jnp.asarray(dataset.train_images[chosen]))
    x, labels = network.shrink(images), jnp.asarray(dataset.train_labels[chosen])
    variables = network.init(START, keys[1], images, width=width)
    for layer, key in zip(variables["params"]["hidden"], keys[2:], strict=True):
        layer["bias"] = 0.1 * jax.random.normal(key, layer["bias"].shape)
    walks = jax.device_get(walks_of_all(variables, x, labels, steps=steps))
    with jax.enable_x64(True):
        doubled = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), (variables, x))
        return walks | jax.device_get(exact_relations(*doubled, labels))


@partial(jax.jit, static_argnames="steps")
def walks_of_all(variables: dict, x: Array, labels: Array, *, steps: int) -> dict[str, Array]:
    """What `Walk` has, for each of WALKS, how their functions differ at the start, and how far apart they get."""
    twin = network.twin(variables, x)
    starts = [twin if normalize else variables for normalize, *_ in WALKS.values()]
    starts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    learned, adam, shrinkage = map(jnp.asarray, list(zip(*WALKS.values(), strict=True))[1:])
    one = partial(walk, x=x, labels=labels, steps=steps)
    walks = jax.vmap(one)(starts, learned, adam, shrinkage)
    apart = jnp.stack([jnp.linalg.norm(logits - walks.logits[0]) for logits in walks.logits])
    return {
        "starts": jnp.stack([relative(logits, walks.first[0]) for logits in walks.first]),
        "apart": apart / jnp.linalg.norm(walks.logits[0] - walks.first[0]),
        **{name: getattr(walks, name) for name in ("losses", "elsewhere", "drift")},
    }


@jax.jit
def exact_relations(variables: dict, x: Array, labels: Array) -> dict[str, Array]:
    """What scaling a layer's weights changes, and the gradient of a bias in front of the normalization."""
    twin, factors = network.twin(variables, x), jnp.asarray([1.0, *FACTORS], x.dtype)
    found = [jax.vmap(partial(at_scale, twin, x, labels, epsilon=epsilon))(factors) for epsilon in EPSILONS]
    change = [[jax.vmap(relative, (0, None))(values[1:], values[0]) for values in at[:3]] for at in found]
    return {"change": jnp.stack([jnp.stack(one, -1) for one in change]), "bias_gradient": found[-1].of_bias[0]}
