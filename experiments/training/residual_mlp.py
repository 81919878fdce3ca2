"""A residual MLP with switches for where batch norm stands: all arms of an experiment train in one compiled program.

At every place the network computes both, with the norm and without, and takes what the switch says. A norm that is
switched off gets no gradient and changes nothing.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

import jaxbn
from experiments.training import models
from experiments.training.reparameterized import shrink

HE = models.Weights(jax.random.normal, lambda shape: math.sqrt(2 / shape[0]))  # deviation for kernels [inputs, outputs]
SWITCHES = ("first", "inner", "last", "branch")


class ResidualMLP(NamedTuple):
    """`x = n(W image)`, then blocks `x + branch * W relu(n(W relu(n(x))))`, then `W relu(n(x))`; n: norm or nothing.

    Images are means over 2 x 2 pixels. A run holds four numbers: whether batch norm stands at the "first" place, in the
    blocks ("inner") and at the "last" place, 1 or 0, and the factor "branch". They lie among the batch statistics,
    since `apply` is given nothing else of a run.
    """

    norm: jaxbn.Normalizer
    blocks: int
    width: int
    classes: int = 10

    def init(self, run: dict, key: Array, x: Array) -> dict:
        """Variables, with kernels after He et al. 2015 that are the same for all switches; x: [batch, ...]."""
        inputs, hidden = shrink(x).shape[-1], [(self.width, self.width)] * (2 * self.blocks)
        first, *inner, head = models.cut(HE, key, [(inputs, self.width), *hidden, (self.width, self.classes)])
        of_norm = self.norm.init(key, jax.ShapeDtypeStruct((2, self.width), jnp.float32))

        def layer(kernel: Array) -> dict:
            return {"kernel": kernel, "bias": jnp.zeros(kernel.shape[-1]), "norm": of_norm["params"]}

        # The layers of the blocks are stacked and scanned over: they compile once.
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(layer, inner))
        pairs = jax.tree.map(lambda leaf: leaf.reshape(self.blocks, 2, *leaf.shape[1:]), stacked)
        repeated = jax.tree.map(lambda leaf: jnp.tile(leaf, (self.blocks, 2, 1)), of_norm["batch_stats"])
        stats = {"first": of_norm["batch_stats"], "inner": repeated, "last": of_norm["batch_stats"]}
        params = {"first": layer(first), "inner": pairs, "last": layer(head)}
        return {"params": params, "batch_stats": {"norms": stats, "arm": {name: run[name] for name in SWITCHES}}}

    def apply(self, variables: dict, x: Array, *, train: bool) -> tuple[Array, dict]:
        """Logits and the moved statistics; x: [batch, ...]."""
        logits, batch_stats, _ = self._run(variables, x, train)
        return logits, batch_stats

    def sizes(self, variables: dict, x: Array) -> Array:
        """Root mean square of what enters each block, and of what comes out of the last: [blocks + 1]."""
        return self._run(variables, x, True)[2]

    def _run(self, variables: dict, x: Array, train: bool) -> tuple[Array, dict, Array]:
        params, stats = variables["params"], variables["batch_stats"]["norms"]
        arm = variables["batch_stats"]["arm"]

        def placed(switch: Array, params: dict, stats: dict, x: Array) -> tuple[Array, dict]:
            y, moved = self.norm.apply({"params": params["norm"], "batch_stats": stats}, x, train=train)
            return jnp.where(switch > 0, y, x), moved

        def after_relu(switch: Array, params: dict, stats: dict, x: Array) -> tuple[Array, dict]:
            x, moved = placed(switch, params, stats, x)
            return jax.nn.relu(x) @ params["kernel"] + params["bias"][None], moved

        def block(x: Array, layers: tuple[dict, dict]) -> tuple[Array, tuple[dict, Array]]:
            below, above = (jax.tree.map(lambda leaf, n=n: leaf[n], layers) for n in (0, 1))
            y, moved_below = after_relu(arm["inner"], *below, x)
            y, moved_above = after_relu(arm["inner"], *above, y)
            moved = jax.tree.map(lambda *leaves: jnp.stack(leaves), moved_below, moved_above)
            return x + arm["branch"] * y, (moved, size(x))

        x = shrink(x) @ params["first"]["kernel"] + params["first"]["bias"][None]
        x, first = placed(arm["first"], params["first"], stats["first"], x)
        x, (inner, sizes) = jax.lax.scan(block, x, (params["inner"], stats["inner"]))
        logits, last = after_relu(arm["last"], params["last"], stats["last"], x)
        moved = {"norms": {"first": first, "inner": inner, "last": last}, "arm": arm}
        return logits, moved, jnp.append(sizes, size(x))


def size(x: Array) -> Array:
    """Root mean square."""
    return jnp.sqrt(jnp.mean(x**2))
