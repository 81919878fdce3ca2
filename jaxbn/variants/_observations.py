"""Normalizing observations as they come: by the mean and variance of everything seen so far, this batch included."""

from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._affine import Activation, scale_shift
from jaxbn._arithmetic import safe_divide, squared
from jaxbn._axis_group import axis_group_of
from jaxbn._checks import check_residual, checked, checked_epsilon
from jaxbn._factory import normalizer_factory
from jaxbn._inputs import along, combined_weights, feature_shape, inexact, reduced_axes, stats_dtype
from jaxbn._measure import measure
from jaxbn._moments import Measured
from jaxbn._normalizer import Normalizer
from jaxbn._padding import at_running_mean
from jaxbn._recording import MeasuringNormalizer, running_normalizer
from jaxbn._running import BatchStats, accepts, moved_where

_STATISTICS = ("count", "mean", "var")


@normalizer_factory
def running_norm(
    *,
    epsilon: float = 1e-8,
    feature_axis: int | Sequence[int] = -1,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    activation: Activation | None = None,
    skip_nonfinite: bool = True,
) -> Normalizer:
    """A running normalizer, as reinforcement learning has it for observations: y = (x - mean) / sqrt(var + epsilon).

    mean and var are those of all values seen so far, each counting once. In training the batch is taken into them
    first, and then normalized by them; at test time they stay. No gradient flows through them. The update is that of
    Chan, Golub and LeVeque (1983, equation 2.1), for one value Welford's (1962); what it does for agents: Andrychowicz
    et al. 2021, on input normalization. Clip by `activation`, as `functools.partial(jnp.clip, min=-10, max=10)`.

    A batch may be of any size, one observation included: as long as a feature has seen one value only, its y is 0. All
    statistics are kept as two floats, so that they stay those of float64 over millions of steps. `apply` also takes
    `residual`, an array of x's shape added before the activation.

    Args:
      epsilon: added to the variance, inside the square root.
      feature_axis: the axis or axes kept; all others are observations.
      axis_name: named axis, or tuple of them, whose shards share the statistics.
      dtype: of the output; None is the input's.
      activation: elementwise function applied last.
      skip_nonfinite: a batch whose moments are not finite leaves the statistics alone.

    Returns:
      A Normalizer without params, and with batch_stats {"count", "mean", "var"} of the features' shape, which start at
      0, 0 and 1, and {"count_rest", "mean_rest", "var_rest"}, what rounding lost of them.

    Raises:
      ValueError: a negative epsilon; and from apply, shapes that do not fit.
    """
    checked_epsilon(epsilon)
    axis_group = axis_group_of(axis_name, None)

    def init(key, x):
        del key
        mean = jnp.zeros(feature_shape(x, feature_axis), stats_dtype(x))
        start = {"count": jnp.zeros_like(mean.real), "mean": mean, "var": jnp.ones_like(mean.real)}
        rest = {f"{name}_rest": jnp.zeros_like(value) for name, value in start.items()}
        return {"params": {}, "batch_stats": start | rest}

    def read(variables, x, train):
        kept = dict.fromkeys((*_STATISTICS, *(f"{name}_rest" for name in _STATISTICS)), feature_shape(x, feature_axis))
        return checked(variables, x, train, feature_axis, {}, kept)[1]

    def by(batch_stats, x, where, weights, residual):
        check_residual(residual, x)
        mean, rest, var = (lax.stop_gradient(batch_stats[name]) for name in ("mean", "mean_rest", "var"))
        x = at_running_mean(x, mean, where, weights, feature_axis)
        mean, rest, inverse = (along(v, x.ndim, feature_axis) for v in (mean, rest, lax.rsqrt(var + epsilon)))
        return scale_shift((x - mean - rest) * inverse, None, None, residual, activation, jnp.dtype(dtype or x.dtype))

    def evaluate(variables, x, *, where, weights, rng=None, residual=None):
        del rng
        x = inexact(x)
        return by(read(variables, x, False), x, where, weights, residual)

    def train(variables, x, *, where, weights, rng=None, residual=None):
        del rng
        x = inexact(x)
        batch_stats, axes = read(variables, x, True), reduced_axes(x.ndim, feature_axis)
        measured = lax.stop_gradient(measure(x, combined_weights(x, where, weights), axes, axis_group))
        return by(update(batch_stats, measured), x, where, weights, residual), measured

    def update(batch_stats, measured):
        return _with_batch(batch_stats, measured, skip_nonfinite)

    measuring = MeasuringNormalizer(init, train, evaluate)
    return running_normalizer(measuring, update, feature_axis=feature_axis, axis_group=axis_group)


def _with_batch(old: BatchStats, batch: Measured, skip_nonfinite: bool) -> BatchStats:
    """Statistics that include the batch, each as two floats.

    With n of N values in the batch: mean + (mean_batch - mean) n / N; var + (var_batch - var) n / N +
    |mean_batch - mean|**2 (1 - n / N) n / N.
    """
    # The first batch replaces what was there: 1 + (var - 1) would round a small variance to the precision of 1.
    here = {name: jnp.where(old["count"] > 0, value, 0) for name, value in old.items()}
    share = safe_divide(batch.count, here["count"] + batch.count)
    apart, of_rest = batch.mean - here["mean"], batch.remainder - here["mean_rest"]
    between = (1 - share) * squared(apart + of_rest)
    more = {
        "count": (jnp.broadcast_to(batch.count, share.shape), 0),
        "mean": (share * apart, share * of_rest),
        "var": (share * ((batch.var - here["var"] - here["var_rest"]) + between), 0),
    }
    new = {}
    for name, (large, small) in more.items():
        total, lost = _two_sum(here[name], large)
        new[name], new[f"{name}_rest"] = _two_sum(total, lost + (here[f"{name}_rest"] + small))
    accept = accepts(batch.count > 0, new["mean"], new["var"], skip_nonfinite=skip_nonfinite)
    return moved_where(accept, old, new)


def _two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A + b rounded, and what rounding lost (Knuth 1997, section 4.2.2, theorem B)."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)
