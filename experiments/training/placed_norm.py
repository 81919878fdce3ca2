"""A multilayer perceptron with switches for where batch norm stands: all placements train in one compiled program.

At every place the network computes both, with the norm and without, and takes what the switch says. A norm that is
switched off gets no gradient and changes nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

import jaxbn
from experiments.training import models


class Switches(NamedTuple):
    """Numbers of a run: 1 is on, 0 is off.

    Attributes:
      sigmoid: whether the activation is the sigmoid, else ReLU: [].
      x: whether the input X of each hidden layer and of the output layer is normalized: [layers + 1].
      xw: whether XW + b of each hidden layer is, before its activation: [layers].
    """

    sigmoid: Array
    x: Array
    xw: Array


class Seen(NamedTuple):
    """What every hidden layer but the first is given and makes of it, before any norm: [layers - 1, batch, width]."""

    x: Array
    xw: Array


class PlacedNorm(NamedTuple):
    """An MLP with `layers` hidden layers of `width` units, at least two.

    The switches lie among the batch statistics, since `apply` is given nothing else of a run. All layers have a bias;
    that of a layer whose XW + b is normalized has no effect and no gradient.
    """

    norm: jaxbn.Normalizer
    layers: int
    width: int
    classes: int = 10

    def init(self, switches: Switches, key: Array, x: Array) -> dict:
        """Variables, with Glorot-uniform kernels that are the same for all switches; x: [batch, ...]."""
        hidden = (self.width, self.width)
        shapes = [(x[0].size, self.width), *[hidden] * (self.layers - 1), (self.width, self.classes)]
        first, *rest, head = [self._init_layer(k) for k in models.cut(models.glorot_weights(), key, shapes)]
        # The hidden layers but the first are stacked and scanned over: they compile once.
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rest)
        layers = {"first": first, "rest": stacked, "head": head}
        params, stats = ({name: layer[part] for name, layer in layers.items()} for part in (0, 1))
        return {"params": params, "batch_stats": {"norms": stats, "switches": switches}}

    def apply(self, variables: dict, x: Array, *, train: bool) -> tuple[Array, dict]:
        """Logits and the moved statistics; x: [batch, ...]."""
        logits, batch_stats, _ = self._run(variables, x, train)
        return logits, batch_stats

    def seen(self, variables: dict, x: Array) -> Seen:
        """X and XW + b of the hidden layers, with the statistics of this batch; x: [batch, ...]."""
        return self._run(variables, x, True)[2]

    def _init_layer(self, kernel: Array) -> tuple[dict, dict]:
        features = [jax.ShapeDtypeStruct((2, size), kernel.dtype) for size in kernel.shape]
        at_x, at_xw = (self.norm.init(jax.random.key(0), like) for like in features)
        params = {"kernel": kernel, "bias": jnp.zeros(kernel.shape[1]), "x": at_x["params"], "xw": at_xw["params"]}
        return params, {"x": at_x["batch_stats"], "xw": at_xw["batch_stats"]}

    def _run(self, variables: dict, x: Array, train: bool) -> tuple[Array, dict, Seen]:
        params, stats = variables["params"], variables["batch_stats"]["norms"]
        switches = variables["batch_stats"]["switches"]

        def placed(switch: Array, params: dict, stats: dict, x: Array) -> tuple[Array, dict]:
            y, moved = self.norm.apply({"params": params, "batch_stats": stats}, x, train=train)
            return jnp.where(switch > 0, y, x), moved

        def linear(x: Array, params: dict, stats: dict, switch: Array) -> tuple[Array, dict]:
            x, moved = placed(switch, params["x"], stats["x"], x)
            return x @ params["kernel"] + params["bias"][None], moved

        def hidden(x: Array, layer: tuple) -> tuple[Array, tuple[dict, Seen]]:
            params, stats, at_x, at_xw = layer
            h, moved_x = linear(x, params, stats, at_x)
            y, moved_xw = placed(at_xw, params["xw"], stats["xw"], h)
            y = jnp.where(switches.sigmoid > 0, jax.nn.sigmoid(y), jax.nn.relu(y))
            return y, ({"x": moved_x, "xw": moved_xw}, Seen(x, h))

        x = x.reshape(len(x), -1)
        x, (first, _) = hidden(x, (params["first"], stats["first"], switches.x[0], switches.xw[0]))
        x, (rest, seen) = jax.lax.scan(hidden, x, (params["rest"], stats["rest"], switches.x[1:-1], switches.xw[1:]))
        logits, at_head = linear(x, params["head"], stats["head"], switches.x[-1])
        moved = {"first": first, "rest": rest, "head": {**stats["head"], "x": at_head}}
        return logits, {"norms": moved, "switches": switches}, seen
