"""What users pass, brought into one form: arrays, axes, masks and weights."""

from collections.abc import Sequence
from typing import overload

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._arithmetic import at_least_float32


def inexact(x, name: str = "x") -> jax.Array:
    """X as an array; TypeError unless floating or complex."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"{name} has dtype {x.dtype}; expected a floating or complex array: cast it, as in x.astype(jnp.float32)."
        )
    return x


def canonical_axes(axis: int | Sequence[int] | None, ndim: int, name: str = "axis") -> tuple[int, ...]:
    """Axes as sorted non-negative ints; ValueError where one is out of range or named twice."""
    if axis is None:
        return tuple(range(ndim))
    axes = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    if any(not -ndim <= a < ndim for a in axes):
        raise ValueError(f"{name}={axis} is out of range for an array of rank {ndim}; expected {-ndim} to {ndim - 1}.")
    canonical = tuple(sorted(a % ndim for a in axes))
    if len(set(canonical)) < len(canonical):
        raise ValueError(f"{name}={axis} names an axis of an array of rank {ndim} twice; name each axis once.")
    return canonical


def reduced_axes(ndim: int, kept: int | Sequence[int], name: str = "feature_axis") -> tuple[int, ...]:
    """All axes of an array of that rank but the kept ones."""
    return tuple(axis for axis in range(ndim) if axis not in canonical_axes(kept, ndim, name))


def feature_shape(x: jax.Array, feature_axis: int | Sequence[int]) -> tuple[int, ...]:
    """Sizes of x, or of a ShapeDtypeStruct, along the feature axes."""
    return tuple(x.shape[axis] for axis in canonical_axes(feature_axis, len(x.shape), "feature_axis"))


def size_of(shape: Sequence[int], axes: Sequence[int]) -> int:
    """Number of values over `axes` of an array of that shape."""
    size = 1
    for axis in axes:
        size *= shape[axis]
    return size


@overload
def along(v: jax.Array, ndim: int, feature_axis: int | Sequence[int]) -> jax.Array: ...


@overload
def along(v: None, ndim: int, feature_axis: int | Sequence[int]) -> None: ...


def along(v: jax.Array | None, ndim: int, feature_axis: int | Sequence[int]) -> jax.Array | None:
    """A vector over the features with ones for the other axes, so that it broadcasts to x; None stays."""
    return None if v is None else jnp.expand_dims(v, reduced_axes(ndim, feature_axis))


def stats_dtype(x: jax.Array) -> jnp.dtype:
    """Of running statistics: float32 at least, wide enough for x."""
    return jnp.promote_types(x.dtype, jnp.float32)


def combined_weights(x: jax.Array, where, weights) -> jax.Array | None:
    """`where` and `weights` as one real array of x's rank, 1 or x's length along each axis, or None."""
    if where is None and weights is None:
        return None
    real = at_least_float32(x).real.dtype
    parts = []
    if where is not None:
        where = jnp.asarray(where)
        if where.dtype != bool:
            raise TypeError(f"where has dtype {where.dtype}; expected booleans. Pass real weights as weights=.")
        parts.append(_of_rank(where, x, "where").astype(real))
    if weights is not None:
        weights = jnp.asarray(weights)
        if jnp.iscomplexobj(weights):
            raise TypeError(f"weights have dtype {weights.dtype}; expected real numbers.")
        parts.append(_of_rank(weights, x, "weights").astype(real))
    # Constants by contract: without this a gradient of zero would be recorded for them.
    return lax.stop_gradient(parts[0] if len(parts) == 1 else parts[0] * parts[1])


def _of_rank(w, x, name):
    shape = (1,) * (x.ndim - w.ndim) + w.shape
    if w.ndim > x.ndim or any(a not in (1, b) for a, b in zip(shape, x.shape, strict=True)):
        raise ValueError(
            f"{name} of shape {w.shape} does not broadcast to x of shape {x.shape}; for one entry an example along the"
            f" first axis give it shape {(x.shape[0] if x.ndim else 1, *(1,) * (x.ndim - 1))}."
        )
    return w.reshape(shape)
