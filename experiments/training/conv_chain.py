"""A chain of 3 x 3 convolution, norm and activation, in the ways in which one writes it, and its gradient.

What benchmarks and ahead-of-time compilation count: memory kept for the backward pass, bytes moved, time to compile.
A unit is a dict {"kernel", "params", "batch_stats"}: the kernel [3, 3, channels, channels] and the norm's variables.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

import jaxbn
from experiments.training.resnet import xla_convolve

BLOCKS = 6

Block = Callable[[jaxbn.Normalizer, Array, dict], tuple[Array, dict]]  # (norm, x, unit) -> (y, moved statistics)
Chain = Callable  # (norm, x, units) -> (y, moved statistics)


def unit_shapes(norm: jaxbn.Normalizer, shape: tuple[int, ...]) -> dict:
    """Shapes and dtypes of one unit whose input is float32 of `shape`: [batch, height, width, channels]."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(lambda key: norm.init(key, x), jax.random.key(0))
    return {"kernel": jax.ShapeDtypeStruct((3, 3, shape[-1], shape[-1]), jnp.float32), **variables}


def arguments(
    norm: jaxbn.Normalizer, shape: tuple[int, ...], blocks: int = BLOCKS
) -> tuple[jax.ShapeDtypeStruct, dict]:
    """x, and units stacked along a first axis [blocks], as `loop` and `unrolled` take them."""
    units = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((blocks, *leaf.shape), leaf.dtype), unit_shapes(norm, shape))
    return jax.ShapeDtypeStruct(shape, jnp.float32), units


def convolve_first(norm: jaxbn.Normalizer, x: Array, unit: dict) -> tuple[Array, dict]:
    """A convolution, the norm, its activation: x and y are outputs of activations."""
    return norm.apply(_variables(unit), xla_convolve(x, unit["kernel"], 1), train=True)


def norm_first(norm: jaxbn.Normalizer, x: Array, unit: dict) -> tuple[Array, dict]:
    """The norm, its activation, a convolution: x and y are outputs of convolutions."""
    y, moved = norm.apply(_variables(unit), x, train=True)
    return xla_convolve(y, unit["kernel"], 1), moved


def _variables(unit: dict) -> dict:
    # Running statistics are none of the parameters: no gradient flows to them.
    return {"params": unit["params"], "batch_stats": lax.stop_gradient(unit["batch_stats"])}


def written_out(norm: jaxbn.Normalizer, x: Array, units: Sequence[dict]) -> tuple[Array, list]:
    """One unit after the other, a convolution first; returns y and every norm's moved statistics."""
    moved = []
    for unit in units:
        x, batch_stats = convolve_first(norm, x, unit)
        moved.append(batch_stats)
    return x, moved


def unrolled(policy: bool) -> Chain:
    """The chain written out over stacked units; with `policy` under a checkpoint around all of it."""

    def chain(norm: jaxbn.Normalizer, x: Array, units: dict) -> tuple[Array, list]:
        blocks = len(units["kernel"])
        return written_out(norm, x, [jax.tree.map(lambda leaf, i=i: leaf[i], units) for i in range(blocks)])

    def checkpointed(norm: jaxbn.Normalizer, x: Array, units: dict) -> tuple[Array, list]:
        return jax.checkpoint(partial(chain, norm), policy=jaxbn.dots_and_statistics_saveable)(x, units)

    return checkpointed if policy else chain


def loop(block: Block, policy: bool) -> Chain:
    """The chain as `lax.scan` over stacked units; with `policy` under a checkpoint around its body."""

    def chain(norm: jaxbn.Normalizer, x: Array, units: dict) -> tuple[Array, dict]:
        body = partial(block, norm)
        checkpointed = partial(jax.checkpoint, policy=jaxbn.dots_and_statistics_saveable, prevent_cse=False)
        return lax.scan(checkpointed(body) if policy else body, x, units)

    return chain


def gradient_of(chain: Callable) -> Callable:
    """Of `chain(x, units) -> (y, moved)`: (x, units, dy) -> gradients of <y, dy> by x and what is trained, and `moved`.

    What is trained of a unit are "kernel" and "params": some libraries count steps among their statistics, and whole
    numbers have no gradient.
    """

    def gradient(x: Array, units: dict | list, dy: Array) -> tuple:
        def loss(x: Array, trained: dict | list) -> tuple[Array, dict | list]:
            y, moved = chain(x, _map_units(lambda some, unit: {**unit, **some}, trained, units))
            return jnp.vdot(y, dy), moved

        trained = _map_units(lambda unit: {"kernel": unit["kernel"], "params": unit["params"]}, units)
        return jax.grad(loss, argnums=(0, 1), has_aux=True)(x, trained)

    return gradient


def _map_units(f: Callable, *units: dict | list) -> dict | list:
    """F of each unit; of stacked units, of all at once."""
    return jax.tree.map(f, *units, is_leaf=lambda node: isinstance(node, dict) and "kernel" in node)


def compile_gradient(chain: Callable, x: jax.ShapeDtypeStruct, units: dict) -> jax.stages.Compiled:
    """`gradient_of` the chain, compiled for arguments of these shapes."""
    return jax.jit(gradient_of(chain)).lower(x, units, x).compile()
