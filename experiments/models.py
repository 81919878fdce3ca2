"""Networks as pairs of functions that take a `jaxbn.Normalizer` and do not care which.

`init(key, x) -> variables` and `apply(variables, x, *, train) -> (logits, batch_stats)`, where `variables` is
`{"params": ..., "batch_stats": ...}` and x: [batch, ...] float32. Weights are drawn layer by layer from keys that
depend on the layer's number alone, so that a plain network and its normalized twin start from the same weights.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

import jaxbn

Initializer = Callable[..., Array]


class Network(NamedTuple):
    """Two pure functions; see the module's docstring."""

    init: Callable
    apply: Callable


class Layer(NamedTuple):
    """A linear map, `init(key, x) -> weights` and `apply(weights, x) -> y`; `weights` is a dict of arrays."""

    init: Callable
    apply: Callable


def dense(features: int, *, use_bias: bool, weight_init: Initializer) -> Layer:
    """`y = flatten(x) kernel + bias`; x: [batch, ...], y: [batch, features]; the bias starts at zero."""

    def init(key: Array, x: Array) -> dict:
        kernel = weight_init(key, (x[0].size, features), jnp.float32)
        return {"kernel": kernel, **({"bias": jnp.zeros(features)} if use_bias else {})}

    def apply(weights: dict, x: Array) -> Array:
        return _add_bias(weights, x.reshape(len(x), -1) @ weights["kernel"])

    return Layer(init, apply)


def conv3x3(features: int, *, stride: int, use_bias: bool, weight_init: Initializer) -> Layer:
    """A 3 x 3 convolution, zero padding ("SAME"); x: [batch, height, width, channels]; the bias starts at zero."""

    def init(key: Array, x: Array) -> dict:
        kernel = weight_init(key, (3, 3, x.shape[-1], features), jnp.float32)
        return {"kernel": kernel, **({"bias": jnp.zeros(features)} if use_bias else {})}

    def apply(weights: dict, x: Array) -> Array:
        y = jax.lax.conv_general_dilated(
            x, weights["kernel"], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return _add_bias(weights, y)

    return Layer(init, apply)


def _add_bias(weights: dict, y: Array) -> Array:
    if "bias" not in weights:
        return y
    return y + weights["bias"].reshape((1,) * (y.ndim - 1) + (-1,))


def stack(
    layers: Sequence[Layer], head: Layer, norm: jaxbn.Normalizer, activation: Callable[[Array], Array]
) -> Network:
    """`layer -> norm -> activation` for each of `layers`, then `head`, which is neither normalized nor activated."""

    def init(key: Array, x: Array) -> dict:
        params, batch_stats = [], []
        for number, layer in enumerate(layers):
            layer_key = jax.random.fold_in(key, number)
            weights = layer.init(layer_key, x)
            x = layer.apply(weights, x)
            of_norm = norm.init(layer_key, x)
            params.append({"layer": weights, "norm": of_norm["params"]})
            batch_stats.append(of_norm["batch_stats"])
        params.append({"layer": head.init(jax.random.fold_in(key, len(layers)), x)})
        return {"params": params, "batch_stats": batch_stats}

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


def mlp(
    widths: Sequence[int],
    norm: jaxbn.Normalizer,
    *,
    use_bias: bool,
    activation: Callable[[Array], Array],
    weight_init: Initializer,
    classes: int = 10,
) -> Network:
    """A multilayer perceptron with hidden layers of `widths` units; `use_bias` concerns the hidden layers."""
    layers = [dense(width, use_bias=use_bias, weight_init=weight_init) for width in widths]
    return stack(layers, dense(classes, use_bias=True, weight_init=weight_init), norm, activation)


def deep_conv(
    depth: int,
    norm: jaxbn.Normalizer,
    *,
    use_bias: bool,
    filters_per_layer: int = 4,
    dense_width: int = 100,
    classes: int = 10,
) -> Network:
    """Layer i of `depth` has `4 i` filters of 3 x 3 and stride 2 if 3 divides i; then dense layers; ReLU, Glorot."""
    glorot = jax.nn.initializers.glorot_uniform()
    layers = [
        conv3x3(filters_per_layer * i, stride=1 if i % 3 else 2, use_bias=use_bias, weight_init=glorot)
        for i in range(1, depth + 1)
    ]
    layers.append(dense(dense_width, use_bias=use_bias, weight_init=glorot))
    return stack(layers, dense(classes, use_bias=True, weight_init=glorot), norm, jax.nn.relu)
