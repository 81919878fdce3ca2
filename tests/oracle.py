"""Batch normalization in float64 and in closed form, and the error measure by which the library is judged.

With weights w, W = sum w, over the reduced axes, and any shape of dy (JAX's convention for complex gradients):

    mean = sum(w x) / W          c = x - mean           var = sum(w |c|^2) / W        r = 1 / sqrt(var + epsilon)
    y = scale r c + bias         loss = Re sum(y dy)
    dbias = sum(dy)              dscale = sum(dy r c)
    dx = scale r dy - (w / W) scale r sum(dy) - (w / W) r^3 Re(sum(scale dy c)) conj(c)

The sums over dy run over all positions: a position that the mask leaves out of the statistics is normalized too.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxbn.testing._oracle import centred, gradient_terms

TINY = float(np.finfo(np.float32).tiny)  # The smallest normal float32: XLA's CPU backend flushes what is below it.
BOUND = 1e-6  # The library's promise: norm-wise, about eight units in the last place of float32 (2^-24 each).


class Reference(NamedTuple):
    """What batch normalization gives in exact arithmetic; names as in the library."""

    y: np.ndarray
    count: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    dx: np.ndarray
    dscale: np.ndarray
    dbias: np.ndarray


def _sum(values, axis):
    return np.sum(values, axis=axis, keepdims=True)


def _broadcast_weights(x, axis, where, weights):
    mask = 1.0 if where is None else np.asarray(where, np.float64)
    w = np.broadcast_to(mask * (1.0 if weights is None else np.asarray(weights, np.float64)), x.shape)
    return w, _sum(w, axis)


def reference(x, dy=None, scale=None, bias=None, *, axis, epsilon=1e-5, where=None, weights=None):
    """Return the float64 (complex128) `Reference` and the size of the terms of each of its entries.

    A size has the shape of the features. It is what rounding errors scale with:

    - y: the norms of scale r c and of bias; for a constant feature the norm which a normalized one would have,
      since the exact answer is zero there;
    - mean: |mean| or the standard deviation, whichever is larger;
    - var: var; for a constant feature the variance that changing one value in its last place would give it;
    - dscale, dbias: the sum of the absolute values of the terms;
    - dx: the norms of its three terms, the sums inside them taken of absolute values.
    """
    x = np.asarray(x)
    x = x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)
    axis = tuple(a % x.ndim for a in np.atleast_1d(axis))
    dy = np.ones_like(x) if dy is None else np.asarray(dy).astype(x.dtype)
    s = np.ones(()) if scale is None else np.expand_dims(np.asarray(scale, np.float64), axis)
    b = np.zeros(()) if bias is None else np.expand_dims(np.asarray(bias, np.float64), axis)
    w, total = _broadcast_weights(x, axis, where, weights)
    mean, c, share = centred(x, axis, w)
    var = _sum(share * np.abs(c) ** 2, axis)
    r = 1 / np.sqrt(var + epsilon)
    xhat, norm = r * c, lambda v: np.sqrt(_sum(np.abs(v) ** 2, axis))
    terms = gradient_terms(s * dy, xhat, r, share, axis)
    exact = Reference(
        y=s * xhat + b,
        count=total,
        mean=mean,
        var=var,
        dx=sum(terms),
        dscale=_sum((dy * xhat).real, axis),
        dbias=_sum(dy.real, axis),
    )
    ones = np.ones_like(x.real)
    step = np.spacing(np.maximum(np.abs(mean), TINY).astype(np.float32)).astype(np.float64)
    least = step**2 / np.maximum(_sum(w > 0, axis), 1)
    constant = var < least / 4  # Rounding in this file leaves a constant feature a variance of about 1e-30 mean^2.
    absolute = _sum(np.abs(dy), axis), _sum(np.abs(dy * xhat), axis)
    sizes = Reference(
        y=norm(s * xhat) + norm(b * ones) + constant * norm(s * ones),
        count=np.maximum(total, 1),
        mean=np.maximum(np.abs(mean), np.sqrt(var)),
        var=np.where(constant, least, var),
        dx=norm(terms[0]) + norm(share * s * r) * absolute[0] + norm(share * r * xhat) * np.abs(s) * absolute[1],
        dscale=absolute[1] + constant * _sum(np.abs(dy), axis),
        dbias=absolute[0],
    )
    squeeze = lambda name, v: v if name in ("y", "dx") else np.squeeze(v, axis)
    return (
        Reference(*(squeeze(name, v) for name, v in exact._asdict().items())),
        Reference(*(np.broadcast_to(np.squeeze(v, axis), np.squeeze(mean, axis).shape) for v in sizes)),
    )


def relative_errors(actual, exact, sizes, *, axis, sensitivity=0.0):
    """Return {name: the worst feature's norm of the error over the size of its terms} for the entries in `actual`.

    What a flush of denormals may cost is taken off first: one smallest normal number in every output element (in
    var: the mean of squares of which each may be flushed), and `sensitivity` (scale r) times as much where the
    input itself may be flushed.
    """
    errors = {}
    for name, value in actual.items():
        target = getattr(exact, name)
        wide = np.asarray(value).astype(np.complex128 if np.iscomplexobj(target) else np.float64)
        wide = np.broadcast_to(wide, target.shape) if name == "count" else wide  # Without weights one count may do.
        assert wide.shape == target.shape, f"{name} has shape {wide.shape}, expected {target.shape}"
        flushed = TINY * sensitivity * (sizes.dbias if name == "dscale" else 1)  # dscale sums dy times the flushed.
        gap = np.maximum(np.abs(wide - target) - TINY - flushed, 0)
        if name in ("y", "dx"):
            gap = np.sqrt(np.sum(gap**2, axis=axis))
        size = getattr(sizes, name)
        ratio = np.where(gap == 0, 0.0, gap / np.where(size > 0, size, TINY))
        errors[name] = float(np.max(np.where(np.isnan(gap), np.inf, ratio)))
    return errors


def assert_exact(actual, exact, sizes, *, axis, bound=BOUND, sensitivity=0.0):
    """Raise an AssertionError that lists every entry of `actual` further than `bound` from the reference."""
    errors = relative_errors(actual, exact, sizes, axis=axis, sensitivity=sensitivity)
    wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error <= bound}
    assert not wrong, f"beyond {bound:.0e}: {wrong}; all: { {k: f'{v:.1e}' for k, v in errors.items()} }"


def plain(x, scale=1.0, bias=0.0, *, axis, epsilon=1e-5, weights=None):
    """Batch normalization written down as in the textbook, for autodiff in float64; `scale` broadcasts as it is."""
    w = jnp.ones_like(x.real) if weights is None else jnp.broadcast_to(weights, x.shape)
    share = w / jnp.sum(w, axis, keepdims=True)
    c = x - jnp.sum(share * x, axis, keepdims=True)
    var = jnp.sum(share * (c * c.conj()).real, axis, keepdims=True)
    return scale * c / jnp.sqrt(var + epsilon) + bias
