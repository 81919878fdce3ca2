"""Deep networks that differ in how they start, and what is seen of them there.

The arms differ in their initial variables alone, so that one program trains them all.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from jax import Array

import jaxbn
from experiments.training import data, loop, models
from experiments.training.random_chains import BATCH, BROKEN, PLAIN
from jaxbn.diagnostics import TappedLoss, gradient_flow
from jaxbn.training import LossOutput

HE, STARTED = "plain, He's weights", "normalized at the start only"
ARMS = (PLAIN, HE, BATCH, BROKEN, STARTED)
NONE, BY_BATCH, CONSTANT = range(3)
NORMS = {PLAIN: NONE, HE: NONE, BATCH: BY_BATCH, BROKEN: BY_BATCH, STARTED: CONSTANT}
DEPTHS = (2, 8, 16, 32)


def uniform_weights(broken: bool) -> models.Weights:
    """PyTorch's default, uniform on +-a with a = 1 / sqrt(inputs); broken: on [0, 2a]."""

    def draw(key: Array, shape: models.Shape) -> Array:
        return jax.random.uniform(key, shape, minval=0.0 if broken else -1.0, maxval=2.0 if broken else 1.0)

    return models.Weights(draw, lambda shape: shape[-1] ** -0.5)


def he_weights() -> models.Weights:
    """Gaussian of variance 2 / inputs."""
    return models.Weights(jax.random.normal, lambda shape: (2 / shape[-1]) ** 0.5)


def switched(decay: float) -> jaxbn.Normalizer:
    """No norm, batch norm or one with constant statistics, by the number "kind" among its batch_stats.

    One program then serves every arm.
    """

    def init(key: Array, x: Array) -> dict:
        variables = jaxbn.batch_norm().init(key, x)
        return {**variables, "batch_stats": {"kind": jnp.int32(NONE), "moving": variables["batch_stats"]}}

    def apply(variables: dict, x: Array, *, train: bool) -> tuple[Array, dict]:
        params, kind = variables["params"], variables["batch_stats"]["kind"]
        used = moving = variables["batch_stats"]["moving"]
        if train:
            found, pick = jaxbn.moments(x, axis=0), partial(jnp.where, kind == BY_BATCH)
            used = {name: pick(getattr(found, name), moving[name]) for name in ("mean", "var")}
            moving = jax.tree.map(pick, jaxbn.update_batch_stats(moving, found, decay=decay), moving)
        y = jaxbn.normalize(x, used["mean"], used["var"], **params, axis=0, epsilon=1e-5)
        return jnp.where(kind == NONE, x, y), {"kind": kind, "moving": moving}

    return jaxbn.Normalizer(init, apply)


@cache
def tower(width: int, arm: str = PLAIN, decay: float = 0.9) -> models.Tower:
    """The network; arms differ in `init` alone."""
    weights = he_weights() if arm == HE else uniform_weights(arm == BROKEN)
    how = {"use_bias": True, "activation": jax.nn.relu, "weights": weights}
    return models.tower(max(DEPTHS), width, switched(decay), **how)


def optimizer(run: dict) -> optax.GradientTransformation:
    """SGD at the run's rate."""
    return optax.sgd(run["rate"])


@cache
def task(digits: str, width: int, arm: str) -> loop.Task:
    """The networks of one arm, of the run's depth, for the data set of that name."""
    images = data.load(digits).train_images
    measured = jnp.asarray(images[data.spread(512, len(images))])

    def init(run: dict, key: Array, x: Array) -> dict:
        variables = tower(width, arm).init(key, x, run["depth"])
        if arm == PLAIN:
            variables["params"] = with_biases(jax.random.fold_in(key, 1), variables["params"])
        if arm == STARTED:
            variables["batch_stats"] = statistics(tower(width, decay=0.0), with_kind(variables, BY_BATCH), measured)
        return with_kind(variables, NORMS[arm])

    return loop.Task(init, tower(width).apply, optimizer)


@partial(jax.jit, static_argnums=0)
def statistics(network: models.Tower, variables: dict, images: Array) -> dict:
    """batch_stats of a network with decay 0: those of the images."""
    return network.apply(variables, data.pixels(images), train=True)[1]


def with_kind(variables: dict, kind: int) -> dict:
    """The same with that norm in every layer."""
    stats = variables["batch_stats"]
    chosen = {name: {**stats[name], "kind": jnp.full_like(stats[name]["kind"], kind)} for name in ("first", "rest")}
    return {**variables, "batch_stats": {**stats, **chosen}}


def with_biases(key: Array, params: dict) -> dict:
    """PyTorch's default biases, uniform on +-1 / sqrt(inputs), in place of zeros."""
    layers = params["first"]["layer"], params["rest"]["layer"], params["head"]
    sizes = np.cumsum([layer["bias"].size for layer in layers])
    draws = jnp.split(jax.random.uniform(key, (sizes[-1],), minval=-1.0), sizes[:-1])
    first, rest, head = (
        {**layer, "bias": draw.reshape(layer["bias"].shape) * layer["kernel"].shape[-1] ** -0.5}
        for layer, draw in zip(layers, draws, strict=True)
    )
    return {"first": {**params["first"], "layer": first}, "rest": {**params["rest"], "layer": rest}, "head": head}


@cache
def tapped(width: int) -> TappedLoss:
    """The cross-entropy of a network, with its last hidden layer to be looked at."""
    network = tower(width)

    def loss(variables: dict, batch: dict, rng: Array, tap: Callable) -> LossOutput:
        h, moved = network.hidden(variables, batch["x"], train=True)
        logits = network.head(variables, tap("last hidden", h))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return LossOutput(losses.sum(), losses.size, moved)

    return loss


def starts(name: str, width: int, seeds: Sequence[int]) -> xr.Dataset:
    """Every network at the start, on 128 digits: `rank`, `bound` and `gradients` [arm, seed, depth].

    rank and bound (sum s^2)^2 / sum s^4 are those of the last hidden layer, from its singular values s; gradients is
    |gradient| / |weights| of the first layer over that of the last one.
    """
    axes = {"arm": list(ARMS), "seed": list(seeds), "depth": list(map(float, DEPTHS))}
    values = np.reshape([start_of(name, width, arm, seeds) for arm in ARMS], (*map(len, axes.values()), 3))
    names = enumerate(("rank", "bound", "gradients"))
    return xr.Dataset({figure: (tuple(axes), values[..., number]) for number, figure in names}, axes)


def start_of(name: str, width: int, arm: str, seeds: Sequence[int]) -> list[list[float]]:
    """The three figures of `starts` for every network of an arm, seed after seed."""
    digits, found = data.load(name), []
    runs = [{"seed": seed, "depth": depth, "rate": 0.0} for seed in seeds for depth in DEPTHS]
    begin = jax.vmap(partial(loop.init_run, task(name, width, arm), jnp.asarray(digits.test_images)))
    states = begin(loop.stacked(runs, len(runs)))["variables"]
    for number, run in enumerate(runs):
        variables = jax.tree.map(lambda leaf, number=number: leaf[number], states)
        chosen = np.random.default_rng(run["seed"]).permutation(len(digits.train_labels))[:128]
        images, labels = (jnp.asarray(part[chosen]) for part in (digits.train_images, digits.train_labels))
        flow = gradient_flow(tapped(width), variables, {"x": data.pixels(images), "label": labels}, rate=0.0)
        first, head = (flow.params[name] for name in ("first/layer/kernel", "head/kernel"))
        ratio = (first.gradient_norm / first.norm) / (head.gradient_norm / head.norm)
        layer = flow.layers["last hidden"]
        found.append([float(layer.rank), float(layer.participation), float(ratio)])
    return found
