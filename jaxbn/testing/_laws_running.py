"""Laws of running statistics: how they follow the batches, and what they make of a layer at test time."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._fold import fold_preceding
from jaxbn.testing import _bounds as bounds
from jaxbn.testing._agree import agree, require
from jaxbn.testing._bounds import FLOAT32
from jaxbn.testing._law import law
from jaxbn.testing._laws_value import IOFFE, SLACK, inputs
from jaxbn.testing._measure import read_running
from jaxbn.testing.strategies import values

INFERENCE = "Ioffe and Szegedy 2015, algorithm 2"
AFFINE = "16 u r (|x| + |mean|): one multiplication and one addition of numbers of that size"


def running_of(subject, batch_stats):
    """Running mean and variance, [features], as evaluation uses them."""
    variables = subject.variables(subject.shapes[0])
    return read_running(subject, {**variables, "batch_stats": batch_stats}, subject.eps)


def running_bound(subject, batches):
    """How far running mean and variance may lie from their closed form after these batches, [features] each.

    A batch mean is off by (n + 8) u peak, a variance by 2 (n + 8) u peak^2, twice that with Bessel's n / (n - 1) <= 2;
    both enter with the weight of the batches. 1 - decay is itself off by u, and each step rounds. Reading costs 32 u.
    """
    rule, steps = subject.running, len(batches)
    weight = 1 - rule.decay**steps if rule.kind == "exponential" else 1.0
    values = [subject.scope.split(x) for x in batches]
    n = max(len(v) for v in values)
    peak = np.max([np.abs(v.astype(np.float64)).max(0) for v in values], axis=0)
    per_batch, per_step = weight * (n + 8), 4 * steps
    mean = FLOAT32 * peak * (per_batch + per_step + 32)
    var = FLOAT32 * (peak**2 * (4 * per_batch + per_step + 32) + 64 * (1 + subject.eps))
    return mean, var


def agree_running(subject, expected, got, batches, *, even_unfit=False):
    """Compare batch_stats with others, or with the closed form after one step on each of the batches where None."""
    if {"running", "test mode"} & set(subject.missing):
        return
    if expected is None and not subject.running.fits and not even_unfit:
        return  # `running_closed_form` says so, once.
    if expected is None:
        sets = [subject.scope.split(x) for x in batches]
        expected = subject.running.after(sets)[-1]
    else:
        expected = running_of(subject, expected)
    limits = running_bound(subject, batches)
    for name, a, b, limit in zip(("mean", "var"), expected, running_of(subject, got), limits, strict=True):
        agree(a, b, 2 * limit, f"running {name}")


def _three(subject):
    return {"batches": st.lists(values(subject.shapes[0]), min_size=3, max_size=3)}


@law(
    statement="running statistics follow their closed form: new = decay old + (1 - decay) batch",
    bound="weight (n + 8) u peak for the mean, 4 peak times that for the variance, u a step, 32 u for reading off y",
    source=INFERENCE,
    inputs=_three,
    needs=("batch", "running", "test mode"),
)
def running_closed_form(subject, batches):
    for steps in range(1, len(batches) + 1):
        got = subject.trained(*batches[:steps])["batch_stats"]
        agree_running(subject, None, got, batches[:steps], even_unfit=True)


@law(
    statement="the output in training does not depend on the running statistics",
    bound=f"twice {SLACK}",
    source=IOFFE,
    inputs=lambda s: {"x": values(s.shapes[0]), "before": values(s.shapes[0])},
    needs=("running",),
)
def train_ignores_running(subject, x, before):
    y = subject.train(x, variables=subject.trained(before, before))
    agree(subject.train(x), y, 2 * subject.output_bound(x), "y after other batches")


@law(
    statement="batch_stats keep structure, shapes and dtypes in training, and come back as they went in at test time",
    bound="none: equality",
    source="so a lax.scan can carry them, and a checkpoint hold them",
    inputs=lambda s: {"x": values(s.shapes[0])},
    needs=(
        "running",
        "test mode",
    ),
    examples=0.2,
)
def statistics_keep_structure(subject, x):
    before = subject.variables(x.shape)["batch_stats"]
    moved = subject.run(x)[1]
    same = subject.run(x, train=False)[1]
    require(_described(before) == _described(moved), f"from {_described(before)} to {_described(moved)}")
    unequal = jax.tree.map(lambda a, b: not np.array_equal(a, b, equal_nan=True), before, same)
    require(not any(jax.tree.leaves(unequal)), "evaluation changed batch_stats")


@law(
    statement="use_running chooses which statistics normalize, update whether they move, whatever train says",
    bound=f"twice {SLACK}; statistics that do not move are equal, others within 4 (n + 8) u of their size",
    source="mlcommons/algorithmic-efficiency, specification: use_running_average_bn and update_batch_norm",
    inputs=lambda s: {"x": values(s.shapes[0]), "before": values(s.shapes[0])},
    needs=("running", "test mode", "switches"),
    examples=0.2,
    promise=True,
)
def switches_are_independent(subject, x, before):
    variables = subject.trained(before)
    by_batch, moved = subject.run(x, variables=variables)
    ys = {False: by_batch, True: subject.evaluate(x, variables)}
    stats = {False: variables["batch_stats"], True: moved}
    n, peak = subject.scope.size(x.shape), max(np.abs(x).max(), np.abs(before).max(), 1)
    bounds_of = {False: 0, True: 4 * (n + 8) * FLOAT32 * peak**2}
    for (use_running, update), (y, after) in subject.run_switched(variables, x).items():
        what = f"with use_running={use_running}, update={update}"
        agree(ys[use_running], y, 2 * subject.output_bound(x) + 64 * FLOAT32 * np.abs(ys[use_running]), f"y {what}")
        for a, b in zip(jax.tree.leaves(stats[update]), jax.tree.leaves(after), strict=True):
            agree(a, b, bounds_of[update] + 0 * np.abs(a), f"batch_stats {what}")


def _described(tree):
    leaves, structure = jax.tree.flatten(tree)
    return [(np.shape(leaf), str(np.asarray(leaf).dtype)) for leaf in leaves], str(structure)


@law(
    statement="at test time the layer is affine in x: f of a midpoint is the midpoint of f",
    bound=f"twice {AFFINE}",
    source=INFERENCE,
    inputs=lambda s: {name: values(s.shapes[0], scales=(1.0,)) for name in ("before", "a", "b")},
    needs=("batch", "running", "test mode"),
)
def eval_is_affine(subject, before, a, b):
    variables = subject.trained(before)
    middle = ((a.astype(np.float64) + b) / 2).astype(np.float32)
    ya, yb, ym = (subject.evaluate(x, variables) for x in (a, b, middle))
    agree((ya + yb) / 2, ym, 2 * _affine_bound(subject, variables, np.abs(a) + np.abs(b)), "f((a + b) / 2)")


def _affine_bound(subject, variables, size):
    mean, var = running_of(subject, variables["batch_stats"])
    with np.errstate(invalid="ignore"):
        bound = bounds.affine(size, mean, 1 / np.sqrt(var + subject.eps))
    # Where the running statistics cannot be read there is nothing to be lenient about.
    return np.where(np.isfinite(bound), bound, 32 * FLOAT32 * (1 + size))


@law(
    statement="at test time each example is treated by itself",
    bound=AFFINE,
    source=INFERENCE,
    inputs=lambda s: {"x": values(s.shapes[0], scales=(1.0,)), "others": values(s.shapes[0], scales=(8.0,))},
    needs=(
        "running",
        "test mode",
    ),
)
def eval_treats_examples_independently(subject, x, others):
    variables = subject.trained(x)
    mixed = np.concatenate([x[:1], others[1:]])
    y, z = (subject.evaluate(v, variables)[0] for v in (x, mixed))
    agree(y, z, _affine_bound(subject, variables, np.abs(x))[0], "y of the first example")


@law(
    statement="in training the output of one example moves with the other examples, since the statistics do",
    bound=f"where it should move by 16 times {SLACK}, it moves by more than once that",
    source="Ioffe and Szegedy 2015, section 3.4",
    inputs=inputs,
    needs=("batch",),
)
def train_couples_examples(subject, x):
    other = x.copy()
    other[1:] = 2 * x[1:] + 3 * np.abs(x).max() + 1
    expected = np.abs(subject.exact(other) - subject.exact(x))[0]
    got = np.abs(subject.train(other) - subject.train(x))[0]
    bound = (subject.output_bound(other) + subject.output_bound(x))[0]
    still = (expected > 16 * bound) & ~(got > bound)
    require(not still.any(), f"y of the first example moved by {got.max():.2g}, expected {expected.max():.2g}")


@law(
    statement="folding keeps the function: a dense layer followed by the layer at test time is one dense layer",
    bound="64 u r (|z| + |x| |W| + |mean|): the folded kernel and bias are rounded too",
    source="Ioffe and Szegedy 2015, section 3.1",
    inputs=lambda s: {
        "x": values((s.shapes[0][0], 3), scales=(1.0,)),
        "kernel": values((3, s.features), offsets=(0.0, 1.0), scales=(1.0,), largest=3),
        "before": values((s.shapes[0][0], s.features)),
    },
    needs=("batch", "running", "test mode", "rank 2"),
)
def folding_keeps_function(subject, x, kernel, before):
    variables = subject.trained(before)
    mean, var = running_of(subject, variables["batch_stats"])
    with np.errstate(invalid="ignore"):
        gain = 1 / np.sqrt(var + subject.eps)
    norm = {"params": {}, "batch_stats": {"mean": mean, "var": np.where(np.isfinite(var), var, 1)}}
    folded_kernel, bias = fold_preceding(jnp.asarray(kernel), None, norm, epsilon=subject.eps)
    folded = x.astype(np.float64) @ np.asarray(folded_kernel, np.float64) + np.asarray(bias)
    z = x @ kernel
    size = np.abs(z) + np.abs(x) @ np.abs(kernel)
    agree(folded, subject.evaluate(z, variables), 4 * bounds.affine(size, mean, gain), "y of the unfolded")
