"""A 1 x 1 convolution beside a dense layer on the same values, both with batch norm: how far do they differ?"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax import Array

import jaxbn

IMAGES, MAPS, UNITS = 64, 8, 6
COMPARED = (
    "output",
    "mean",
    "variance",
    "input's gradient",
    "kernel's gradient",
    "scale's gradient",
    "bias's gradient",
)
NORM = jaxbn.batch_norm(decay=0.0)  # running statistics are then those of the batch


def measured(digits: np.ndarray, seeds: Sequence[int]) -> xr.Dataset:
    """The largest relative differences in float64, each seed with IMAGES digits and weights of its own.

    Args:
      digits: uint8 [n, height, width, channels].
      seeds: of the weights.

    Returns:
      `convolution` [compared, seed]: convolution against dense layer; `moments` [moment, seed]: mean and variance of
      the norm against those over batch, height and width.
    """
    with jax.enable_x64(True):
        batches = [jnp.asarray(digits[number * IMAGES :][:IMAGES] / 255.0) for number in range(len(seeds))]
        found = [differences(images, seed) for images, seed in zip(batches, seeds, strict=True)]
    convolution, moments = (np.stack(values, -1) for values in zip(*found, strict=True))
    arrays = {"convolution": (("compared", "seed"), convolution), "moments": (("moment", "seed"), moments)}
    return xr.Dataset(arrays, {"compared": list(COMPARED), "moment": ["mean", "variance"], "seed": list(seeds)})


def convolved(x: Array, kernel: Array) -> Array:
    """A convolution with zero padding; x: [images, height, width, maps], kernel: [height, width, maps, units]."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def layer(linear: Callable, x: Array, kernel: Array, params: dict, cotangent: Array) -> list[Array]:
    """Everything of COMPARED for `norm(linear(x, kernel))`, and the loss sum(output * cotangent)."""

    def loss(x: Array, kernel: Array, params: dict) -> tuple[Array, tuple]:
        h = linear(x, kernel)
        stats = NORM.init(jax.random.key(0), h)["batch_stats"]
        y, stats = NORM.apply({"params": params, "batch_stats": stats}, h, train=True)
        return jnp.sum(y * cotangent), (y, stats)

    (_, (y, stats)), (dx, dkernel, dparams) = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, kernel, params)
    return [y, stats["mean"], stats["var"], dx, dkernel, dparams["scale"], dparams["bias"]]


@jax.jit
def differences(images: Array, seed: int) -> tuple[Array, Array]:
    """Of one seed: convolution against dense layer [compared]; and statistics against plain means [2]."""
    keys = jax.random.split(jax.random.key(seed), 5)
    x = convolved(images, jax.random.normal(keys[0], (3, 3, images.shape[-1], MAPS), images.dtype))
    kernel = jax.random.normal(keys[1], (MAPS, UNITS), x.dtype)
    scale, bias = (jax.random.normal(key, (UNITS,), x.dtype) for key in keys[2:4])
    cotangent = jax.random.normal(keys[4], (*x.shape[:-1], UNITS), x.dtype)
    maps = layer(lambda x, k: convolved(x, k[None, None]), x, kernel, {"scale": scale, "bias": bias}, cotangent)
    dense = x.reshape(-1, MAPS), kernel, {"scale": scale, "bias": bias}, cotangent.reshape(-1, UNITS)
    rows = layer(jnp.matmul, *dense)
    h = x @ kernel
    plain = jnp.mean(h, (0, 1, 2)), jnp.var(h, (0, 1, 2))
    return jnp.stack(list(map(relative, maps, rows))), jnp.stack(list(map(relative, maps[1:3], plain)))


def relative(a: Array, b: Array) -> Array:
    """The largest difference over the largest value."""
    return jnp.max(jnp.abs(a - b.reshape(a.shape))) / jnp.max(jnp.abs(b))
