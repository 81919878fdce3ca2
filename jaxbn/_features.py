"""What every normalizer does with the features of x: find them, give them a scale and a bias, check them."""

import numbers
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._axis_group import AxisGroup
from jaxbn._moments import at_least_float32, canonical_axes, size_of

Initializer = Callable[..., jax.Array]
Activation = Callable[[jax.Array], jax.Array]
Shapes = dict[str, tuple[int, ...]]


class SingleValueError(ValueError):
    """Training on one value per feature: the variance is 0, and y the bias whatever x is."""


class Affine(NamedTuple):
    """How scale and bias start; a field that is None stands for a parameter that is not used.

    Attributes:
      scale_init: scale_init(key, shape, dtype).
      bias_init: bias_init(key, shape, dtype).
      dtype: of both.
    """

    scale_init: Initializer | None
    bias_init: Initializer | None
    dtype: jax.typing.DTypeLike = jnp.float32

    def init(self, key: jax.Array, shape: tuple[int, ...]) -> dict[str, jax.Array]:
        """Return {"scale", "bias"} of that shape, each where it is used."""
        starts = {"scale": self.scale_init, "bias": self.bias_init}
        keys = dict(zip(starts, jax.random.split(key), strict=True))
        return {name: starts[name](keys[name], shape, self.dtype) for name in self.shapes(shape)}

    def shapes(self, shape: tuple[int, ...]) -> Shapes:
        """Return the shape of each parameter in use."""
        starts = {"scale": self.scale_init, "bias": self.bias_init}
        return {name: shape for name, start in starts.items() if start is not None}


def affine_of(use_scale: bool, use_bias: bool, scale_init: Initializer, bias_init: Initializer, dtype) -> Affine:
    """Affine, from the arguments that every normalizer has."""
    return Affine(scale_init if use_scale else None, bias_init if use_bias else None, dtype)


def reduced_axes(ndim: int, kept: int | Sequence[int], name: str = "feature_axis") -> tuple[int, ...]:
    """All axes of an array of that rank but the kept ones."""
    return tuple(axis for axis in range(ndim) if axis not in canonical_axes(kept, ndim, name))


def feature_shape(x: jax.Array, feature_axis: int | Sequence[int]) -> tuple[int, ...]:
    """Sizes of x, or of a ShapeDtypeStruct, along the feature axes."""
    return tuple(x.shape[axis] for axis in canonical_axes(feature_axis, len(x.shape), "feature_axis"))


def along(v: jax.Array | None, ndim: int, feature_axis: int | Sequence[int]) -> jax.Array | None:
    """A vector over the features with ones for the other axes, so that it broadcasts to x; None stays."""
    return None if v is None else jnp.expand_dims(v, reduced_axes(ndim, feature_axis))


def stats_dtype(x: jax.Array) -> jnp.dtype:
    """Of running statistics: float32 at least, wide enough for x."""
    return jnp.promote_types(x.dtype, jnp.float32)


@partial(jax.checkpoint, prevent_cse=False, static_argnums=(4, 5))
def scale_shift(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    residual: jax.Array | None,
    activation: Activation | None,
    dtype: jnp.dtype,
) -> jax.Array:
    """activation(scale * x + bias + residual) in float32 at least, rounded once; the backward pass keeps the arguments.

    Args:
      x: the standardized array.
      scale: broadcastable to x with as many axes; None is 1.
      bias: as scale; None is 0.
      residual: of x's shape; None is 0.
      activation: elementwise; None is the identity.
      dtype: of the result.
    """
    y = at_least_float32(x)
    y = y if scale is None else scale * y
    y = y if bias is None else y + bias
    y = y if residual is None else y + at_least_float32(residual)
    return (y if activation is None else activation(y)).astype(dtype)


def checked(
    variables: dict,
    x: jax.Array,
    train: bool,
    feature_axis: int | Sequence[int],
    params: Shapes,
    batch_stats: Shapes,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Return params and batch_stats of variables, after checking train, their names and their shapes.

    Args:
      variables: what apply was given.
      x: the array to be normalized.
      train: what apply was given.
      feature_axis: the axis or axes of x that params and batch_stats belong to.
      params: shape of each entry that params has to have.
      batch_stats: shape of each entry that batch_stats has to have.

    Raises:
      TypeError: train is not a bool.
      ValueError: batch_stats is missing, or an entry is missing, unexpected or of another shape.
    """
    if not isinstance(train, bool | np.bool_):
        raise TypeError(f"train={train!r}; expected True or False, known at trace time: mark it static under jit.")
    if "batch_stats" not in variables:
        raise ValueError(f"variables has {sorted(variables)}; expected what init returned: 'params' and 'batch_stats'.")
    found = variables.get("params", {}), variables["batch_stats"]
    for collection, held, expected in zip(("params", "batch_stats"), found, (params, batch_stats), strict=True):
        if set(held) != set(expected):
            raise ValueError(
                f"{collection} has {sorted(held)}; expected {sorted(expected)}: what init made with these arguments."
            )
        for name, shape in expected.items():
            if jnp.shape(held[name]) != shape:
                raise ValueError(
                    f"{name} has shape {jnp.shape(held[name])} but x of shape {x.shape} wants {shape} with"
                    f" feature_axis={feature_axis}; pass x of the shape that init saw, or init for this one."
                )
    return found


def check_several(
    x: jax.Array,
    axes: tuple[int, ...],
    axis_group: AxisGroup,
    remedy: str = "Normalize over more axes, or share statistics with axis_name.",
    group_size: int | None = None,
) -> None:
    """SingleValueError where each feature sees a single value, in groups of examples if so: y would be the bias."""
    values = size_of(x.shape, axes) if group_size is None else group_size * size_of(x.shape, axes[1:])
    if values * axis_group.size() == 1:
        groups = "" if group_size is None else f" in groups of {group_size}"
        raise SingleValueError(
            f"x of shape {x.shape} has one value per feature over axes {axes}{groups}: its variance is 0 and y the bias"
            f" whatever x is. {remedy}"
        )


def check_decay(decay: float | jax.Array | None) -> None:
    """ValueError unless decay is None, traced or a share."""
    if isinstance(decay, numbers.Real) and not 0 <= decay <= 1:
        raise ValueError(f"decay={decay}; expected 0 to 1, the share of the old statistics (1 - torch's momentum).")
