"""Deep networks of equal layers at the start: how the gradient's size changes from layer to layer.

`h_(l+1) = activation(norm(h_l) + bias) kernel_l`: one program serves every arm. What the theory of wide networks says
of it is at the end of this file.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import jaxbn
from experiments.training import data

CLASSES = 10
EPSILON = 1e-5
NORMS = NONE, BATCH, CONSTANT = 0, 1, 2  # CONSTANT: no gradient through the statistics
ACTIVATIONS = [jax.nn.relu, lambda z: z, jnp.tanh]
RELU, LINEAR, TANH = range(3)


class Arm(NamedTuple):
    """One way to build the network; numbers, so that all share a program."""

    norm: int  # one of NORMS
    activation: int  # number in ACTIVATIONS
    gain: float  # standard deviation of the weights over that of He et al.
    bias: float  # before the activation


class Drawn(NamedTuple):
    """What is random in one network: the same numbers in every dtype."""

    first: Array  # [pixels, width]
    kernels: Array  # [depth, width, width]
    images: Array  # [batch, pixels], in [0, 1]
    labels: Array  # [batch]
    direction: Array  # [batch, width]
    noise: Array  # [batch, pixels], white: in place of the images


def drawn(digits: data.Dataset, seed: int, depth: int, width: int, batch: int, dtype: type = jnp.float32) -> Drawn:
    """He's weights, digits and the loss's direction of one seed."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(digits.train_labels))[:batch]
    images = digits.train_images[chosen].reshape(batch, -1) / np.float32(255)
    shapes = (images.shape[1], width), (depth, width, width), (batch, width), images.shape
    first, kernels, direction, noise = (rng.standard_normal(shape, np.float32) for shape in shapes)
    first *= (2 / images.shape[1]) ** 0.5
    kernels *= (2 / width) ** 0.5
    floats = (jnp.asarray(one, dtype) for one in (first, kernels, images, direction, noise))
    first, kernels, images, direction, noise = floats
    return Drawn(first, kernels, images, jnp.asarray(digits.train_labels[chosen]), direction, noise)


def normalized(kind: Array, h: Array) -> Array:
    """One of NORMS over the batch; h: [batch, width]."""
    y, found = jaxbn.batch_normalize(h, axis=0, epsilon=EPSILON)
    stop = jax.lax.stop_gradient
    constant = stop(y) + (h - stop(h)) / stop(jnp.sqrt(found.var + EPSILON))[None]
    return jnp.stack([h, y, constant])[kind]


def network(arm: Arm, first: Array, kernels: Array, images: Array, probes: Array) -> Array:
    """`h_1 = x first`, `h_(l+1) = activation(norm(h_l + probe_l) + bias) kernel_l`; the last h, [batch, width].

    first: [pixels, width]; kernels: [depth, width, width]; images: [batch, pixels]; probes: [depth, batch, width] of
    zeros, by which the gradient at each layer's norm is taken.
    """

    def layer(h: Array, own: tuple[Array, Array]) -> tuple[Array, None]:
        kernel, probe = own
        x = jax.lax.switch(arm.activation, ACTIVATIONS, normalized(arm.norm, h + probe) + arm.bias)
        return x @ (arm.gain * kernel), None

    return jax.lax.scan(layer, images @ first, (kernels, probes))[0]


def log_mean_square(gradient: Array) -> Array:
    """Log of the mean square by layer, safe where the square would leave the range; gradient: [depth, ...]."""
    flat = gradient.reshape(len(gradient), -1)
    largest = jnp.max(jnp.abs(flat), axis=1, keepdims=True)
    return 2 * jnp.log(largest[:, 0]) + jnp.log(jnp.mean((flat / largest) ** 2, axis=1))


@jax.jit
def flow(arm: Arm, own: Drawn) -> Array:
    """Log of the mean squared gradient at each layer's norm, [depth], of a random linear function of the output."""

    def loss(probes: Array) -> Array:
        return jnp.vdot(network(arm, own.first, own.kernels, own.images, probes), own.direction)

    return log_mean_square(jax.grad(loss)(probes_of(own)))


def flow_of_noise(arm: Arm, own: Drawn) -> Array:
    """`flow` with white noise in place of the images."""
    return flow(arm, own._replace(images=own.noise))


@partial(jax.jit, static_argnames="steps")
def trained(arm: Arm, own: Drawn, steps: int, rate: float) -> Array:
    """The same for the labels' cross-entropy before and after each gradient step on all weights: [steps + 1, depth]."""

    def loss(weights: tuple, probes: Array) -> Array:
        logits = network(arm, *weights, own.images, probes)[:, :CLASSES]
        return optax.softmax_cross_entropy_with_integer_labels(logits, own.labels).mean()

    def step(weights: tuple, _: None) -> tuple[tuple, Array]:
        gradient, by_layer = jax.grad(loss, argnums=(0, 1))(weights, probes_of(own))
        return jax.tree.map(lambda w, g: w - rate * g, weights, gradient), log_mean_square(by_layer)

    return jax.lax.scan(step, (own.first, own.kernels), length=steps + 1)[1]


def probes_of(own: Drawn) -> Array:
    """Zeros [depth, batch, width]."""
    return jnp.zeros((len(own.kernels), *own.direction.shape), own.direction.dtype)


def relu_rate(batch: np.ndarray | float) -> np.ndarray:
    """Growth of the squared gradient per layer, ReLU, at a batch size: Yang et al. 2019, theorem 8 with alpha = 1."""
    cosine = -1 / (np.asarray(batch) - 1)
    slope = (np.pi - np.arccos(cosine)) / np.pi  # of the arc-cosine kernel
    kernel = np.sqrt(1 - cosine**2) / np.pi + slope * cosine
    return ((batch - 1 + slope) / (1 - kernel) - 1) / (batch - 3)


def linear_rate(batch: float) -> float:
    """The same without an activation."""
    return (batch - 2) / (batch - 3)
