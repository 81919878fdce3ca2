"""Laws of pooling: halves and shards of a batch give the answer of the whole batch."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxbn.testing._agree import agree
from jaxbn.testing._law import law
from jaxbn.testing._laws_masks import COUNTS, eight
from jaxbn.testing._laws_running import agree_running
from jaxbn.testing._laws_value import SLACK
from jaxbn.testing._layer import AXIS

CHAN = "Chan, Golub and LeVeque 1983, equation 2.1"


@law(
    statement="the statistics of two halves of a batch, read off y and merged by count, are those of the whole batch",
    bound=f"{SLACK}, and for each half 32 of it over the range of y, from which mean and variance were read",
    source=CHAN,
    inputs=lambda s: {"x": eight(s)},
    needs=("batch", "rank 2"),
)
def merged_halves(subject, x):
    halves = [_shown(subject, half) for half in (x[:4], x[4:])]
    (mean_a, var_a, error_a), (mean_b, var_b, error_b) = halves
    mean, apart = (mean_a + mean_b) / 2, mean_b - mean_a
    var = (var_a + var_b) / 2 + apart**2 / 4
    s = subject.standardized(x)
    # With e the relative error of a half's r, its variance is off by 2 e var and its mean by at most 3 e std (of four
    # values |y| <= 2); its std is at most sqrt(2) that of the whole. Together xhat moves by less than 8 e (1 + |xhat|).
    error = 8 * (error_a + error_b)
    bound = subject.output_bound(x) + np.where(error < 1 / 8, error, np.inf) * (1 + np.abs(s.xhat))
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = (x - mean) / np.sqrt(var + subject.eps)
    agree(expected, subject.train(x), bound, "y of the whole")


def _shown(subject, x):
    """Mean and variance by which x was normalized, and the relative error of what they are read from."""
    y = subject.train(x)
    high, low, columns = x.argmax(0), x.argmin(0), np.arange(x.shape[1])
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = y[high, columns] - y[low, columns]
        r = spread / (x[high, columns].astype(np.float64) - x[low, columns])
        mean = x[high, columns] - y[high, columns] / r
        error = 4 * subject.output_bound(x).max(0) / np.abs(spread)
        known = np.isfinite(error) & (spread != 0)
        return mean, r**-2 - subject.eps, np.where(known, error, np.inf)


# ---- shards


def vmapped(one):
    """Run one shard's function over the first axis, under vmap."""
    return jax.jit(jax.vmap(one, in_axes=(None, 0, 0), axis_name=AXIS))


def pmapped(one):
    """The same on two devices, under pmap."""
    return jax.pmap(one, in_axes=(None, 0, 0), axis_name=AXIS, devices=jax.devices()[:2])


def shard_mapped(one):
    """The same on two devices, under shard_map with its check of what varies."""
    mesh = jax.make_mesh((2,), (AXIS,), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))

    def local(variables, x, where):
        y, batch_stats = one(variables, x[0], None if where is None else where[0])
        return y[None], jax.tree.map(_as_shard, batch_stats)

    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), P(AXIS), P(AXIS)), out_specs=(P(AXIS), P(AXIS))))


def _as_shard(value):
    return jnp.asarray(value)[None]


def _shards(subject):
    return {"x": eight(subject)}


def _agree_sharded(subject, x, mapped):
    y, batch_stats = subject.shard_run(mapped, x.reshape(2, 4, -1))
    whole, expected = subject.run(x)
    agree(whole, y.reshape(x.shape), 2 * subject.output_bound(x), "y over shards")
    for shard in range(2):
        one = jax.tree.map(lambda v, i=shard: np.asarray(v)[i], batch_stats)
        agree_running(subject, expected, one, [x])


@law(
    statement="with axis_name, shards are normalized as their concatenation; every shard gets the same statistics",
    bound=f"twice {SLACK}; running statistics as in running_closed_form",
    source=CHAN,
    inputs=_shards,
    needs=("batch", "shards", "rank 2"),
)
def axis_name_equals_concatenation(subject, x):
    _agree_sharded(subject, x, vmapped)


@law(
    statement="with axis_name and pmap on two devices, shards are normalized as their concatenation",
    bound="as axis_name_equals_concatenation",
    source=CHAN,
    inputs=_shards,
    needs=("batch", "shards", "devices", "rank 2"),
    examples=0.4,
)
def pmap_equals_concatenation(subject, x):
    _agree_sharded(subject, x, pmapped)


@law(
    statement="with axis_name and a checked shard_map on two devices, shards are normalized as their concatenation",
    bound="as axis_name_equals_concatenation",
    source=CHAN,
    inputs=_shards,
    needs=("batch", "shards", "devices", "rank 2"),
    examples=0.4,
)
def shard_map_equals_concatenation(subject, x):
    _agree_sharded(subject, x, shard_mapped)


def _uneven(subject):
    return {
        "x": eight(subject),
        "counts": st.sampled_from([(4, 1), (1, 3), (2, 0), (0, 4), (3, 4)]),
    }


@law(
    statement="with axis_name and masks that leave shards different counts, even none, what counts is pooled",
    bound=f"twice {SLACK}; running statistics as in running_closed_form",
    source=COUNTS,
    inputs=_uneven,
    needs=("batch", "shards", "where", "rank 2"),
)
def axis_name_with_unequal_masks(subject, x, counts):
    mask = (np.arange(4) < np.array(counts)[:, None]).reshape(8)
    y, batch_stats = subject.shard_run(vmapped, x.reshape(2, 4, -1), mask.reshape(2, 4, 1))
    whole, expected = subject.run(x, where=mask[:, None])
    kept = x[mask]
    agree(whole[mask], y.reshape(x.shape)[mask], 2 * subject.output_bound(kept), "y of what counts")
    agree_running(subject, expected, jax.tree.map(lambda v: np.asarray(v)[0], batch_stats), [kept])


@law(
    statement="with axis_name, the gradient of the sum of all shards' losses is that of the concatenation",
    bound="twice 8 slack r D (1 + X^2), see gradient_matches_float64",
    source=CHAN,
    inputs=lambda s: _shards(s) | {"dy": eight(s, offsets=(0.5,), scales=(1.0,))},
    needs=("batch", "shards", "gradient", "rank 2"),
)
def axis_name_gradient(subject, x, dy):
    expected = subject.pull(x, dy)[0]
    dx = subject.shard_pull(x.reshape(2, 4, -1), dy.reshape(2, 4, -1)).reshape(x.shape)
    agree(expected, dx, 2 * subject.gradient_bound(x, dy), "dx over shards")
