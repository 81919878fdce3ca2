"""Laws of precision and of compilation: hard inputs, narrow dtypes, no retracing."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from jaxbn.testing import _bounds as bounds
from jaxbn.testing import _oracle as oracle
from jaxbn.testing._agree import agree, require
from jaxbn.testing._bounds import FLOAT32
from jaxbn.testing._law import law
from jaxbn.testing._laws_running import agree_running
from jaxbn.testing.strategies import values

# |mean| / std up to about a million, and magnitudes whose squares leave the range of float32: powers of two, exact.
RATIOS = tuple(2.0**k for k in (2, 7, 14, 20))
SIZES = (1.0, 2.0**20, 2.0**60, 2.0**-10)
SIXTEEN = (
    "16 u of the norm of the terms, about 1e-6, whatever the mean: a mean kept to float32's precision of the values"
)


def _far(subject):
    """Size (ratio + integers) / ratio: at most about `size`, standard deviation size / ratio times a few."""

    def build(shape):
        integers = values(shape, offsets=(0.0,), scales=(1.0,))
        return st.builds(_place, integers, st.sampled_from(RATIOS), st.sampled_from(SIZES))

    return {"x": st.sampled_from(subject.shapes).flatmap(build)}


def _far_values(shape):
    """Size (ratio + steps) / ratio: about `size` large, with a standard deviation of a step or two."""
    integers = values(shape, offsets=(0.0,), scales=(1.0,))
    return st.builds(_place, integers, st.sampled_from(RATIOS), st.sampled_from(SIZES))


def _place(integers, ratio, size):
    # Steps of 0.3 fill all bits of float32, so that the mean of a few values needs more than it has.
    return ((ratio + 0.3 * integers) / ratio * size).astype(np.float32)


@law(
    statement="far from zero, y errs by no more than rounding the mean to one float costs (backward stability)",
    bound="(n + 8) u (1 + peak r) (1 + |xhat|): any two-pass formula keeps it, E[x^2] - E[x]^2 does not",
    source="jaxbn's promise; Higham 2002, section 1.9; Chan, Golub and LeVeque 1983",
    inputs=_far,
    promise=True,
)
def backward_stable(subject, x):
    s = subject.standardized(x)
    size = (len(s.values) + 8) * FLOAT32 * (1 + np.abs(s.values).max(0) * s.rstd)
    bound = np.where(size < 1 / 8, size, np.inf) * (1 + np.abs(s.xhat))
    expected = subject.scope.join(s.xhat, x.shape)
    agree(expected, subject.train(x), subject.scope.join(bound, x.shape), "y")


@law(
    statement="hard inputs stay within a stated bound of float64: |mean| / std to 1e6, magnitudes to 1e18",
    bound=SIXTEEN,
    source="jaxbn's promise; stricter than backward stability",
    inputs=_far,
    promise=True,
)
def hard_inputs(subject, x):
    s, split = subject.standardized(x), subject.scope.split
    gap = _norm(split(subject.train(x)) - s.xhat)
    agree(np.zeros_like(gap), gap, 16 * FLOAT32 * np.maximum(_norm(s.xhat), 1), "norm of the error of y")


def _hard_pairs(subject):
    pairs = [st.tuples(_far_values(shape), values(shape, offsets=(0.5,), scales=(1.0,))) for shape in subject.shapes]
    return {"x_dy": st.one_of(pairs)}


@law(
    statement="gradients of hard inputs stay within a stated bound of float64",
    bound="16 u of the norms of the three terms, the sums inside them taken of absolute values",
    source="jaxbn's promise",
    inputs=_hard_pairs,
    needs=("gradient",),
    promise=True,
)
def hard_gradients(subject, x_dy):
    x, dy = x_dy
    s, split = subject.standardized(x), subject.scope.split
    g = np.abs(split(dy).astype(np.float64))
    terms = s.rstd * (_norm(g) + np.sqrt(len(g)) * g.mean(0) + _norm(s.xhat) * (g * np.abs(s.xhat)).mean(0))
    gap = _norm(split(subject.pull(x, dy)[0] - oracle.gradient(x, dy, subject.scope, subject.eps)))
    # The smallest normal number: what is below it may be flushed.
    flushed = np.sqrt(len(g)) * float(np.finfo(np.float32).tiny)
    agree(np.zeros_like(gap), gap, 16 * FLOAT32 * terms + flushed, "norm of the error of dx")


def _norm(v):
    return np.sqrt((v * v).sum(0))


def _narrow(subject):
    dtypes = [jnp.bfloat16, jnp.float16]
    shapes = sorted({subject.shapes[0], subject.shapes[-1]}, key=len)  # Each of them compiles for each dtype.
    return {
        "x": st.sampled_from(shapes).flatmap(lambda shape: values(shape, scales=(1.0,))),
        "dtype": st.sampled_from(dtypes),
    }


@law(
    statement="low precision in, float32 inside: y is the float32 answer rounded once to x's dtype",
    bound="u |y| of the narrower of x's dtype and y's, and the float32 bound (n + 8) u (1 + (peak r)^2) (1 + |xhat|)",
    source="jaxbn's promise; Micikevicius et al. 2018, section 3.1",
    inputs=_narrow,
    promise=True,
)
def low_precision_output(subject, x, dtype):
    x = jnp.asarray(x, dtype)
    y, _ = subject.runs[True](subject.variables(x.shape), x, None, None)
    require(jnp.issubdtype(y.dtype, jnp.floating), f"y has dtype {y.dtype}")
    exact = np.asarray(x, np.float64)
    expected = subject.exact(exact)
    rounding = max(bounds.roundoff(dtype), bounds.roundoff(y.dtype)) * np.abs(expected)
    agree(expected, np.asarray(y, np.float64), subject.output_bound(exact) + rounding, f"y of {jnp.dtype(dtype).name}")


@law(
    statement="running statistics of low precision inputs are as exact as those of float32",
    bound="as running_closed_form, twice",
    source="jaxbn's promise; Micikevicius et al. 2018, section 3.1",
    inputs=lambda s: _narrow(s) | {"x": values(s.shapes[0], scales=(1.0,))},
    needs=("batch", "running", "test mode"),
    examples=0.5,
    promise=True,
)
def low_precision_statistics(subject, x, dtype):
    narrow = jnp.asarray(x, dtype)
    batch_stats = subject.runs[True](subject.variables(x.shape), narrow, None, None)[1]
    same = np.asarray(narrow, np.float32)
    agree_running(subject, subject.run(same)[1], batch_stats, [same])


@law(
    statement="the second step, on the statistics that the first returned, does not retrace",
    bound="none: one trace",
    source="jaxbn's promise: a retrace each step costs more than the layer",
    inputs=lambda s: {"shape": st.just(s.shapes[0])},
    needs=("jit",),
    examples=0.2,
    promise=True,
)
def no_retrace(subject, shape):
    traces = 0

    # Counted here: chex.assert_max_traces counts by place of definition, which all normalizers share.
    @jax.jit
    def step(variables, x):
        nonlocal traces
        traces += 1
        return subject.call(variables, x)

    x = jnp.arange(float(np.prod(shape))).reshape(shape)
    variables = subject.variables(shape)
    for _ in range(3):
        variables = {**variables, "batch_stats": step(variables, x)[1]}
    require(traces == 1, f"traced {traces} times in 3 steps on the same shapes")
