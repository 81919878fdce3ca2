"""Inputs on which the usual ways to compute a mean and a variance in float32 fail, each with what it attacks."""

import numpy as np

ROWS, FEATURES = 1024, 4
# 3 to 5 surround the ratio at which squaring without a shift starts to lose more than the bound.
RATIOS = (0, 1, 3, 4, 5, 10, 1e2, 1e3, 1e4, 1e5, 1e6)


def _noise(seed=0):
    return np.random.default_rng(seed).normal(size=(ROWS, FEATURES))


def _with_rows(rows, value):
    x = _noise()
    x[rows] = value
    return x


def _constant(*values):
    return np.broadcast_to(np.array(values, float), (ROWS, FEATURES))


def _sign_flips():
    return np.random.default_rng(1).choice([-1.0, 1.0], (ROWS, FEATURES)) * (1e4 + _noise())


def _build():
    """Return {name: float32 [rows, features]}; every array is rounded to float32 before anyone measures it."""
    noise = _noise()
    inputs = {f"mean {ratio:g} std": ratio + noise for ratio in RATIOS}
    inputs |= {
        "mean -1e6 std": noise - 1e6,
        # The sum of 1,024 squares of 1e18 overflows float32, and the cube of 1 / std underflows.
        "magnitude 1e18": 1e18 * noise,
        "magnitude 1e18, mean 1e6 std": 1e18 + 1e12 * noise,
        "magnitude 1e-18": 1e-18 * noise,
        "magnitude 1e-18, mean 1e6 std": 1e-18 + 1e-24 * noise,
        "constants": _constant(0.0, 3.7, -1e6, 1e-3),
        "constants of extreme size": _constant(1e18, -1e-18, 3e10, 16777217.0),
        # A shift by the first row, by the last or by a few rows at the start is far from the mean here.
        "outlier in the first row": _with_rows(0, 1e4),
        "large outlier in the first row": _with_rows(0, 1e6),
        "outlier in the last row": _with_rows(-1, -1e4),
        "first 64 rows far away": 1e4 + _with_rows(slice(64), 1e6),
        "every 16th row far away": 1e3 + _with_rows(slice(None, None, 16), -1e3),
        "all but one row equal": _constant(1e4, 1e4, 7, 7) + np.eye(ROWS, FEATURES),
        "random signs of a large value": _sign_flips(),
        "sorted": np.sort(100 + noise, axis=0),
        "sorted downwards": -np.sort(-(100 + noise), axis=0),
        "features of very different size": noise * np.array([1e-18, 1.0, 1e6, 1e18]),
        "features of very different offset": noise + np.array([0.0, 1e2, -1e4, 1e6]),
    }
    return {name: np.asarray(x, np.float32) for name, x in inputs.items()}


HARD_INPUTS = _build()
SCALE = np.array([1.5, -0.7, 2.0, 0.3], np.float32)
BIAS = np.array([0.0, 1.0, -2.0, 0.0], np.float32)


def cotangent(shape, seed=7):
    """Return a float32 cotangent whose sum does not vanish, so that no gradient is trivially small."""
    return (0.5 + np.random.default_rng(seed).normal(size=shape)).astype(np.float32)
