"""Tolerances, derived: what rounding may cost a careful float32 program, and no more.

Notation: u is the unit roundoff (2^-24 for float32), n the number of values in a set, peak the largest of their
magnitudes, r = 1 / sqrt(var + epsilon). In any order of summation (Higham 2002, section 4.2), to first order:

- the mean is off by at most n u peak, which moves xhat by n u peak r;
- the variance, by either textbook formula, is off by at most 2 (n + 2) u peak^2: xhat by (n + 2) u peak^2 r^2 |xhat|;
- subtracting, the root, the division and the product add 6 u |xhat| + u peak r.

Since peak r <= (1 + peak^2 r^2) / 2, all of it is below `slack` (1 + |xhat|) with slack = (n + 8) u (1 + peak^2 r^2).
First order is not enough where slack is large (a constant far from zero): there the bound is infinite, and only the
laws made for such inputs can fail.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxbn.testing import _oracle as oracle
from jaxbn.testing._scope import Scope

FLOAT32 = 2.0**-24
# Beyond this the second order of rounding is no longer small beside the first.
_FIRST_ORDER = 1 / 8


def roundoff(dtype: Any) -> float:
    """Unit roundoff: half the distance from 1 to the next number."""
    return float(jnp.finfo(dtype).eps) / 2


def slack(s: oracle.Standardized, *, u: float = FLOAT32) -> np.ndarray:
    """(n + 8) u (1 + (peak r)^2), [sets]; infinite where rounding is out of first order."""
    peak = np.abs(s.values).max(0)
    with np.errstate(invalid="ignore", over="ignore"):
        size = (len(s.values) + 8) * u * (1 + (peak * s.rstd) ** 2)
    return np.where(size < _FIRST_ORDER, size, np.inf)


def output(x: np.ndarray, scope: Scope, epsilon: float, weights: np.ndarray | None = None) -> np.ndarray:
    """How far a normalized output may lie from the exact one: slack (1 + |xhat|), of x's shape."""
    s = oracle.standardize(x, scope, epsilon, weights)
    with np.errstate(invalid="ignore"):
        return scope.join(_known(slack(s) * (1 + np.abs(s.xhat))), np.shape(x))


def gradient(
    x: np.ndarray, g: np.ndarray, scope: Scope, epsilon: float, weights: np.ndarray | None = None
) -> np.ndarray:
    """How far dx may lie from the exact one, of x's shape.

    With D = max |g| and X = max |xhat| of a set the three terms of dx are at most r D, r D and r D X^2. Each is off by
    slack of itself for its factor r and for its sum, and the third by 2 X (1 + X) slack for xhat: together less than
    8 slack r D (1 + X^2).
    """
    s = oracle.standardize(x, scope, epsilon, weights)
    size = np.abs(scope.split(np.asarray(g, np.float64))).max(0)
    with np.errstate(invalid="ignore"):
        bound = _known(8 * slack(s) * s.rstd * size * (1 + np.abs(s.xhat).max(0) ** 2))
    return scope.join(np.broadcast_to(bound, s.values.shape), np.shape(x))


def epsilon_effect(s: oracle.Standardized, epsilon: float, factor: float) -> np.ndarray:
    """How far |xhat| moves at most when x grows by factor: |1 - 1/factor^2| epsilon |c| / (2 var std), [values, sets].

    xhat = (c / std) / sqrt(1 + epsilon / var), and 1 / sqrt(1 + t) falls by at most t / 2.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        share = epsilon / s.var
        effect = abs(1 - factor**-2) / 2 * share * np.abs(s.values - s.mean) / np.sqrt(s.var)
    return np.where(s.var > 0, effect, 0)


def affine(values: np.ndarray, mean: np.ndarray, rstd: np.ndarray) -> np.ndarray:
    """What evaluating (values - mean) rstd, or values rstd - mean rstd, may cost: 16 u rstd (|values| + |mean|)."""
    return 16 * FLOAT32 * rstd * (np.abs(values) + np.abs(mean))


def _known(bound: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(bound), np.inf, bound)
