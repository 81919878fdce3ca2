"""What the norms of each example share: parameters, no running statistics, and both modes alike."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxbn._affine import Initializer
from jaxbn._checks import checked
from jaxbn._inputs import along, combined_weights, feature_shape, inexact
from jaxbn._normalizer import Normalizer
from jaxbn._padding import silenced

Params = dict[str, jax.Array]
Compute = Callable[[jax.Array, Params, jax.Array | None, jax.Array | None], jax.Array]


def each_example_norm(
    compute: Compute,
    params: Mapping[str, Initializer | None],
    *,
    feature_axis: int | Sequence[int],
    param_dtype: jax.typing.DTypeLike,
    check: Callable[[Any], object],
) -> Normalizer:
    """A normalizer without running statistics.

    Args:
      compute: compute(x, params, weights, residual) -> y. The params have ones for the other axes, so that they
        broadcast to x; weights are as `combined_weights` makes them; a residual holds no NaN where nothing counts.
      params: how each parameter starts, initializer(key, shape, dtype); None leaves it out.
      feature_axis: the axis or axes along which the parameters run.
      param_dtype: of the parameters.
      check: called with what init gets as x; raises where it does not fit.
    """
    starts = {name: start for name, start in params.items() if start is not None}

    def init(key, x):
        check(x)
        shape = feature_shape(x, feature_axis)
        keys = dict(zip(params, jax.random.split(key, len(params)), strict=True))
        made = {name: start(keys[name], shape, param_dtype) for name, start in starts.items()}
        return {"params": made, "batch_stats": {}}

    def apply(variables, x, *, train, where=None, weights=None, rng=None, residual=None):
        del rng
        x = inexact(x)
        shapes = dict.fromkeys(starts, feature_shape(x, feature_axis))
        held, batch_stats = checked(variables, x, train, feature_axis, shapes, {})
        held = {name: along(value, x.ndim, feature_axis) for name, value in held.items()}
        weights = combined_weights(x, where, weights)
        return compute(x, held, weights, silenced(residual, weights)), batch_stats

    return Normalizer(init, apply)
