"""Virtual batch normalization: every example by a reference batch and itself."""

import math
from collections.abc import Hashable

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxbn._affine import Activation, Initializer, affine_of, scale_shift
from jaxbn._arithmetic import at_least_float32
from jaxbn._axis_group import axis_group_of, whole_axes
from jaxbn._checks import checked, checked_epsilon
from jaxbn._factory import normalizer_factory
from jaxbn._inputs import along, combined_weights, feature_shape, inexact, reduced_axes, stats_dtype
from jaxbn._measure import STATISTICS, centered, measure
from jaxbn._moments import Measured, Moments, merge_moments
from jaxbn._normalizer import Normalizer
from jaxbn._padding import silenced
from jaxbn._recording import unrecordable
from jaxbn._running import accepts, moved_where

_NO_RECORD = (
    "virtual_batch_norm keeps moments of its reference batch, not of the data: there are no population statistics of"
    " it, and microbatches would part the reference batch. Train with microbatches=1."
)


@normalizer_factory
def virtual_batch_norm(
    reference_size: int,
    *,
    epsilon: float = 1e-5,
    feature_axis: int = -1,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
    use_scale: bool = True,
    use_bias: bool = True,
    scale_init: Initializer = jax.nn.initializers.ones,
    bias_init: Initializer = jax.nn.initializers.zeros,
    dtype: jax.typing.DTypeLike | None = None,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    activation: Activation | None = None,
) -> Normalizer:
    """Virtual batch norm (Salimans et al. 2016, section 3.5): no example depends on the others of its batch.

    In training the first `reference_size` examples of x are the reference batch, chosen once and the same at each step:
    put it in front of the batch at the input of the network and drop its outputs at the end. It is normalized
    by its own statistics; every other example by those of the reference batch and itself put together. The reference
    statistics of the last training step are kept, so that at test time x has no reference batch in front. `apply`
    also takes `residual`, an array of x's shape added before the activation.

    Args:
      reference_size: examples in the reference batch (on each device, with axis_name).
      epsilon: added to the variance, inside the square root.
      feature_axis: the axis of the features, any but the first, which is the examples'.
      axis_name: named axis over which the reference batch is sharded.
      use_scale: learn a scale.
      use_bias: learn a bias.
      scale_init: scale_init(key, shape, dtype), ones.
      bias_init: bias_init(key, shape, dtype), zeros.
      dtype: of the output; None is the input's.
      param_dtype: of scale and bias.
      activation: elementwise function applied last.

    Returns:
      A Normalizer with params {"scale", "bias"} and batch_stats {"mean", "var", "count"}, all [features]: moments of
      the reference batch, which start at 0, 1 and the reference batch's number of values.

    Raises:
      ValueError: reference_size below 2, a negative epsilon; and from apply, shapes that do not fit or, in training,
        a batch shorter than that.
    """
    checked_epsilon(epsilon)
    if reference_size < 2:
        raise ValueError(f"reference_size={reference_size}; expected at least 2 examples: one has no variance.")
    axis_group = axis_group_of(axis_name, None)
    affine = affine_of(use_scale, use_bias, scale_init, bias_init, param_dtype)

    def init(key, x):
        shape = feature_shape(x, feature_axis)
        values = reference_size * (math.prod(x.shape[1:]) // max(math.prod(shape), 1))
        mean = jnp.zeros(shape, stats_dtype(x))
        batch_stats = {"mean": mean, "var": jnp.ones_like(mean.real), "count": jnp.full_like(mean.real, values)}
        return {"params": affine.init(key, shape), "batch_stats": batch_stats}

    def apply(variables, x, *, train, where=None, weights=None, rng=None, residual=None):
        del rng
        x = inexact(x)
        shape = feature_shape(x, feature_axis)
        kept = dict.fromkeys(("mean", "var", "count"), shape)
        params, batch_stats = checked(variables, x, train, feature_axis, affine.shapes(shape), kept)
        if 0 not in reduced_axes(x.ndim, feature_axis):
            raise ValueError(f"feature_axis={feature_axis} is the first axis of x, {x.shape}: that is the examples'.")
        weights = combined_weights(x, where, weights)
        if train:
            reference = checkpoint_name(_reference(x, weights), STATISTICS)
            batch_stats = _kept(batch_stats, reference)
        else:
            mean, var, count = (lax.stop_gradient(batch_stats[name]) for name in ("mean", "var", "count"))
            reference = Measured(count, mean, jnp.zeros_like(mean), var)
        xhat = _standardize(x, weights, reference, reference_size if train else 0)
        scale, bias = (along(params.get(name), x.ndim, feature_axis) for name in ("scale", "bias"))
        return scale_shift(xhat, scale, bias, residual, activation, jnp.dtype(dtype or x.dtype)), batch_stats

    def _reference(x, weights):
        if x.shape[0] < reference_size:
            raise ValueError(
                f"x has shape {x.shape}; in training its first {reference_size} examples are the reference batch."
            )
        axes = reduced_axes(x.ndim, feature_axis)
        if whole_axes(x, (0,)):
            return measure(x[:reference_size], _part(weights, slice(reference_size)), axes, axis_group)
        # A mesh of explicit axes shards the examples, which cannot be sliced then: the others get no weight.
        place = lax.broadcasted_iota(jnp.int32, x.shape, 0, out_sharding=jax.typeof(x).sharding)
        first = (place < reference_size).astype(at_least_float32(x).real.dtype)
        return measure(x, first if weights is None else first * weights, axes, axis_group)

    def _standardize(x, weights, reference, references):
        """(x - mean) / sqrt(var + epsilon), all relative to the reference mean, from which nothing is far."""
        axes = reduced_axes(x.ndim, feature_axis)
        c = silenced(centered(x, reference, axes), weights)
        own = _own_moments(c, weights, references)
        count = jnp.broadcast_to(reference.count, reference.mean.shape)
        # [1, features] beside [batch, features].
        kept = (v[None] for v in (count, jnp.zeros_like(reference.mean), reference.var))
        both = merge_moments(Moments(*kept), own)
        positions = axes[1:]
        mean, gain = (jnp.expand_dims(v, positions) for v in (both.mean, lax.rsqrt(both.var + epsilon)))
        return (c - mean) * gain

    def _own_moments(c, weights, references):
        """Moments of each example over its positions, [batch, features]; none for the reference batch."""
        positions = reduced_axes(c.ndim, feature_axis)[1:]
        counts = (jnp.arange(c.shape[0]) >= references).reshape((-1,) + (1,) * (c.ndim - 1))
        weights = counts.astype(c.real.dtype) if weights is None else weights * counts
        return measure(c, weights, positions, axis_group_of(None, None)).moments

    return unrecordable(Normalizer(init, apply), _NO_RECORD)


def _part(weights, examples):
    return weights if weights is None or weights.shape[0] == 1 else weights[examples]


def _kept(old, reference):
    """The reference moments as batch_stats; where nothing was seen or something is not finite, the old ones."""
    new = {"mean": reference.mean, "var": reference.var, "count": reference.count}
    new = {name: jnp.broadcast_to(v, old[name].shape) for name, v in new.items()}
    return moved_where(accepts(new["count"] > 0, new["mean"], new["var"]), old, new)
