"""Batch normalization along a sequence: statistics of their own for each time step."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._affine import Initializer
from jaxbn._batch_norm import batch_norm
from jaxbn._factory import normalizer_factory
from jaxbn._normalizer import Normalizer

_TENTH = jax.nn.initializers.constant(0.1)


@normalizer_factory(options_of=batch_norm)
def recurrent_batch_norm(max_length: int, *, scale_init: Initializer = _TENTH, **options: Any) -> Normalizer:
    """Batch norm for recurrent networks (Cooijmans et al. 2016, section 3): statistics per time step.

    `apply` takes `step`, the time step that x belongs to, an int or an int scalar array: batch norm with the running
    statistics of that step. At test time, steps beyond the longest sequence seen in training use those of the last step
    that was seen. In training, steps from `max_length` on share the last row of statistics. Padding is left out by
    `where`, boolean [batch, 1] for x of [batch, features].

    Args:
      max_length: time steps to keep statistics for.
      scale_init: 0.1, the paper's: unit variance would saturate tanh and let the gradient vanish (section 4).
      **options: of `batch_norm`.

    Returns:
      A Normalizer with params {"scale", "bias"} of shape [features], shared by all steps, and batch_stats {"mean",
      "var"} of shape [max_length, features] and "length", int32 []: steps that have been seen.

    Raises:
      ValueError: max_length below 1; as `batch_norm`; and from apply, no step.
    """
    if max_length < 1:
        raise ValueError(f"max_length={max_length}; expected at least 1 time step.")
    norm = batch_norm(scale_init=scale_init, **options)

    def init(key, x):
        variables = norm.init(key, x)
        rows = jax.tree.map(lambda v: jnp.broadcast_to(v, (max_length, *v.shape)), variables["batch_stats"])
        return {"params": variables["params"], "batch_stats": rows | {"length": jnp.zeros((), jnp.int32)}}

    def apply(variables, x, *, train, step=None, where=None, weights=None, rng=None, residual=None):
        if step is None or jnp.ndim(step) or not jnp.issubdtype(jnp.result_type(step), jnp.integer):
            raise ValueError(f"step={step!r}; recurrent_batch_norm needs step=, the time step as an integer scalar.")
        batch_stats = dict(variables["batch_stats"])
        length = batch_stats.pop("length")
        # In a record the length has an axis more.
        row = jnp.clip(step, 0, max_length - 1 if train else jnp.maximum(jnp.ravel(length)[0], 1) - 1)
        here = {"params": variables.get("params", {}), "batch_stats": {n: v[row] for n, v in batch_stats.items()}}
        arguments = dict(where=where, weights=weights, rng=rng, residual=residual)
        y, moved = norm.apply(here, x, train=train, **arguments)
        if not train:
            return y, variables["batch_stats"]
        # A step that moved nothing saw padding only, or was refused: it does not count as seen.
        seen = _differ(moved, here["batch_stats"])
        rows = {name: v.at[row].set(moved[name]) for name, v in lax.stop_gradient(batch_stats).items()}
        return y, rows | {"length": jnp.where(seen, jnp.maximum(length, row + 1), length).astype(length.dtype)}

    return Normalizer(init, apply)


def _differ(a, b):
    return jnp.any(jnp.stack([jnp.any(x != y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]))
