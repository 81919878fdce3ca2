"""A network whose layers may be normalized, scaled and shifted, each by a number: all arms are one compiled program.

A hidden layer is `phi(scale * normalized(x W + bias) + shift)`. An arm is a dict of numbers: `normalize` (0: the
normalization is left out), `learned` (0: scale 1 and shift 0 stay as they are), `lower` (0: the last layer alone is
trained), `times` (the initial weights of the last hidden layer are multiplied by it), `activation` (a place in
ACTIVATIONS) and `width` (hidden units that are on; the others put out 0).
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

import jaxbn
from experiments.training import models

SIDE = 14  # images are averaged down to 14 x 14, so that a hidden layer can be wider than its 196 inputs
WIDTH, HIDDEN, CLASSES = 200, 2, 10  # units of a hidden layer, hidden layers, classes
ACTIVATIONS = (lambda h: h, jax.nn.relu, jax.nn.sigmoid, lambda h: jax.nn.sigmoid(4 * h))
LINEAR, RELU, SIGMOID, STEEP_SIGMOID = range(4)
KEPT = ("normalize", "activation", "width")  # numbers of an arm that the network computes with


def shrink(images: Array) -> Array:
    """Means of squares of pixels, [batch, 28, 28, 1] -> [batch, 196]; any side that SIDE divides."""
    square = images.shape[1] // SIDE
    return images.reshape(len(images), SIDE, square, SIDE, square, -1).mean((2, 4)).reshape(len(images), -1)


def init(arm: Mapping[str, Array], key: Array, x: Array, *, width: int = WIDTH) -> dict:
    """Glorot-uniform weights, biases and shifts of 0, scales of 1; the arm's numbers lie beside the statistics."""
    inputs = shrink(x).shape[-1]
    shapes = [(width, inputs), *[(width, width)] * (HIDDEN - 1), (CLASSES, width)]
    kernels = models.cut(models.glorot_weights(), key, shapes)
    kernels[-2] *= arm["times"]
    hidden = [{"kernel": kernel, **_ones_and_zeros(width)} for kernel in kernels[:-1]]
    params = {"hidden": hidden, "last": {"kernel": kernels[-1], "bias": jnp.zeros(CLASSES)}}
    statistics = {"mean": jnp.zeros(width), "var": jnp.ones(width)}
    kept = {name: jnp.asarray(arm[name], jnp.float32) for name in KEPT}
    return {"params": params, "batch_stats": {"hidden": [statistics] * HIDDEN, "arm": kept}}


def _ones_and_zeros(size: int) -> dict[str, Array]:
    return {"bias": jnp.zeros(size), "scale": jnp.ones(size), "shift": jnp.zeros(size)}


class Layer(NamedTuple):
    """One hidden layer at work, all [batch, units]: x W + bias, what enters the activation, and what leaves it."""

    h: Array
    z: Array
    out: Array


def apply(variables: dict, images: Array, *, train: bool, epsilon: float = 1e-5) -> tuple[Array, dict]:
    """(logits, batch_stats) of images [batch, height, width, channels], as `experiments.training.loop` wants it."""
    logits, _, batch_stats = run(variables, shrink(images), train=train, epsilon=epsilon)
    return logits, batch_stats


def run(variables: dict, x: Array, *, train: bool, epsilon: float = 1e-5) -> tuple[Array, list[Layer], dict]:
    """(logits, hidden layers, batch_stats) of x: [batch, inputs]."""
    params, arm = variables["params"], variables["batch_stats"]["arm"]
    norm = jaxbn.batch_norm(decay=0.9, epsilon=epsilon, use_scale=False, use_bias=False)
    layers, statistics = [], []
    for layer, stats in zip(params["hidden"], variables["batch_stats"]["hidden"], strict=True):
        h = x @ layer["kernel"].T + layer["bias"][None]
        h_hat, stats = norm.apply({"params": {}, "batch_stats": stats}, h, train=train)
        z = layer["scale"][None] * jnp.where(arm["normalize"] > 0, h_hat, h) + layer["shift"][None]
        x = _activate(arm, z)
        layers.append(Layer(h, z, x))
        statistics.append(stats)
    logits = x @ params["last"]["kernel"].T + params["last"]["bias"][None]
    return logits, layers, {"hidden": statistics, "arm": arm}


def _activate(arm: Mapping[str, Array], z: Array) -> Array:
    out = jax.lax.switch(arm["activation"].astype(jnp.int32), ACTIVATIONS, z)
    return jnp.where(jnp.arange(z.shape[-1])[None] < arm["width"], out, 0)


def trained(arm: Mapping[str, Array]) -> optax.GradientTransformation:
    """Updates of what the arm trains; the others become 0."""

    def only(updates: dict, params: dict | None = None) -> dict:
        lower, affine = arm["lower"], arm["lower"] * arm["learned"]
        factors = {"kernel": lower, "bias": lower, "scale": affine, "shift": affine}
        hidden = [{name: u * factors[name] for name, u in layer.items()} for layer in updates["hidden"]]
        return {"hidden": hidden, "last": updates["last"]}

    return optax.stateless(only)


def linear_part(layer: Layer) -> Array:
    """Share of the variance of each unit's output that a straight line in z explains, mean over units: []."""
    z, out = (values - values.mean(0, keepdims=True) for values in (layer.z, layer.out))
    return jnp.nanmean((z * out).mean(0) ** 2 / ((z**2).mean(0) * (out**2).mean(0)))


@jax.jit
def linear_parts(variables: dict, x: Array) -> Array:
    """`linear_part` of the last hidden layer of several networks at test time; leaves and result: [networks, ...]."""
    return jax.lax.map(lambda one: linear_part(run(one, x, train=False)[1][-1]), variables)


def own(layer: Mapping[str, Array], normalized: Array) -> Array:
    """What a layer's own shift parameters say the mean of z is, apart from its weights and the layers below: [units].

    With the normalization it is the whole mean.
    """
    return layer["shift"] + jnp.where(normalized > 0, 0, layer["scale"] * layer["bias"])


def twin(variables: dict, x: Array, epsilon: float = 1e-5) -> dict:
    """Variables that compute the same function of x with normalization as the given ones do without.

    The statistics of h on x become scale and shift, layer by layer: scale = sqrt(var + epsilon), shift = mean.
    """
    _, layers, stats = run(variables, x, train=True, epsilon=epsilon)
    found = [jaxbn.unfold(layer.h.mean(0), layer.h.var(0), epsilon=epsilon) for layer in layers]
    pairs = zip(variables["params"]["hidden"], found, strict=True)
    hidden = [{**layer, "scale": f["params"]["scale"], "shift": f["params"]["bias"]} for layer, f in pairs]
    arm = {**variables["batch_stats"]["arm"], "normalize": jnp.ones(())}
    return {
        "params": {**variables["params"], "hidden": hidden},
        "batch_stats": {"hidden": stats["hidden"], "arm": arm},
    }


def loss(variables: dict, x: Array, labels: Array, epsilon: float = 1e-5) -> tuple[Array, Array]:
    """Softmax cross-entropy in training mode, mean over the batch: [], and the logits."""
    logits, *_ = run(variables, x, train=True, epsilon=epsilon)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits
