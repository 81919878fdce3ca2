"""The one type that every variant fits."""

from collections.abc import Callable
from typing import NamedTuple

import jax


class Normalizer(NamedTuple):
    """A normalization as two pure functions; hyperparameters are closed over, state is passed and returned.

    Attributes:
      init: init(key, x) -> {"params": {...}, "batch_stats": {...}}. x is an array or a `jax.ShapeDtypeStruct`: only its
        shape and dtype count.
      apply: apply(variables, x, *, train, where=None, weights=None, rng=None) -> (y, batch_stats). `train` is a Python
        bool: True normalizes by the batch and returns moved statistics, False normalizes by the running
        statistics and returns them as they came. Same structure, shapes and dtypes either way. Variants
        may take further keyword arguments, such as `residual`, `condition` or `step`.
    """

    init: Callable[..., dict]
    apply: Callable[..., tuple[jax.Array, dict]]


def identity(*, activation: Callable[[jax.Array], jax.Array] | None = None) -> Normalizer:
    """No normalization, no parameters, no statistics: y = activation(x + residual), the plain arm of a comparison."""

    def init(key, x):
        del key, x
        return {"params": {}, "batch_stats": {}}

    def apply(variables, x, *, train, where=None, weights=None, rng=None, residual=None):
        del train, where, weights, rng
        y = x if residual is None else x + residual
        y = y if activation is None else activation(y)
        return y, variables["batch_stats"]

    return Normalizer(init, apply)
