"""Networks as pairs of functions that take a `jaxbn.Normalizer` and do not care which.

`init(key, x) -> variables` and `apply(variables, x, *, train) -> (logits, batch_stats)`, where `variables` is
`{"params": ..., "batch_stats": ...}` and x: [batch, ...] float32. All weights of a network are one random draw, cut up
by layer: it compiles once instead of once per shape (a second each on a CPU), and a plain network and its normalized
twin start from the same weights.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

import jaxbn

Shape = tuple[int, ...]


class Network(NamedTuple):
    """Two pure functions; see the module's docstring."""

    init: Callable
    apply: Callable


class Weights(NamedTuple):
    """How initial weights are drawn: `scale(kernel_shape) * draw(key, shape)`."""

    draw: Callable[[Array, Shape], Array]
    scale: Callable[[Shape], Array | float]


def normal_weights(deviation: Array | float) -> Weights:
    """Normal with mean 0 and the same standard deviation in every layer."""
    return Weights(jax.random.normal, lambda shape: deviation)


def glorot_weights() -> Weights:
    """Uniform on +-sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010), for dense and convolutional kernels."""

    def draw(key: Array, shape: Shape) -> Array:
        return jax.random.uniform(key, shape, minval=-1.0)

    return Weights(draw, lambda shape: math.sqrt(6 / (math.prod(shape[:-2]) * (shape[-2] + shape[-1]))))


class Layer(NamedTuple):
    """A linear map with weights {"kernel", and "bias" if it has one, which starts at zero}."""

    kernel_shape: Callable[[Shape], Shape]  # of the input's shape, [batch, ...]
    apply: Callable  # apply(weights, x) -> y
    features: int
    use_bias: bool


def dense(features: int, *, use_bias: bool) -> Layer:
    """`y = flatten(x) kernel^T + bias`; x: [batch, ...], kernel: [features, inputs], y: [batch, features].

    The kernel lies as torch has it: the gradients of several networks on one batch then come out of one product in the
    layout in which they are subtracted, which saves a tenth of a step on a CPU.
    """

    def apply(weights: dict, x: Array) -> Array:
        return _add_bias(weights, x.reshape(len(x), -1) @ weights["kernel"].T)

    return Layer(lambda shape: (features, math.prod(shape[1:])), apply, features, use_bias)


def conv3x3(features: int, *, stride: int, use_bias: bool) -> Layer:
    """A 3 x 3 convolution, zero padding ("SAME"); x: [batch, height, width, channels]."""

    def apply(weights: dict, x: Array) -> Array:
        kernel = weights["kernel"]
        return _add_bias(weights, patches3x3(x, stride) @ kernel.reshape(-1, kernel.shape[-1]))

    return Layer(lambda shape: (3, 3, shape[-1], features), apply, features, use_bias)


def conv1x1(features: int, *, use_bias: bool) -> Layer:
    """The same dense layer at every pixel; x: [batch, height, width, channels]."""

    def apply(weights: dict, x: Array) -> Array:
        return _add_bias(weights, x @ weights["kernel"])

    return Layer(lambda shape: (shape[-1], features), apply, features, use_bias)


def conv5x5(features: int, *, padding: str, use_bias: bool) -> Layer:
    """A 5 x 5 convolution, padding "SAME" or "VALID"; x: [batch, height, width, channels]."""

    def apply(weights: dict, x: Array) -> Array:
        y = jax.lax.conv_general_dilated(
            x, weights["kernel"], (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return _add_bias(weights, y)

    return Layer(lambda shape: (5, 5, shape[-1], features), apply, features, use_bias)


def pool2x2(x: Array) -> Array:
    """Means of 2 x 2 pixels; x: [batch, height, width, channels], height and width even."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def after_pooling(layer: Layer) -> Layer:
    """The layer on the means of 2 x 2 pixels; x: [batch, height, width, channels], height and width even."""

    def kernel_shape(shape: Shape) -> Shape:
        batch, height, width, channels = shape
        return layer.kernel_shape((batch, height // 2, width // 2, channels))

    return layer._replace(kernel_shape=kernel_shape, apply=lambda weights, x: layer.apply(weights, pool2x2(x)))


def after_mean(layer: Layer) -> Layer:
    """The layer on the mean over all pixels, "global average pooling"; x: [batch, height, width, channels]."""
    return layer._replace(
        kernel_shape=lambda shape: layer.kernel_shape((shape[0], shape[-1])),
        apply=lambda weights, x: layer.apply(weights, x.mean((1, 2))),
    )


def patches3x3(x: Array, stride: int) -> Array:
    """The 3 x 3 neighbourhoods of an image, zeros outside: [batch, height / stride, width / stride, 9 channels].

    A convolution is then one matrix product. XLA compiles convolutions inside a loop for a CPU to code eight times
    slower than outside of one, and those of several networks at once to slower code still; products stay fast.
    """
    size = x.shape[1:3]
    pads = jax.lax.padtype_to_pads(size, (3, 3), (stride, stride), "SAME")
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    rows, columns = (-(-length // stride) for length in size)
    slices = [
        padded[:, i : i + (rows - 1) * stride + 1 : stride, j : j + (columns - 1) * stride + 1 : stride]
        for i in range(3)
        for j in range(3)
    ]
    return jnp.concatenate(slices, axis=-1)


def _add_bias(weights: dict, y: Array) -> Array:
    if "bias" not in weights:
        return y
    return y + weights["bias"].reshape((1,) * (y.ndim - 1) + (-1,))


def stack(
    layers: Sequence[Layer],
    head: Layer,
    norm: jaxbn.Normalizer,
    activation: Callable[[Array], Array],
    weights: Weights,
) -> Network:
    """`layer -> norm -> activation` for each of `layers`, then `head`, which is neither normalized nor activated."""

    def init(key: Array, x: Array) -> dict:
        shapes, outputs = trace_shapes([*layers, head], x)
        kernels = cut(weights, key, shapes)
        params = [
            {"layer": {"kernel": kernel, **({"bias": jnp.zeros(layer.features)} if layer.use_bias else {})}}
            for layer, kernel in zip([*layers, head], kernels, strict=True)
        ]
        of_norm = [norm.init(key, output) for output in outputs[:-1]]
        for param, normalizer in zip(params, of_norm, strict=False):
            param["norm"] = normalizer["params"]
        return {"params": params, "batch_stats": [normalizer["batch_stats"] for normalizer in of_norm]}

    def apply(variables: dict, x: Array, *, train: bool) -> tuple[Array, list]:
        *params, of_head = variables["params"]
        batch_stats = []
        for layer, param, stats in zip(layers, params, variables["batch_stats"], strict=True):
            x = layer.apply(param["layer"], x)
            x, stats = norm.apply({"params": param["norm"], "batch_stats": stats}, x, train=train)
            batch_stats.append(stats)
            x = activation(x)
        return head.apply(of_head["layer"], x), batch_stats

    return Network(init, apply)


def watched(norm: jaxbn.Normalizer, measure: Callable[[Array, Array], Array]) -> jaxbn.Normalizer:
    """The normalizer with `measure(input, output)` in place of its moved statistics: to look into a network.

    The second thing that a network built with it returns is then a list of what was measured in each layer. Its
    variables are those of a network built with `norm`.
    """

    def apply(variables: dict, x: Array, *, train: bool) -> tuple[Array, Array]:
        y, _ = norm.apply(variables, x, train=train)
        return y, measure(x, y)

    return jaxbn.Normalizer(norm.init, apply)


def look(
    build: Callable[[jaxbn.Normalizer], Network], norm: jaxbn.Normalizer, measure: Callable[[Array, Array], Array]
) -> Callable[[dict, Array], list[Array]]:
    """(variables, images) -> what `measure` finds in each layer in training mode; variables: leaves [runs, ...]."""
    network = build(watched(norm, measure))
    return jax.jit(jax.vmap(lambda variables, images: network.apply(variables, images, train=True)[1], (0, None)))


def trace_shapes(layers: Sequence[Layer], x: Array) -> tuple[list[Shape], list[jax.ShapeDtypeStruct]]:
    """The kernels' shapes, and the outputs' shapes and dtypes, of layers one after the other; nothing is computed."""
    shapes, outputs = [], [jax.ShapeDtypeStruct(x.shape, x.dtype)]
    for layer in layers:
        shapes.append(layer.kernel_shape(outputs[-1].shape))
        kernel = {"kernel": jax.ShapeDtypeStruct(shapes[-1], x.dtype)}
        outputs.append(jax.eval_shape(layer.apply, kernel, outputs[-1]))
    return shapes, outputs[1:]


def cut(weights: Weights, key: Array, shapes: Sequence[Shape]) -> list[Array]:
    """Initial kernels of the given shapes from a single draw, scaled layer by layer."""
    sizes = [math.prod(shape) for shape in shapes]
    flat = weights.draw(key, (sum(sizes),))
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [
        weights.scale(shape) * flat[start : start + size].reshape(shape)
        for shape, start, size in zip(shapes, starts, sizes, strict=True)
    ]


def mlp(
    widths: Sequence[int],
    norm: jaxbn.Normalizer,
    *,
    use_bias: bool,
    activation: Callable[[Array], Array],
    weights: Weights,
    classes: int = 10,
) -> Network:
    """A multilayer perceptron with hidden layers of `widths` units; `use_bias` concerns the hidden layers."""
    layers = [dense(width, use_bias=use_bias) for width in widths]
    return stack(layers, dense(classes, use_bias=True), norm, activation, weights)


class Tower(NamedTuple):
    """A deep MLP whose last hidden layer can be looked at, and whose depth may differ from run to run."""

    init: Callable  # init(key, x, depth) -> variables; depth: [], from 1 to the deepest, may be traced
    apply: Callable  # as of a Network
    hidden: Callable  # hidden(variables, x, *, train) -> (last hidden layer [batch, width], batch_stats)
    head: Callable  # head(variables, hidden) -> logits


def tower(
    deepest: int,
    width: int,
    norm: jaxbn.Normalizer,
    *,
    use_bias: bool,
    activation: Callable[[Array], Array],
    weights: Weights,
    classes: int = 10,
) -> Tower:
    """An `mlp` with hidden layers of equal width, all but the first in one `lax.scan`: one program for every depth.

    Of the `deepest` hidden layers those beyond a network's depth hand on what they get. params and batch_stats have the
    leaves of the first layer under "first" and those of the others, stacked along an axis [deepest - 1], under "rest";
    params also "head", and batch_stats "active", which of the others count.
    """
    layer, last = dense(width, use_bias=use_bias), dense(classes, use_bias=True)

    def repeated(tree: dict) -> dict:
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (deepest - 1, *leaf.shape)), tree)

    def init(key: Array, x: Array, depth: Array | int) -> dict:
        shapes, outputs = trace_shapes([layer, layer, last], x)
        stacked = shapes[0], (deepest - 1, *shapes[1]), shapes[2]
        ends = list(itertools.accumulate(map(math.prod, stacked)))
        flat = jnp.split(weights.draw(key, (ends[-1],)), ends[:-1])
        first, rest, of_head = (
            weights.scale(shape) * part.reshape(whole) for shape, part, whole in zip(shapes, flat, stacked, strict=True)
        )
        bias = {"bias": jnp.zeros(width)} if use_bias else {}
        of_norm = norm.init(key, outputs[0])
        below = {"layer": {"kernel": first, **bias}, "norm": of_norm["params"]}
        above = {"layer": {"kernel": rest, **repeated(bias)}, "norm": repeated(of_norm["params"])}
        params = {"first": below, "rest": above, "head": {"kernel": of_head, "bias": jnp.zeros(classes)}}
        stats = {"first": of_norm["batch_stats"], "rest": repeated(of_norm["batch_stats"])}
        return {"params": params, "batch_stats": {**stats, "active": jnp.arange(1, deepest) < depth}}

    def hidden(variables: dict, x: Array, *, train: bool) -> tuple[Array, dict]:
        def one(x: Array, own: tuple[dict, dict]) -> tuple[Array, dict]:
            param, stats = own
            h = layer.apply(param["layer"], x)
            h, stats = norm.apply({"params": param["norm"], "batch_stats": stats}, h, train=train)
            return activation(h), stats

        def if_active(x: Array, own: tuple[Array, tuple[dict, dict]]) -> tuple[Array, dict]:
            active, own = own
            y, stats = one(x, own)
            return jnp.where(active, y, x), stats

        params, stats = variables["params"], variables["batch_stats"]
        x, below = one(x, (params["first"], stats["first"]))
        x, above = jax.lax.scan(if_active, x, (stats["active"], (params["rest"], stats["rest"])))
        return x, {"first": below, "rest": above, "active": stats["active"]}

    def head(variables: dict, x: Array) -> Array:
        return last.apply(variables["params"]["head"], x)

    def apply(variables: dict, x: Array, *, train: bool) -> tuple[Array, dict]:
        x, batch_stats = hidden(variables, x, train=train)
        return head(variables, x), batch_stats

    return Tower(init, apply, hidden, head)


def deep_conv(depth: int, norm: jaxbn.Normalizer, *, use_bias: bool, classes: int = 10) -> Network:
    """Layer i of `depth` has 4 i filters of 3 x 3 and stride 2 if 3 divides i; then dense 100, dense; ReLU, Glorot."""
    layers = [conv3x3(4 * i, stride=1 if i % 3 else 2, use_bias=use_bias) for i in range(1, depth + 1)]
    layers.append(dense(100, use_bias=use_bias))
    return stack(layers, dense(classes, use_bias=True), norm, jax.nn.relu, glorot_weights())


def vgg(blocks: Sequence[Sequence[int]], norm: jaxbn.Normalizer, *, units: int, classes: int = 10) -> Network:
    """Blocks of 3 x 3 convolutions with as many filters as `blocks` says, then dense `units`, dense; ReLU, Glorot.

    The first convolution of each block has stride 2, where VGG has a maximum over 2 x 2. The bias is the norm's.
    """
    layers = [
        conv3x3(filters, stride=1 if number else 2, use_bias=False)
        for block in blocks
        for number, filters in enumerate(block)
    ]
    layers.append(dense(units, use_bias=False))
    return stack(layers, dense(classes, use_bias=True), norm, jax.nn.relu, glorot_weights())


def nin(blocks: Sequence[int], norm: jaxbn.Normalizer, *, classes: int = 10) -> Network:
    """By block a 3 x 3 and two 1 x 1 convolutions, then a mean over pixels; ReLU, Glorot (Lin, Chen and Yan 2014).

    `blocks` says the filters of each block, whose first convolution has stride 2, where the source has a maximum. The
    last convolution, to classes, and the mean over pixels are taken in the other order, which is the same. The bias is
    the norm's.
    """
    layers = [
        layer
        for filters in blocks
        for layer in (
            conv3x3(filters, stride=2, use_bias=False),
            conv1x1(filters, use_bias=False),
            conv1x1(filters, use_bias=False),
        )
    ]
    return stack(layers, after_mean(dense(classes, use_bias=True)), norm, jax.nn.relu, glorot_weights())


def lenet(
    norm: jaxbn.Normalizer, *, use_bias: bool, activation: Callable[[Array], Array], classes: int = 10
) -> Network:
    """LeNet-5 for images of 28 x 28: 2 convolutions and means, 3 dense layers (LeCun et al. 1998, section II.B)."""
    layers = [
        conv5x5(6, padding="SAME", use_bias=use_bias),
        after_pooling(conv5x5(16, padding="VALID", use_bias=use_bias)),
        after_pooling(dense(120, use_bias=use_bias)),
        dense(84, use_bias=use_bias),
    ]
    return stack(layers, dense(classes, use_bias=True), norm, activation, glorot_weights())
