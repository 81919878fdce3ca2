"""Batch normalization along a sequence: statistics of their own for each time step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._affine import Initializer
from jaxbn._batch_norm import batch_norm
from jaxbn._factory import normalizer_factory
from jaxbn._normalizer import Normalizer
from jaxbn._record import is_recorded, running_part

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
      ValueError: max_length below 1; as `batch_norm`; and from apply, no step, or batch_stats made for
        another max_length.
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
        batch_stats = dict(_checked(variables))
        length = batch_stats.pop("length")
        row = jnp.clip(step, 0, max_length - 1 if train else jnp.maximum(running_part(length), 1) - 1)
        here = {"params": variables.get("params", {}), "batch_stats": jax.tree.map(lambda v: v[row], batch_stats)}
        arguments = dict(where=where, weights=weights, rng=rng, residual=residual)
        y, moved = norm.apply(here, x, train=train, **arguments)
        if not train:
            return y, variables["batch_stats"]
        # A step that moved nothing saw padding only, or was refused: it does not count as seen.
        seen = _differ(moved, here["batch_stats"])
        rows = jax.tree.map(lambda v, new: v.at[row].set(new), lax.stop_gradient(batch_stats), moved)
        return y, rows | {"length": _lengthened(length, jnp.where(seen, row + 1, 0))}

    def _checked(variables):
        """The batch_stats, after checking that they hold a row for each time step."""
        batch_stats = variables.get("batch_stats", {})
        shapes = {name: jnp.shape(value) for name, value in running_part(dict(batch_stats)).items()}
        length = shapes.pop("length", None)
        if length != () or any(shape[:1] != (max_length,) for shape in shapes.values()):
            raise ValueError(
                f"batch_stats has shapes {shapes} and {'no' if length is None else 'a'} 'length'; recurrent_batch_norm("
                f"max_length={max_length}) wants {max_length} rows in each and 'length': what init made with these"
                " arguments."
            )
        return batch_stats

    return Normalizer(init, apply)


def _lengthened(length, seen):
    """The number of steps seen so far; in a record what becomes of it."""
    if is_recorded(length):
        return dataclasses.replace(length, moved=_lengthened(length.moved, seen))
    return jnp.maximum(length, seen).astype(length.dtype)


def _differ(a, b):
    return jnp.any(jnp.stack([jnp.any(x != y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]))
