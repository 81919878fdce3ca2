"""Normalization in float64, with which the laws compare: written for exactness, not for speed.

Over each set of values, with weights w and W = sum w:

    mean = sum(w x) / W     c = x - mean     var = sum(w c^2) / W     r = 1 / sqrt(var + epsilon)
    y = scale r c + bias    and for a cotangent dy, with g = scale dy:
    dx = r (g - (w / W) sum(g) - (w / W) r c sum(g r c))    dscale = sum(dy r c)    dbias = sum(dy)
"""

from typing import NamedTuple

import numpy as np

from jaxbn.testing.scope import Scope


class Standardized(NamedTuple):
    """Sets of values in float64: values and xhat [values, sets]; mean, var, rstd [sets]."""

    values: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    rstd: np.ndarray
    xhat: np.ndarray


def moments(values: np.ndarray, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and biased variance of each column, [sets]; two passes and what rounding the first mean lost."""
    values = np.asarray(values, np.float64)
    share = np.full_like(values, 1 / len(values)) if weights is None else weights / weights.sum(0)
    first = (share * values).sum(0)
    rest = (share * (values - first)).sum(0)
    mean = first + rest
    return mean, (share * (values - first - rest) ** 2).sum(0)


def standardize(x: np.ndarray, scope: Scope, epsilon: float, weights: np.ndarray | None = None) -> Standardized:
    """X [batch, ..., features], and weights of its shape, as standardized sets."""
    values = scope.split(np.asarray(x, np.float64))
    mean, var = moments(values, None if weights is None else scope.split(np.asarray(weights, np.float64)))
    with np.errstate(divide="ignore", invalid="ignore"):
        rstd = 1 / np.sqrt(var + epsilon)
        return Standardized(values, mean, var, rstd, (values - mean) * rstd)


def normalize(x: np.ndarray, scope: Scope, epsilon: float, weights: np.ndarray | None = None) -> np.ndarray:
    """X standardized, of x's shape."""
    return scope.join(standardize(x, scope, epsilon, weights).xhat, np.shape(x))


def gradient_terms(x: np.ndarray, g: np.ndarray, scope: Scope, epsilon: float) -> tuple[np.ndarray, ...]:
    """The three terms whose sum is dx, each [values, sets], for g = scale dy of x's shape."""
    s = standardize(x, scope, epsilon)
    g = scope.split(np.asarray(g, np.float64))
    through_mean = np.broadcast_to(-s.rstd * g.mean(0), g.shape)
    return s.rstd * g, through_mean, -s.rstd * s.xhat * (g * s.xhat).mean(0)


def gradient(x: np.ndarray, g: np.ndarray, scope: Scope, epsilon: float) -> np.ndarray:
    """Dx of x's shape, for g = scale dy."""
    return scope.join(sum(gradient_terms(x, g, scope, epsilon)), np.shape(x))
