"""Laws of test mode: what a layer computes once its running statistics have settled on those of one batch.

A layer that is trained on one batch over and over ends with that batch's statistics, whatever they were at first and
wherever its state lies. So these laws know the running statistics without reading them off the output, which a wrong
evaluation would falsify.
"""

import hypothesis.strategies as st
import numpy as np

from jaxbn.testing import _bounds as bounds
from jaxbn.testing import _oracle as oracle
from jaxbn.testing._agree import agree
from jaxbn.testing._bounds import FLOAT32
from jaxbn.testing._law import law
from jaxbn.testing._laws_running import AFFINE, INFERENCE
from jaxbn.testing.strategies import values

SETTLED = (
    "for mean and variance (n + 8) u peak and 4 peak times that, and 4 u / (1 - decay) of each for the steps to settle"
)


def settled_bound(subject, x) -> tuple[np.ndarray, np.ndarray]:
    """How far the settled mean and variance may lie from those of x, [features] each: see `SETTLED`."""
    batch = subject.scope.split(np.asarray(x, np.float64))
    peak = np.abs(batch).max(0)
    per_batch, per_step = len(batch) + 8, 4 / (1 - subject.settling_decay)
    mean = FLOAT32 * peak * (per_batch + per_step)
    return mean, FLOAT32 * peak**2 * (4 * per_batch + per_step)


def _parameters(subject):
    """Scale and bias, [features] each, that are nowhere 0 and nowhere 1."""
    rows = values((2, subject.features), offsets=(0.5,), scales=(1.0,), largest=4)
    return rows.map(lambda pair: (pair[0], 10 * pair[1]))


def _small(subject, shape):
    """Batches with variances from far below epsilon to above it, and of ordinary size."""
    root = 2.0 ** np.round(np.log2(np.sqrt(subject.eps))) if subject.eps > 0 else 1.0
    scales = [float(root * factor) for factor in (0.25, 1 / 16, 1.0)] + [1.0]
    return values(shape, offsets=(0.0, 2.0), scales=scales)


def _affine(subject):
    return {"scale_bias": _parameters(subject)}


def _pair(subject, shape):
    # Of one rank: the parameters of Haiku's layers have as many axes as x.
    return st.tuples(_small(subject, shape), _small(subject, shape))


def _one_of_each_rank(subject):
    return list({len(shape): shape for shape in subject.shapes}.values())


def _settled(subject, batch, scale_bias):
    """Variables after settling on the batch, and the scale and bias among them (1 and 0 where it has none)."""
    scale, bias = (np.asarray(v, np.float32) for v in scale_bias)
    variables = subject.settled(batch, subject.settling_steps, subject.variables(batch.shape, scale, bias))
    one = np.ones(subject.features, np.float32)
    return (
        variables,
        one if "scale" in subject.missing else scale,
        0 * one if "bias" in subject.missing else bias,
    )


def _evaluation_bound(subject, batch, x, mean, var, scale, bias) -> np.ndarray:
    """How far scale (x - mean) r + bias may be off where mean and variance are as far off as they may, of x's shape."""
    with np.errstate(invalid="ignore", divide="ignore"):
        off_mean, off_var = settled_bound(subject, batch)
        r = 1 / np.sqrt(var + subject.eps)
        # r moves by at most r^3 / 2 times what the variance does, to first order; twice that covers the rest.
        statistics = r * off_mean + np.abs(x - mean) * r**3 * off_var
        first_order = off_var * r**2 < 1 / 8
        size = np.abs(scale) * (bounds.affine(x, mean, r) + statistics) + 4 * FLOAT32 * np.abs(bias)
    return np.where(first_order & np.isfinite(size), size, np.inf)


@law(
    statement="with the batch's own statistics, evaluation gives what training gives, whatever scale and bias are",
    bound=f"those of evaluation_closed_form and of the output in training; {SETTLED}",
    source=INFERENCE,
    inputs=lambda s: {"batch": _small(s, s.shapes[0])} | _affine(s),
    needs=("batch", "running", "test mode"),
    examples=0.4,
)
def evaluation_equals_training(subject, batch, scale_bias):
    variables, scale, bias = _settled(subject, batch, scale_bias)
    mean, var = oracle.moments(subject.scope.split(np.asarray(batch, np.float64)))
    n = subject.scope.size(batch.shape)
    # Where the running variance is the unbiased one, it is the batch variance of a batch this much wider.
    bessel = n / (n - 1) if subject.settled_unbiased else 1.0
    x = (mean + np.sqrt(bessel) * (batch - mean)).astype(np.float32)
    bound = _evaluation_bound(subject, batch, x, mean, bessel * var, scale, bias)
    bound = bound + np.abs(scale) * subject.output_bound(x)
    agree(subject.train(x, variables=variables), subject.evaluate(x, variables), bound, "y at test time")


@law(
    statement="evaluation is scale (x - mean) / sqrt(var + epsilon) + bias, small variances included",
    bound=f"{AFFINE}; {SETTLED}",
    source=INFERENCE,
    inputs=lambda s: {"batch_x": st.one_of([_pair(s, shape) for shape in _one_of_each_rank(s)])} | _affine(s),
    needs=("batch", "running", "test mode"),
    examples=0.4,
)
def evaluation_closed_form(subject, batch_x, scale_bias):
    batch, x = batch_x
    variables, scale, bias = _settled(subject, batch, scale_bias)
    mean, var = oracle.moments(subject.scope.split(np.asarray(batch, np.float64)))
    n = subject.scope.size(batch.shape)
    var = var * n / (n - 1) if subject.settled_unbiased else var
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = scale * (x - mean) / np.sqrt(var + subject.eps) + bias
    bound = _evaluation_bound(subject, batch, x, mean, var, scale, bias)
    agree(expected, subject.evaluate(x, variables), bound, "y at test time")
