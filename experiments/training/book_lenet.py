"""LeNet as Dive into Deep Learning writes it: sigmoid after every layer but the last, means of 2 x 2 pixels.

Features come first here, x: [features, batch, height, width] and [features, batch], so that a convolution is one
product [features, inputs] @ [inputs, positions]: for few features on CPUs, and for many networks at once on GPUs, that
is many times faster than XLA's convolution.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

import jaxbn
from experiments.training.models import Layer, Network, Shape, glorot_weights, stack

KERNEL = 5  # height and width of a kernel


def lenet(norm: jaxbn.Normalizer, *, padding: int, use_bias: bool, classes: int = 10) -> Network:
    """The network for [batch, height, width, channels]; its weights are Glorot-uniform.

    Args:
      norm: after every layer but the last; its features are the first axis: `batch_norm(feature_axis=0)`.
      padding: zeros around the image, 2 in the book's LeNet and 0 in its BN-LeNet.
      use_bias: of all layers but the last.
      classes: number of outputs.
    """
    layers = [
        convolution(6, padding=padding, use_bias=use_bias, first=True),
        after_pooling(convolution(16, padding=0, use_bias=use_bias)),
        after_pooling(dense(120, use_bias=use_bias)),
        dense(84, use_bias=use_bias),
    ]
    network = stack(layers, dense(classes, use_bias=True), norm, jax.nn.sigmoid, glorot_weights())

    def apply(variables: dict, x: Array, *, train: bool) -> tuple[Array, list]:
        logits, batch_stats = network.apply(variables, x, train=train)
        return logits.T, batch_stats

    return Network(network.init, apply)


def convolution(features: int, *, padding: int, use_bias: bool, first: bool = False) -> Layer:
    """5 x 5, x: [channels, batch, height, width]; the first layer takes [batch, height, width, channels]."""

    def patches(x: Array) -> Array:
        x = jnp.moveaxis(x, -1, 0) if first else x
        x = jnp.pad(x, [(0, 0), (0, 0), (padding, padding), (padding, padding)])
        height, width = (size - KERNEL + 1 for size in x.shape[2:])
        # Columns, then rows: 10 slices compile in half the time of 25.
        x = jnp.concatenate([x[..., j : j + width] for j in range(KERNEL)])
        return jnp.concatenate([x[..., i : i + height, :] for i in range(KERNEL)])

    def apply(weights: dict, x: Array) -> Array:
        kernel = weights["kernel"].reshape(-1, features)
        return _add_bias(weights, jnp.tensordot(kernel, patches(x), ((0,), (0,))))

    def kernel_shape(shape: Shape) -> Shape:
        return (KERNEL, KERNEL, shape[-1] if first else shape[0], features)

    return Layer(kernel_shape, apply, features, use_bias)


def dense(features: int, *, use_bias: bool) -> Layer:
    """`y = kernel x + bias`; x: [features, batch, ...], flattened to [inputs, batch]."""

    def apply(weights: dict, x: Array) -> Array:
        return _add_bias(weights, weights["kernel"] @ jnp.moveaxis(x, 1, -1).reshape(-1, x.shape[1]))

    def kernel_shape(shape: Shape) -> Shape:
        return (features, shape[0] * math.prod(shape[2:]))

    return Layer(kernel_shape, apply, features, use_bias)


def after_pooling(layer: Layer) -> Layer:
    """The layer on the means of 2 x 2 pixels; x: [channels, batch, height, width], height and width even."""

    def pooled(shape: Shape) -> Shape:
        return (*shape[:2], shape[2] // 2, shape[3] // 2)

    def pool(x: Array) -> Array:
        *kept, height, width = x.shape
        return x.reshape(*kept, height // 2, 2, width // 2, 2).mean((-3, -1))

    return layer._replace(
        kernel_shape=lambda shape: layer.kernel_shape(pooled(shape)),
        apply=lambda weights, x: layer.apply(weights, pool(x)),
    )


def _add_bias(weights: dict, y: Array) -> Array:
    if "bias" not in weights:
        return y
    return y + weights["bias"].reshape(-1, *[1] * (y.ndim - 1))
