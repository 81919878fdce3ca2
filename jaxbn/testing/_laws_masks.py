"""Laws of counting: what masks and weights mean."""

import hypothesis.strategies as st
import numpy as np

from jaxbn.testing._agree import agree, require
from jaxbn.testing._bounds import FLOAT32
from jaxbn.testing._law import law
from jaxbn.testing._laws_running import agree_running, running_of
from jaxbn.testing._laws_value import SLACK
from jaxbn.testing.strategies import masks, values

COUNTS = "pooling by count, not averaging of averages"


def eight(subject, **kwargs):
    return values((8, subject.features), **kwargs)


def _some_rows(subject):
    return {
        "x": eight(subject),
        "kept": st.permutations(range(8)).map(lambda order: sorted(order[:4])),
        "left_out": st.sampled_from([0.0, 100.0, -7.0]),
    }


def _masked(x, kept, left_out):
    mask = np.zeros((len(x), 1), bool)
    mask[kept] = True
    return np.where(mask, x, x + np.float32(left_out)), mask


@law(
    statement="with a mask over examples, those that count are normalized as if the others were absent",
    bound=f"twice {SLACK}; running statistics as in running_closed_form",
    source=COUNTS,
    inputs=_some_rows,
    needs=("batch", "where", "rank 2"),
)
def mask_equals_subset(subject, x, kept, left_out):
    x, mask = _masked(x, kept, left_out)
    y, batch_stats = subject.run(x, where=mask)
    z, expected = subject.run(x[kept])
    agree(z, y[kept], 2 * subject.output_bound(x[kept]), "y of what counts")
    agree_running(subject, expected, batch_stats, [x[kept]])


@law(
    statement="a mask may differ from feature to feature: each is normalized by what counts in it",
    bound=SLACK,
    source=COUNTS,
    inputs=lambda s: {"x": eight(s), "mask": masks((8, s.features))},
    needs=("batch", "where", "rank 2"),
)
def mask_per_feature(subject, x, mask):
    expected, bound = subject.exact(x, mask), subject.output_bound(x, mask)
    y = subject.train(x, where=mask)
    agree(expected[mask], y[mask], bound[mask], "y of what counts")


def _padded(subject):
    shape = (8, subject.features) if 2 in subject.ranks else max(subject.shapes)
    positions = int(np.prod(shape[:-1]))
    return {
        "x_dy": st.tuples(values(shape), values(shape, offsets=(0.5,), scales=(1.0,))),
        "kept": st.permutations(range(positions)).map(lambda order: sorted(order[: positions // 2])),
        "left_out": st.sampled_from([np.nan, np.inf, -np.inf, 1e30]),
    }


@law(
    statement="what a mask leaves out may be NaN or infinite: y, running statistics and gradients are as with zeros",
    bound=f"twice {SLACK}; 8 slack r D (1 + X^2) for gradients; exactly 0 for the gradient of what is left out",
    source="jaxbn's promise: padding holds whatever was in memory",
    inputs=_padded,
    needs=("where",),
    promise=True,
)
def mask_silences(subject, x_dy, kept, left_out):
    x, dy = x_dy
    mask = np.zeros((*x.shape[:-1], 1), bool)
    mask.reshape(-1)[kept] = True
    zeros, padded = np.where(mask, x, 0), np.where(mask, x, np.float32(left_out))
    everywhere = np.broadcast_to(mask, x.shape)
    expected, moved = subject.run(zeros, where=mask)
    y, moved_too = subject.run(padded, where=mask)
    bound = subject.output_bound(zeros, mask)
    agree(expected[everywhere], y[everywhere], 2 * bound[everywhere], "y of what counts")
    if "batch" not in subject.missing:
        agree_running(subject, moved, moved_too, [zeros])
    if "gradient" in subject.missing:
        return
    dy = np.where(mask, dy, 0)
    expected, *expected_params = subject.pull(zeros, dy, where=mask)
    dx, *params = subject.pull(padded, dy, where=mask)
    agree(np.zeros(dx.shape)[~everywhere], dx[~everywhere], 0, "dx of what is left out")
    limit = 2 * subject.gradient_bound(zeros, dy, mask)
    agree(expected[everywhere], dx[everywhere], limit[everywhere], "dx of what counts")
    error = _per_feature(np.abs(dy), bound, everywhere)
    terms = _per_feature(np.abs(dy), 1 + np.abs(subject.exact(zeros, mask)), everywhere)
    rounding = 2 * ((len(kept) + 8) * FLOAT32 * terms + error)
    for name, a, b in zip(("dscale", "dbias"), expected_params, params, strict=True):
        if a is not None and b is not None:
            agree(a, b, rounding, name)


def _per_feature(size, factor, counted):
    """Sum of size times factor over what counts, [features]; infinite where a factor is not known."""
    with np.errstate(invalid="ignore"):
        product = np.where(counted & (size > 0), size * factor, 0)
    total = product.reshape(-1, product.shape[-1]).sum(0)
    return np.where(np.isnan(total), np.inf, total)


@law(
    statement="the gradient follows the mask: none for what is left out, that of the subset alone for what counts",
    bound="twice 8 slack r D (1 + X^2), see gradient_matches_float64",
    source=COUNTS,
    inputs=lambda s: _some_rows(s) | {"dy": values((4, s.features), offsets=(0.5,), scales=(1.0,))},
    needs=("batch", "where", "gradient", "rank 2"),
)
def mask_gradient(subject, x, kept, left_out, dy):
    x, mask = _masked(x, kept, left_out)
    whole = np.zeros(x.shape, np.float32)
    whole[kept] = dy
    expected = np.zeros(x.shape)
    expected[kept] = subject.pull(x[kept], dy)[0]
    bound = np.zeros(x.shape)
    bound[kept] = 2 * subject.gradient_bound(x[kept], dy)
    agree(expected, subject.pull(x, whole, where=mask)[0], bound, "dx")


@law(
    statement="a feature that saw nothing keeps its running statistics, and its outputs are finite",
    bound="32 u of what was there: nothing may move",
    source="jaxbn's promise: a zero count is the neutral element of pooling",
    inputs=lambda s: {"x": eight(s), "feature": st.integers(0, s.features - 1)},
    needs=("batch", "where", "running", "test mode", "rank 2"),
    promise=True,
)
def empty_mask_keeps_statistics(subject, x, feature):
    mask = np.ones(x.shape, bool)
    mask[:, feature] = False
    before = subject.trained(x)
    y, batch_stats = subject.run(x, where=mask, variables=before)
    require(np.isfinite(y).all(), f"y is not finite: {y[:, feature]}")
    old, new = running_of(subject, before["batch_stats"]), running_of(subject, batch_stats)
    for name, a, b in zip(("mean", "var"), old, new, strict=True):
        agree(a[feature], b[feature], 64 * FLOAT32 * (np.abs(a[feature]) + 1), f"running {name}")


@law(
    statement="a weight of k counts as the same value k times, and 0 as not at all",
    bound=f"twice {SLACK}; running statistics as in running_closed_form",
    source=COUNTS,
    inputs=lambda s: {
        "x": values((4, s.features)),
        "weights": st.sampled_from([(2, 2, 2, 2), (1, 1, 2, 4), (5, 1, 1, 1), (3, 0, 4, 1)]),
    },
    needs=("batch", "weights", "rank 2"),
)
def weights_equal_repetition(subject, x, weights):
    weights = np.array(weights)
    repeated = np.repeat(x, weights, axis=0)
    y, batch_stats = subject.run(x, weights=weights[:, None].astype(np.float32))
    z, expected = subject.run(repeated)
    bound = 2 * subject.output_bound(repeated)
    agree(z, np.repeat(y, weights, axis=0), bound, "y repeated")
    agree_running(subject, expected, batch_stats, [repeated])
