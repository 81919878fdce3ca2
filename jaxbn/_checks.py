"""Refusals: what does not fit raises at trace time, with what came in and what to do."""

import math
import numbers
from collections.abc import Sequence

import jax
import numpy as np

from jaxbn._affine import Shapes
from jaxbn._axis_group import AxisGroup
from jaxbn._inputs import size_of


class SingleValueError(ValueError):
    """Training on one value per feature: the variance is 0, and y the bias whatever x is."""


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
            if np.shape(held[name]) != shape:
                raise ValueError(
                    f"{name} has shape {np.shape(held[name])} but x of shape {x.shape} wants {shape} with"
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


def checked_epsilon(epsilon: float) -> float:
    """Epsilon as a float; ValueError unless finite and not negative."""
    if not (epsilon >= 0 and math.isfinite(epsilon)):
        raise ValueError(f"epsilon={epsilon}; expected a finite number of at least 0, such as 1e-5.")
    return float(epsilon)


def check_features(name, value, x, axes):
    if value is None:
        return
    features = tuple(size for axis, size in enumerate(x.shape) if axis not in axes)
    shape = np.shape(value)
    if len(shape) != len(features) or any(a not in (1, b) for a, b in zip(shape, features, strict=True)):
        raise ValueError(
            f"{name} has shape {shape}; x of shape {x.shape} reduced over axes {axes} has features of shape {features}."
        )


def check_residual(residual, x):
    if residual is not None and np.shape(residual) != x.shape:
        raise ValueError(f"residual has shape {np.shape(residual)}; expected x's shape {x.shape}.")
