"""Laws of the output in training: what is standardized, what it is blind to, what it commutes with."""

import hypothesis.strategies as st
import numpy as np

from jaxbn.testing import _bounds as bounds
from jaxbn.testing._agree import LawDoesNotApplyError, agree, require
from jaxbn.testing._law import law
from jaxbn.testing.strategies import values

IOFFE = "Ioffe and Szegedy 2015, algorithm 1"
SLACK = "(n + 8) u (1 + (peak r)^2) (1 + |xhat|): n additions, textbook variance, root and product"


def inputs(subject):
    """One input of any of the subject's shapes."""
    return {"x": st.sampled_from(subject.shapes).flatmap(values)}


def per_set(subject, shape, numbers):
    """Numbers, repeated as needed, one for each set of values: an array of that shape."""
    split = subject.scope.split(np.empty(shape))
    row = np.resize(np.asarray(numbers, np.float64), split.shape[1])
    return subject.scope.join(np.broadcast_to(row, split.shape), shape)


@law(
    statement="y has mean 0 over the values that are normalized together",
    bound=f"the mean over the set of {SLACK}",
    source=IOFFE,
    inputs=inputs,
)
def zero_mean(subject, x):
    split = subject.scope.split
    y, bound = split(subject.train(x)), split(subject.output_bound(x))
    agree(np.zeros(y.shape[1]), y.mean(0), bound.mean(0), "mean of y")


@law(
    statement="y has mean square 1 over the values that are normalized together, less epsilon / (var + epsilon)",
    bound=f"epsilon / (var + epsilon), and 2 |xhat| times the error of y: {SLACK}",
    source=IOFFE,
    inputs=inputs,
)
def unit_variance(subject, x):
    s, split = subject.standardized(x), subject.scope.split
    y, bound = split(subject.train(x)), split(subject.output_bound(x))
    with np.errstate(invalid="ignore", divide="ignore"):
        shortfall = np.where(s.var > 0, subject.eps / (s.var + subject.eps), 1)
        error = (bound * (2 * np.abs(s.xhat) + bound)).mean(0)
    agree(np.ones(y.shape[1]), (y**2).mean(0), shortfall + error, "mean square of y")


def _around_epsilon(subject):
    deviation = 2.0 ** np.round(np.log2(np.sqrt(subject.eps)))
    near = [float(deviation * factor) for factor in (0.25, 1 / 16, 1, 4)]
    build = st.sampled_from(subject.shapes).flatmap(lambda shape: values(shape, offsets=(0.0,), scales=near))
    return {"x": build}


@law(
    statement="where var is near epsilon, y = (x - mean) / sqrt(var + epsilon): epsilon once, inside the root",
    bound=SLACK,
    source=IOFFE,
    inputs=_around_epsilon,
    needs=("epsilon",),
)
def epsilon_inside_root(subject, x):
    agree(subject.exact(x), subject.train(x), subject.output_bound(x), "y")


@law(
    statement="f(x + c) = f(x) for a constant c per feature",
    bound=f"twice {SLACK}, at x and at x + c",
    source="Ioffe and Szegedy 2015, section 3.3",
    inputs=lambda s: inputs(s) | {"shift": st.sampled_from([1.0, -3.0, 16.0])},
)
def shift_invariance(subject, x, shift):
    # In steps of an eighth of x's size: exact in float32, and never so far that conditioning hides the law.
    step = 2.0 ** np.floor(np.log2(max(float(np.abs(x).max()), 1e-3))) / 8
    moved = (x + per_set(subject, x.shape, step * shift * np.array([1, -1, 2]))).astype(np.float32)
    bound = subject.output_bound(x) + subject.output_bound(moved)
    agree(subject.train(x), subject.train(moved), bound, "f(x + c)")


@law(
    statement="f(a x) = sign(a) f(x) for a factor a, as epsilon -> 0",
    bound=f"|1 - 1/a^2| epsilon / (2 var) |c| / std, and twice {SLACK}, at x and at a x",
    source="Ioffe and Szegedy 2015, section 3.3",
    inputs=lambda s: inputs(s) | {"factor": st.sampled_from([2.0, -1.0, 0.5, -8.0])},
)
def scale_invariance(subject, x, factor):
    scaled = (factor * x).astype(np.float32)
    s = subject.standardized(x)
    effect = subject.scope.join(bounds.epsilon_effect(s, subject.eps, factor), x.shape)
    bound = subject.output_bound(x) + subject.output_bound(scaled) + effect
    agree(np.sign(factor) * subject.train(x), subject.train(scaled), bound, "f(a x)")


@law(
    statement="values of one set (such as a feature) do not change the outputs of another",
    bound=f"twice {SLACK}",
    source=IOFFE,
    inputs=lambda s: inputs(s) | {"change": st.sampled_from([1.0, -20.0])},
)
def sets_are_independent(subject, x, change):
    split = subject.scope.split(x)
    if split.shape[1] < 2:
        raise LawDoesNotApplyError("needs two sets of values that are normalized apart")
    other = split.copy()
    ramp = np.arange(1, len(other) + 1) * float(max(np.abs(x).max(), 1))
    other[:, -1] += change * ramp
    moved = subject.scope.join(other, x.shape).astype(np.float32)
    y, z = (subject.scope.split(subject.train(v))[:, :-1] for v in (x, moved))
    agree(y, z, 2 * subject.scope.split(subject.output_bound(x))[:, :-1], "y of the untouched")


@law(
    statement="permuting the examples permutes the outputs",
    bound=f"twice {SLACK}",
    source="mean and variance are symmetric functions",
    inputs=lambda s: {
        "x": st.just(max(s.shapes, key=lambda shape: shape[0])).flatmap(values),
        "order": st.permutations(range(max(shape[0] for shape in s.shapes))),
    },
)
def permutation_equivariance(subject, x, order):
    agree(subject.train(x)[order], subject.train(x[order]), 2 * subject.output_bound(x)[order], "f(permuted x)")


@law(
    statement="scale and bias act last, per feature: y = scale xhat + bias",
    bound=f"|scale| times twice {SLACK}, and 4 u of each term",
    source="Ioffe and Szegedy 2015, algorithm 1",
    inputs=lambda s: inputs(s) | {"scale": st.sampled_from([2.0, -0.5, 1e3]), "bias": st.sampled_from([1.0, -30.0])},
    needs=("scale", "bias"),
)
def affine_last(subject, x, scale, bias):
    scales = np.resize([scale, 1.0, -scale], x.shape[-1])
    biases = np.resize([bias, -bias, 0.0], x.shape[-1])
    y = subject.train(x, variables=subject.variables(x.shape, scales.astype(np.float32), biases.astype(np.float32)))
    plain = subject.train(x)
    rounding = 4 * bounds.FLOAT32 * (np.abs(scales * plain) + np.abs(biases))
    agree(scales * plain + biases, y, 2 * np.abs(scales) * subject.output_bound(x) + rounding, "y")


@law(
    statement="a constant feature gives finite outputs: its bias, up to rounding",
    bound=f"{SLACK}; where that is out of first order, finite and at most 2 sqrt(n)",
    source="epsilon is there for this; sum of squares at most n otherwise",
    inputs=lambda s: {
        "shape": st.sampled_from(s.shapes),
        "value": st.sampled_from([0.0, 1.0, -3.7, 0.1]),
    },
    needs=("epsilon",),
)
def constant_feature(subject, shape, value):
    _check_constant(subject, shape, value)


@law(
    statement="a constant feature far from zero gives finite outputs of ordinary size",
    bound="as constant_feature; E[x^2] - E[x]^2 does not keep it",
    source="jaxbn's promise; the sum of squares of a normalized set is at most n",
    inputs=lambda s: {"shape": st.sampled_from(s.shapes), "value": st.sampled_from([1e4, -3e10])},
    needs=("epsilon",),
    promise=True,
)
def far_constant_feature(subject, shape, value):
    _check_constant(subject, shape, value)


def _check_constant(subject, shape, value):
    x = np.full(shape, value, np.float32)
    y = subject.train(x)
    require(np.isfinite(y).all(), f"y is not finite: {y.reshape(-1)[:4]}")
    limit = 2 * np.sqrt(len(subject.scope.split(x)))
    agree(np.zeros(shape), y, np.minimum(subject.output_bound(x), limit), "y")


@law(
    statement="channels first and channels last give the same, in training and at test time",
    bound=f"twice {SLACK}; at test time also 64 u r (|x| + |mean|)",
    source="the layout is not part of the function",
    inputs=lambda s: {"x": values(_image(s))},
    needs=("channels first", "rank 4"),
)
def layouts_agree(subject, x):
    (y, moved), (z, moved_first) = subject.run(x), subject.run_channels_first(x)
    bound = 2 * subject.output_bound(x)
    agree(y, z, bound, "y of channels first")
    if {"running", "test mode"} & set(subject.missing):
        return
    variables = {**subject.variables(x.shape), "batch_stats": moved}
    first = {**subject.variables(x.shape, features_first=True), "batch_stats": moved_first}
    y, z = subject.evaluate(x, variables), subject.run_channels_first(x, train=False, variables=first)[0]
    # Running statistics lie between those of the batch and the initial ones, 0 and 1: so do the terms of y.
    size = (np.abs(x) + np.abs(x).max()) / np.sqrt(min(1, float(np.var(x, (0, 1, 2)).min())) + subject.eps)
    agree(y, z, bound + 64 * bounds.FLOAT32 * size, "y of channels first at test time")


@law(
    statement="a 1x1 convolution is normalized like the same dense layer at every position: one mean a feature map",
    bound=f"twice {SLACK}; the products are small integers, exact",
    source="Ioffe and Szegedy 2015, section 3.2",
    inputs=lambda s: {
        "x": values((2, 2, 2, 3), offsets=(0.0, 3.0), scales=(1.0,)),
        "kernel": values((3, s.features), offsets=(0.0, 1.0), scales=(1.0,), largest=3),
    },
    needs=("batch", "rank 2", "rank 4"),
)
def dense_equals_convolution(subject, x, kernel):
    convolved = np.einsum("nhwi,io->nhwo", x, kernel)
    dense = x.reshape(-1, x.shape[-1]) @ kernel
    y = subject.train(convolved).reshape(dense.shape)
    agree(subject.train(dense), y, 2 * subject.output_bound(dense), "y of the convolution")


def _image(subject):
    return next((shape for shape in subject.shapes if len(shape) == 4), subject.shapes[0])
