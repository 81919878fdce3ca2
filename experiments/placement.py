"""Where does batch norm stand in a convolutional layer, and over what does it average?

Protocol: 64 real digits, a 3 x 3 convolution to 8 feature maps, then a 1 x 1 convolution to 6, normalized per feature
map (batch norm with scale and bias, epsilon 1e-5), random weights per seed, everything in float64. The same values
as a matrix [images x positions, 8 maps] go through a dense layer of 6 units and the same batch norm. Outputs, running
statistics and the gradients of a random linear loss with respect to input, weights, scale and bias are compared by
their largest difference, relative to the largest value.

    python -m experiments run placement

takes seconds.
"""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

import jaxbn
from experiments.framework.claim import Claim
from experiments.framework.experiment import WHAT_IT_IS, Experiment, Settings, Stage
from experiments.framework.tables import table_of
from experiments.training import data

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


def convolved(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A convolution with zero padding; x: [images, height, width, maps], kernel: [height, width, maps, units]."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def layer(linear: Callable, x: jax.Array, kernel: jax.Array, params: dict, cotangent: jax.Array) -> list[jax.Array]:
    """Everything of COMPARED for `norm(linear(x, kernel))`, and the loss sum(output * cotangent)."""

    def loss(x: jax.Array, kernel: jax.Array, params: dict) -> tuple[jax.Array, tuple]:
        h = linear(x, kernel)
        stats = NORM.init(jax.random.key(0), h)["batch_stats"]
        y, stats = NORM.apply({"params": params, "batch_stats": stats}, h, train=True)
        return jnp.sum(y * cotangent), (y, stats)

    (_, (y, stats)), (dx, dkernel, dparams) = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, kernel, params)
    return [y, stats["mean"], stats["var"], dx, dkernel, dparams["scale"], dparams["bias"]]


@jax.jit
def differences(images: jax.Array, seed: int) -> tuple[jax.Array, jax.Array]:
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


def relative(a: jax.Array, b: jax.Array) -> jax.Array:
    """The largest difference over the largest value."""
    return jnp.max(jnp.abs(a - b.reshape(a.shape))) / jnp.max(jnp.abs(b))


def stages(settings: Settings) -> Iterator[Stage]:
    """One stage, all seeds."""
    yield Stage("exact", partial(measured, settings))


def measured(settings: Settings) -> xr.Dataset:
    """`convolution` [compared, seed] and `statistics` [statistic, seed], the largest relative differences."""
    digits = data.load(settings.data).train_images
    with jax.enable_x64(True):
        batches = [jnp.asarray(digits[seed * IMAGES :][:IMAGES] / 255.0) for seed in range(settings.seeds)]
        found = [differences(images, seed) for seed, images in enumerate(batches)]
    convolution, statistics = (np.stack(values, -1) for values in zip(*found, strict=True))
    coordinates = {"compared": list(COMPARED), "statistic": ["mean", "variance"], "seed": range(settings.seeds)}
    arrays = {"convolution": (("compared", "seed"), convolution), "statistics": (("statistic", "seed"), statistics)}
    return xr.Dataset(arrays, coordinates)


EXPERIMENT = Experiment(
    title="Batch norm has one mean and variance per feature map; a 1 x 1 convolution is a dense layer.",
    question="Over what does batch norm average in a convolutional layer?",
    source="Ioffe and Szegedy 2015, section 3.2",
    theme=WHAT_IT_IS,
    settings={
        "smoke": Settings(seeds=2, data="mnist5k"),
        "cpu": Settings(seeds=10, data="mnist5k"),
        "full": Settings(seeds=30, data="mnist"),
    },
    stages=stages,
    claims=[
        Claim(
            "A 1 x 1 convolution with batch norm equals a dense layer with batch norm.",
            lambda r: r.convolution,
            measures="largest relative difference of outputs, statistics and gradients in float64",
            unit="relative",
            exact=1e-12,
        ),
        Claim(
            "Each feature map has one mean and one variance, those over batch and positions.",
            lambda r: r.statistics,
            measures="largest relative difference of both from those over batch, height and width in float64",
            unit="relative",
            exact=1e-12,
        ),
    ],
    tables=[
        table_of(
            "Largest relative difference, in units of 1e-15",
            lambda r: 1e15 * r.convolution.expand_dims(between=["1 x 1 convolution and dense layer"]),
            rows=["compared"],
            columns="between",
            form=".2f",
        )
    ],
)
