"""Residual networks: the family of 6 n + 2 layers for small images, and ResNet-50; plain twins without shortcuts.

`init(key, x) -> variables` and `apply(variables, x, *, train) -> (logits, batch_stats)` as in `models`. Every
convolution has no bias and is followed by the norm. "params" is {unit: {"kernel", "norm"}, "head": {"kernel", "bias"}}
and "batch_stats" {unit: ...}; units are named as in "stage1/block0/conv2".

Source: He, Zhang, Ren and Sun 2016, Deep residual learning for image recognition, sections 3.3 and 4.2; the stride of a
bottleneck lies in its 3 x 3 convolution, as in later implementations ("v1.5").
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

import jaxbn
from experiments.training.models import Network, patches3x3

UnitOf = Callable[[str, Array, int, int, int], Array]  # (name, x, filters, size, stride) -> y: convolution and norm

BOTTLENECKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def small_resnet(
    depth: int,
    norm: jaxbn.Normalizer,
    *,
    classes: int = 10,
    width: int = 16,
    stages: int = 3,
    residual: bool = True,
    convolve: Callable[[Array, Array, int], Array] | None = None,
) -> Network:
    """The network of 6 n + 2 weighted layers for images of about 32 x 32: 20, 32, 44, 56, 110, ...

    Args:
      depth: 6 n + 2; n blocks in each of three stages.
      norm: follows every convolution.
      classes: of the output.
      width: filters of the first stage; each further stage has twice as many and half the height and width.
      stages: fewer than three make a network of 2 stages n + 2 layers.
      residual: False leaves out the shortcuts.
      convolve: convolve(x, kernel, stride) -> y with zero padding, in place of XLA's convolution; `patch_convolve` is
        faster inside loops on a CPU.

    Raises:
      ValueError: depth is not 6 n + 2, or not 2 stages n + 2.
    """
    blocks, rest = divmod(depth - 2, 2 * stages)
    if rest or blocks < 1:
        raise ValueError(
            f"depth={depth}; expected {2 * stages} n + 2, such as {[2 * stages * n + 2 for n in (3, 9, 18)]}."
        )

    def forward(unit: UnitOf, x: Array) -> Array:
        x = jax.nn.relu(unit("stem", x, width, 3, 1))
        for stage in range(stages):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                x = _basic(unit, f"stage{stage}/block{block}", x, width * 2**stage, stride, residual)
        return x

    return _network(forward, norm, classes, jnp.float32, convolve or xla_convolve)


def resnet(
    depth: int,
    norm: jaxbn.Normalizer,
    *,
    classes: int = 1000,
    width: int = 64,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Network:
    """ResNet-50 or 101 for images of about 224 x 224: bottlenecks, with projections where the shape changes.

    Args:
      depth: 50 or 101.
      norm: follows every convolution.
      classes: of the output.
      width: filters of the stem; the last stage has 32 times as many.
      dtype: of the activations; weights stay float32.
    """
    if depth not in BOTTLENECKS:
        raise ValueError(f"depth={depth}; expected one of {sorted(BOTTLENECKS)}.")

    def forward(unit: UnitOf, x: Array) -> Array:
        x = jax.nn.relu(unit("stem", x, width, 7, 2))
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
        for stage, blocks in enumerate(BOTTLENECKS[depth]):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                x = _bottleneck(unit, f"stage{stage}/block{block}", x, width * 2**stage, stride)
        return x

    return _network(forward, norm, classes, dtype, xla_convolve)


def _basic(unit: UnitOf, name: str, x: Array, filters: int, stride: int, residual: bool) -> Array:
    y = jax.nn.relu(unit(f"{name}/conv1", x, filters, 3, stride))
    y = unit(f"{name}/conv2", y, filters, 3, 1)
    if not residual:
        return jax.nn.relu(y)
    # No weights in the shortcut ("option A"): every stride-th pixel, new channels zero.
    shortcut = jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (0, filters - x.shape[-1])))
    return jax.nn.relu(y + shortcut)


def _bottleneck(unit: UnitOf, name: str, x: Array, filters: int, stride: int) -> Array:
    y = jax.nn.relu(unit(f"{name}/conv1", x, filters, 1, 1))
    y = jax.nn.relu(unit(f"{name}/conv2", y, filters, 3, stride))
    y = unit(f"{name}/conv3", y, 4 * filters, 1, 1)
    if x.shape != y.shape:
        x = unit(f"{name}/shortcut", x, 4 * filters, 1, stride)
    return jax.nn.relu(y + x)


class _Unit(NamedTuple):
    """What there is to know of a convolution and its norm before there are weights."""

    kernel: tuple[int, ...]
    output: jax.ShapeDtypeStruct


def _network(
    forward: Callable[[UnitOf, Array], Array],
    norm: jaxbn.Normalizer,
    classes: int,
    dtype: jax.typing.DTypeLike,
    convolve: Callable[[Array, Array, int], Array],
) -> Network:
    """`forward(unit, x)`, global average pooling and a dense layer; unit(name, x, filters, size, stride) -> y."""

    def shapes(x: Array) -> tuple[dict[str, _Unit], int]:
        units = {}

        def note(name: str, x: Array, filters: int, size: int, stride: int) -> Array:
            kernel = (size, size, x.shape[-1], filters)
            y = convolve(x, jnp.zeros(kernel, x.dtype), stride)
            units[name] = _Unit(kernel, jax.ShapeDtypeStruct(y.shape, y.dtype))
            return y

        top = jax.eval_shape(lambda: forward(note, jnp.zeros(x.shape, dtype)))
        return units, top.shape[-1]

    def init(key: Array, x: Array) -> dict:
        units, features = shapes(x)
        sizes = [math.prod(unit.kernel) for unit in units.values()] + [features * classes]
        # One draw for all, cut up: it compiles once instead of once a shape.
        draws = iter(jnp.split(jax.random.normal(key, (sum(sizes),)), [sum(sizes[:n]) for n in range(1, len(sizes))]))
        params, batch_stats = {}, {}
        for number, (name, unit) in enumerate(units.items()):
            of_norm = norm.init(jax.random.fold_in(key, number), unit.output)
            kernel = next(draws).reshape(unit.kernel) * math.sqrt(2 / math.prod(unit.kernel[:-1]))
            params[name] = {"kernel": kernel, "norm": of_norm["params"]}
            batch_stats[name] = of_norm["batch_stats"]
        head = next(draws).reshape(features, classes) / math.sqrt(features)
        params["head"] = {"kernel": head, "bias": jnp.zeros(classes)}
        return {"params": params, "batch_stats": batch_stats}

    def apply(variables: dict, x: Array, *, train: bool) -> tuple[Array, dict]:
        params, batch_stats, moved = variables["params"], variables["batch_stats"], {}

        def unit(name: str, x: Array, filters: int, size: int, stride: int) -> Array:
            y = convolve(x, params[name]["kernel"].astype(dtype), stride)
            of_norm = {"params": params[name]["norm"], "batch_stats": batch_stats[name]}
            y, moved[name] = norm.apply(of_norm, y, train=train)
            return y

        x = forward(unit, x.astype(dtype)).mean((1, 2), dtype=jnp.float32)
        return x @ params["head"]["kernel"] + params["head"]["bias"][None], moved

    return Network(init, apply)


def xla_convolve(x: Array, kernel: Array, stride: int) -> Array:
    """x: [batch, height, width, channels], kernel: [size, size, channels, filters], zero padding ("SAME")."""
    return lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def patch_convolve(x: Array, kernel: Array, stride: int) -> Array:
    """The same for kernels of 3 x 3, as one matrix product of `models.patches3x3`."""
    return patches3x3(x, stride) @ kernel.reshape(-1, kernel.shape[-1])
