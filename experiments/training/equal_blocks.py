"""Deep convolutional networks of equal blocks, plain or residual, with batch norm or without: one program for all arms.

Depth is all in which two of these networks differ: the blocks of both have the same shape. A `lax.scan` goes over the
blocks, and another over the two layers of a block, so that 110 layers compile as fast as 20. Every norm is computed,
and taken where the arm says so; a norm that is switched off gets no gradient.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

import jaxbn
from experiments.training import models
from experiments.training.loop import softmax_loss
from experiments.training.residual_mlp import size
from experiments.training.resnet import patch_convolve

SWITCHES = ("normalize", "shortcut", "learned")  # numbers of an arm that the network computes with


def blocks_of(layers: int) -> int:
    """How many blocks of two convolutions stand between the first and the last of so many layers."""
    blocks, rest = divmod(layers - 2, 2)
    if rest or blocks < 1:
        raise ValueError(f"layers={layers}; expected an even number from 4 on, such as 20, 56 or 110.")
    return blocks


class Flow(NamedTuple):
    """Root mean squares in every block, each [blocks]."""

    entering: Array  # what enters the block, and what its shortcut carries
    branch: Array  # what the block's convolutions make of it, times alpha
    gradient: Array  # of the loss by what enters the block


class EqualBlocks(NamedTuple):
    """Means of 2 x 2 pixels, a convolution of stride 2, equal blocks, `relu(n(x))`, the mean over positions, dense.

    A block is `shortcut * x + branch`, with `branch = alpha * conv(relu(n(conv(relu(n(x))))))`; n is batch norm, or a
    bias alone. A run says by numbers whether it has "normalize" and "shortcut" (1 or 0), with which "alpha" it starts,
    and whether alpha is "learned". They lie among the batch statistics, since `apply` is given nothing else of a run.

    Attributes:
      norm: without a bias.
      layers: even, 4 at least.
      width: channels of every block.
      classes: of the output.
    """

    norm: jaxbn.Normalizer
    layers: int
    width: int
    classes: int = 10

    def init(self, run: dict, key: Array, x: Array) -> dict:
        """Variables, with kernels after He et al. 2015 that are the same for all arms; x: [batch, ...]."""
        blocks, channels = blocks_of(self.layers), x.shape[-1]
        inner = (3, 3, self.width, self.width)
        shapes = [(3, 3, channels, self.width), (blocks, 2, *inner), (self.width, self.classes)]
        weights = models.Weights(jax.random.normal, lambda shape: math.sqrt(2 / math.prod(shape[-4:-1])))
        first, hidden, head = models.cut(weights, key, shapes)
        of_norm = self.norm.init(key, jax.ShapeDtypeStruct((2, self.width), jnp.float32))
        place = {"norm": of_norm["params"], "bias": jnp.zeros(self.width)}

        def in_blocks(tree: dict) -> dict:
            return jax.tree.map(lambda leaf: jnp.tile(leaf, (blocks, 2, 1)), tree)

        inside = {"kernel": hidden, "place": in_blocks(place), "alpha": jnp.full(blocks, run["alpha"])}
        params = {
            "first": first,
            "blocks": inside,
            "last": {"place": place, "kernel": head, "bias": jnp.zeros(self.classes)},
        }
        # Copies, since a training step consumes the state that it is given.
        arm = {name: jnp.array(run[name], jnp.float32) for name in SWITCHES}
        stats = {"blocks": in_blocks(of_norm["batch_stats"]), "last": of_norm["batch_stats"]}
        return {"params": params, "batch_stats": stats | {"arm": arm}}

    def apply(self, variables: dict, x: Array, *, train: bool) -> tuple[Array, dict]:
        """Logits and the moved statistics; x: [batch, height, width, channels], of even sides."""
        logits, batch_stats, _ = self._run(variables, x, train, jnp.zeros((blocks_of(self.layers), 1, 1, 1, 1)))
        return logits, batch_stats

    def flow(self, variables: dict, x: Array, labels: Array) -> Flow:
        """What goes up and what comes down through the blocks in training mode."""
        stream = jax.eval_shape(lambda: self._stem(variables["params"]["first"], x))

        def loss(probes: Array) -> tuple[Array, tuple[Array, Array]]:
            logits, _, sizes = self._run(variables, x, True, probes)
            return softmax_loss(logits, labels), sizes

        probes = jnp.zeros((blocks_of(self.layers), *stream.shape))
        gradient, sizes = jax.grad(loss, has_aux=True)(probes)
        return Flow(*sizes, jax.vmap(size)(gradient))

    def _stem(self, kernel: Array, x: Array) -> Array:
        return patch_convolve(models.pool2x2(x), kernel, 2)

    def _run(self, variables: dict, x: Array, train: bool, probes: Array) -> tuple[Array, dict, tuple[Array, Array]]:
        params, stats = variables["params"], variables["batch_stats"]
        arm = stats["arm"]

        def placed(place: dict, stats: dict, x: Array) -> tuple[Array, dict]:
            y, moved = self.norm.apply({"params": place["norm"], "batch_stats": stats}, x, train=train)
            return jax.nn.relu(jnp.where(arm["normalize"] > 0, y, x) + place["bias"][None, None, None]), moved

        def layer(x: Array, own: tuple[dict, dict, Array]) -> tuple[Array, dict]:
            place, stats, kernel = own
            x, moved = placed(place, stats, x)
            return convolve(x, kernel), moved

        def block(x: Array, own: tuple[dict, dict, Array]) -> tuple[Array, tuple[dict, tuple[Array, Array]]]:
            params, stats, probe = own
            x = x + probe
            y, moved = jax.lax.scan(layer, x, (params["place"], stats, params["kernel"]))
            alpha = jnp.where(arm["learned"] > 0, params["alpha"], jax.lax.stop_gradient(params["alpha"]))
            y = alpha * y
            return arm["shortcut"] * x + y, (moved, (size(x), size(y)))

        x = self._stem(params["first"], x)
        x, (inside, sizes) = jax.lax.scan(block, x, (params["blocks"], stats["blocks"], probes))
        x, last = placed(params["last"]["place"], stats["last"], x)
        logits = x.mean((1, 2)) @ params["last"]["kernel"] + params["last"]["bias"][None]
        return logits, {"blocks": inside, "last": last, "arm": arm}, sizes


@jax.checkpoint
def convolve(x: Array, kernel: Array) -> Array:
    """A 3 x 3 convolution of stride 1; the neighbourhoods, nine times as large as x, are not kept for the gradient."""
    return patch_convolve(x, kernel, 1)
