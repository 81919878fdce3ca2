"""Running statistics: how they start, how a batch moves them, and what they say of the population."""

from functools import reduce

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._axis_group import AxisGroup
from jaxbn._moments import Measured, Moments, pool_along

BatchStats = dict[str, jax.Array]


def batch_stats_names(*, decay: float | None, debias: bool = False) -> tuple[str, ...]:
    """The entries that `init_batch_stats` makes for these hyperparameters."""
    return ("mean", "var", "weight") if debias or decay is None else ("mean", "var")


def init_batch_stats(
    shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike = jnp.float32,
    *,
    decay: float | None,
    debias: bool = False,
) -> BatchStats:
    """Running statistics before the first batch.

    Args:
      shape: of the features.
      dtype: of the mean, float32 or wider, real or complex; var is real.
      decay: as in `update_batch_stats`; None keeps a count of batches beside the statistics.
      debias: whether the averages start at zero and are corrected when read.

    Returns:
      {"mean": zeros, "var": ones}; and with debias or decay=None {"weight": zeros}, what each feature's averages
      weigh so far; with debias var starts at zero too.
    """
    real = jnp.zeros((), dtype).real.dtype
    start = jnp.zeros if debias else jnp.ones
    batch_stats = {"mean": jnp.zeros(shape, dtype), "var": start(shape, real)}
    if "weight" in batch_stats_names(decay=decay, debias=debias):
        batch_stats["weight"] = jnp.zeros(shape, real)
    return batch_stats


def update_batch_stats(
    batch_stats: BatchStats,
    moments: Moments,
    *,
    decay: float | jax.Array | None,
    unbiased: bool = False,
    debias: bool = False,
    skip_nonfinite: bool = True,
) -> BatchStats:
    """Move the running statistics by one batch: new = decay * old + (1 - decay) * batch.

    `decay` is the share of the old: torch's momentum is 1 - decay, Flax's momentum is decay. A feature that saw
    nothing (count 0) keeps its statistics. No gradient flows into the result.

    Args:
      batch_stats: {"mean", "var"} of shape [features], and "weight" where `init_batch_stats` made one.
      moments: of the batch.
      decay: between 0 and 1; None is the plain average of all batches so far.
      unbiased: store var * n / (n - 1), as torch does, in place of the biased variance; where n <= 1, the biased.
      debias: the averages started at zero and `running_moments` corrects them (Kingma and Ba 2015, section 3).
      skip_nonfinite: a batch in which any mean or variance is not finite changes nothing.

    Returns:
      New batch_stats of the same structure, shapes and dtypes.

    Raises:
      ValueError: "weight" is missing where decay=None or debias needs it.
    """
    old, moments = lax.stop_gradient((batch_stats, moments))
    counted = decay is None or debias
    if counted and "weight" not in old:
        raise ValueError(
            f"batch_stats has {sorted(old)}; decay=None and debias=True need 'weight' too: make batch_stats"
            " with the same decay and debias."
        )
    batch = {"mean": moments.mean, "var": _unbiased(moments) if unbiased else moments.var}
    if counted:
        batch["weight"] = jnp.ones_like(old["weight"])
    accept = accepts(moments.count > 0, moments.mean, moments.var, skip_nonfinite=skip_nonfinite)
    moved = _cumulative(old, batch) if decay is None else _exponential(old, batch, decay)
    return moved_where(accept, old, moved)


def accepts(seen: jax.Array, *statistics: jax.Array, skip_nonfinite: bool = True) -> jax.Array:
    """Whether a batch moves the running statistics: a batch that is not finite changes nothing.

    Args:
      seen: boolean, whether the batch held anything, for all features or for each.
      *statistics: of the batch, of shapes that broadcast.
      skip_nonfinite: refuse the batch where any of these is not finite; False accepts it.

    Returns:
      Boolean, of the shape of `seen`.
    """
    if not skip_nonfinite:
        return seen
    # One reduction for all: each takes XLA:CPU three kernels to compile.
    return seen & jnp.all(reduce(jnp.logical_and, map(jnp.isfinite, statistics)))


def moved_where(accept: jax.Array, old: BatchStats, new: BatchStats) -> BatchStats:
    """The new statistics where accepted, else the old ones, in the dtypes of the old; no gradient flows into them."""
    old, new = lax.stop_gradient((old, new))
    return {name: jnp.where(accept, new[name].astype(old[name].dtype), old[name]) for name in old}


def over_all_groups(rows: Measured, axis_group: AxisGroup) -> Measured:
    """Moments of all groups of shards pooled, for running statistics that are the same on every shard.

    Args:
      rows: as `AxisGroup.psum` gives them: with groups [groups, features].
      axis_group: the groups.
    """
    return rows if axis_group.groups is None else pool_along(rows, 0)


def running_moments(batch_stats: BatchStats, *, debias: bool = False) -> tuple[jax.Array, jax.Array]:
    """Mean and variance to normalize with at test time: [features] each; no gradient flows into them.

    With debias the averages are divided by their weight, 1 - decay**steps for a constant decay; before the first batch
    they are 0 and 1.
    """
    batch_stats = lax.stop_gradient(batch_stats)
    mean, var = batch_stats["mean"], batch_stats["var"]
    if not debias:
        return mean, var
    weight = batch_stats["weight"]
    seen = weight > 0
    weight = jnp.where(seen, weight, 1)
    return mean / weight, jnp.where(seen, var / weight, 1)


def _exponential(old, batch, decay):
    return {name: decay * old[name] + (1 - decay) * batch[name] for name in old}


def _cumulative(old, batch):
    weight = old["weight"] + 1
    # The first batch replaces what was there: 1 + (var - 1) would round a small variance to the precision of 1.
    start = {name: jnp.where(old["weight"] > 0, old[name], batch[name]) for name in ("mean", "var")}
    average = {name: value + (batch[name] - value) / weight for name, value in start.items()}
    return average | {"weight": weight}


def _unbiased(moments):
    n = moments.count
    return moments.var * jnp.where(n > 1, n / jnp.where(n > 1, n - 1, 1), 1)
