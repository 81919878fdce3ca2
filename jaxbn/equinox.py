"""Any Normalizer as a stateful layer of Equinox; needs the package: `pip install "jaxbn[equinox]"`."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._module_norm import moves_statistics
from jaxbn._normalizer import Normalizer


class Norm(eqx.nn.StatefulLayer):
    """A Normalizer as Equinox has its layers: for one example, features first, under `vmap`, its statistics in `State`.

        norm = jaxbn.batch_norm(axis_name="batch", feature_axis=0)
        layer, state = eqx.nn.make_with_state(jaxbn.equinox.Norm)(norm, 8)
        forward = jax.vmap(layer, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
        y, state = forward(x, state)                                    # x: [examples, 8, ...]
        y, state = jax.vmap(eqx.nn.inference_mode(layer), ...)(x, state)

    What the normalizer sees is one example, of which the named axis makes a batch: give it axis_name, and the
    feature_axis of one example, 0 for [features, height, width]. A layer of `eqx.nn.Sequential` as any other. Under
    `filter_grad` the params are inexact arrays of the layer, and the state is not among them.

    Attributes:
      norm: the Normalizer.
      params: its params.
      index: where its batch_stats stand in the state.
      inference: normalize by the running statistics, and leave them alone; `eqx.nn.inference_mode` sets it.
    """

    norm: Normalizer = eqx.field(static=True)
    params: dict[str, Any]
    index: eqx.nn.StateIndex
    inference: bool

    def __init__(
        self,
        norm: Normalizer,
        x: jax.Array | jax.ShapeDtypeStruct | int,
        *,
        inference: bool = False,
        key: jax.Array | None = None,
    ):
        """Make params and initial statistics.

        Args:
          norm: the Normalizer.
          x: one example: an array or a `jax.ShapeDtypeStruct`, of which only shape and dtype count; or the number of
            features, which stands for float32 of shape [features].
          inference: as the attribute.
          key: random key for initial params that are drawn; scales and biases of norms hardly ever are.
        """
        shape, dtype = ((x,), jnp.float32) if isinstance(x, int | np.integer) else (x.shape, x.dtype)
        variables = norm.init(jax.random.key(0) if key is None else key, jax.ShapeDtypeStruct(shape, dtype))
        self.norm = norm
        self.params = variables["params"]
        self.index = eqx.nn.StateIndex(variables["batch_stats"])
        self.inference = inference

    def __call__(
        self,
        x: jax.Array,
        state: eqx.nn.State,
        *,
        key: jax.Array | None = None,
        inference: bool | None = None,
        **arguments: Any,
    ) -> tuple[jax.Array, eqx.nn.State]:
        """Normalize one example, moving its part of the state unless inference.

        Args:
          x: one example, of the shape that the layer was made for.
          state: of the model.
          key: random key for normalizers that draw, handed on as `rng`.
          inference: for this call, in place of the attribute.
          **arguments: for the normalizer's apply: where, weights, residual, condition, step, ...

        Returns:
          y of x's shape, and the state.

        Raises:
          ValueError: what the normalizer raises: in training, where its axis is not bound, or where it has none and
            sees one value per feature.
        """
        inference = self.inference if inference is None else inference
        variables = {"params": self.params, "batch_stats": state.get(self.index)}
        y, batch_stats = self.norm.apply(variables, x, train=not inference, rng=key, **arguments)
        return y, state.set(self.index, batch_stats) if moves_statistics(inference, arguments) else state
