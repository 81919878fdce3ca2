"""Normalization in float64, the exact answer with which laws and tests compare; written for exactness, not speed.

Over each set of values, with weights w and W = sum w (JAX's convention for the gradient of complex values):

    mean = sum(w x) / W     c = x - mean     var = sum(w |c|^2) / W     r = 1 / sqrt(var + epsilon)     xhat = r c
    y = scale xhat + bias   and for a cotangent dy, with g = scale dy:
    dx = r g - (w / W) r sum(g) - (w / W) r Re(sum(g xhat)) conj(xhat)    dscale = sum(dy xhat)    dbias = sum(dy)
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxbn.testing._scope import Scope

Axis = int | Sequence[int]


class Standardized(NamedTuple):
    """Sets of values in float64: values, xhat and share [values, sets]; mean, var, rstd [sets].

    `share` is the weight of a value over the total weight of its set.
    """

    values: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    rstd: np.ndarray
    xhat: np.ndarray
    share: np.ndarray


def _sum(values: np.ndarray, axis: Axis) -> np.ndarray:
    return np.sum(values, axis=axis if isinstance(axis, int) else tuple(axis), keepdims=True)


def centred(x: np.ndarray, axis: Axis, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, deviations and shares, by two passes and the mean of what the first pass left.

    Args:
      x: float64 or complex128.
      axis: reduced; it stays in the mean with size 1.
      weights: of x's shape; None counts every value once. Of a set without weight all is zero but the deviations.

    Returns:
      The mean (with ones along `axis`), x - mean, and weights / sum(weights), of x's shape.
    """
    w = np.ones(x.shape) if weights is None else np.asarray(weights, np.float64)
    total = _sum(w, axis)
    share = w / np.where(total > 0, total, 1.0)
    first = _sum(share * x, axis)
    rest = _sum(share * (x - first), axis)
    return first + rest, x - first - rest, share


def gradient_terms(
    g: np.ndarray, xhat: np.ndarray, rstd: np.ndarray, share: np.ndarray, axis: Axis
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The three terms whose sum is dx, of xhat's shape: the direct one, and those through mean and variance.

    Args:
      g: scale dy, of xhat's shape.
      xhat: standardized values.
      rstd: 1 / sqrt(var + epsilon), with ones along `axis`.
      share: as `centred` returns it.
      axis: reduced.
    """
    correlation = _sum((g * xhat).real, axis)
    return rstd * g, -share * rstd * _sum(g, axis), -share * rstd * correlation * xhat.conj()


def moments(values: np.ndarray, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and biased variance of each column, [sets]."""
    mean, c, share = centred(np.asarray(values, np.float64), 0, weights)
    return mean[0], (share * c**2).sum(0)


def standardize(x: np.ndarray, scope: Scope, epsilon: float, weights: np.ndarray | None = None) -> Standardized:
    """Sort x [batch, ..., features] into sets and standardize them; of a set without any weight, var is NaN.

    Weights broadcast to x's shape.
    """
    values = scope.split(np.asarray(x, np.float64))
    if weights is not None:
        weights = scope.split(np.broadcast_to(np.asarray(weights, np.float64), np.shape(x)))
    mean, c, share = centred(values, 0, weights)
    var = np.where(share.sum(0) > 0, (share * c**2).sum(0), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        rstd = 1 / np.sqrt(var + epsilon)
        return Standardized(values, mean[0], var, rstd, c * rstd, share)


def normalize(x: np.ndarray, scope: Scope, epsilon: float, weights: np.ndarray | None = None) -> np.ndarray:
    """Standardize x and return it in its own shape."""
    return scope.join(standardize(x, scope, epsilon, weights).xhat, np.shape(x))


def gradient(
    x: np.ndarray, g: np.ndarray, scope: Scope, epsilon: float, weights: np.ndarray | None = None
) -> np.ndarray:
    """The gradient with respect to x, of x's shape, for g = scale dy."""
    s = standardize(x, scope, epsilon, weights)
    through, mean, var = gradient_terms(scope.split(np.asarray(g, np.float64)), s.xhat, s.rstd, s.share, 0)
    return scope.join(through + mean + var, np.shape(x))
