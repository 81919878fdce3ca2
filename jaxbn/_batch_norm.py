"""Batch normalization, assembled: measure, normalize, update."""

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._affine import Activation, Initializer, affine_of
from jaxbn._axis_group import AxisGroup, axis_group_of
from jaxbn._checks import check_decay, check_several, checked, checked_epsilon
from jaxbn._factory import normalizer_factory
from jaxbn._inputs import feature_shape, inexact, reduced_axes, stats_dtype
from jaxbn._measure import pool_shards
from jaxbn._moments import Measured, pool_along
from jaxbn._normalize import normalize, normalize_by_batch
from jaxbn._normalizer import Normalizer
from jaxbn._padding import at_running_mean
from jaxbn._recording import MeasuringNormalizer, running_normalizer
from jaxbn._running import batch_stats_names, init_batch_stats, running_moments, update_batch_stats
from jaxbn._shuffled import normalize_shuffled

_SEVERAL = (
    "Train on more examples, share statistics across devices with axis_name, use train=False, or pass"
    " allow_single_value=True if that is what you want."
)


@normalizer_factory
def batch_norm(
    *,
    decay: float | None = 0.99,
    epsilon: float = 1e-5,
    feature_axis: int | Sequence[int] = -1,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    group_size: int | None = None,
    shuffle: bool = False,
    pool_axis_name: Hashable | tuple[Hashable, ...] | None = None,
    use_scale: bool = True,
    use_bias: bool = True,
    scale_init: Initializer = jax.nn.initializers.ones,
    bias_init: Initializer = jax.nn.initializers.zeros,
    dtype: jax.typing.DTypeLike | None = None,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    unbiased: bool = False,
    debias: bool = False,
    activation: Activation | None = None,
    skip_nonfinite: bool = True,
    allow_single_value: bool = False,
) -> Normalizer:
    """Batch normalization (Ioffe and Szegedy 2015): y = scale * (x - mean) / sqrt(var + epsilon) + bias.

    In training mean and var are those of the batch, per feature, and gradients flow through them; at test time
    they are the running ones. `apply` also takes `residual`, an array of x's shape added before the activation.
    `use_running` and `update` choose apart which statistics normalize and whether the running ones move: see `Apply`.

    Who shares mean and var, the scope, is chosen by four arguments, and for a given scope the result is the same on any
    number of devices. The whole batch: nothing under jit, `axis_name` in shard_map, pmap or vmap. Runs of n examples,
    be they a part of a device's batch, all of it or that of several devices: `group_size=n`, and `axis_name` as before.
    Other groups of devices: `axis_name` with `axis_index_groups`, or the axis_name of one axis of a mesh with the
    others in `pool_axis_name`. Each device for itself: `pool_axis_name` alone. The running statistics are those of all
    the values, pooled by count over groups, `axis_name` and `pool_axis_name`: they are the same on all shards.

    Args:
      decay: of the running statistics: new = decay * old + (1 - decay) * batch (torch's momentum is 1 - decay). None
        averages all batches equally.
      epsilon: added to the variance, inside the square root.
      feature_axis: the axis or axes kept; all others are reduced: -1 for dense layers and NHWC, 1 for NCHW.
      axis_name: named axis, or tuple of them, whose shards share statistics (shard_map, pmap, vmap).
      axis_index_groups: groups of equal size of indices on `axis_name` that share mean and var.
      group_size: ghost batches (Hoffer et al. 2017): each run of this many examples along the first axis that is not
        a feature axis is normalized by itself; where that is more than a shard holds, by runs of shards.
      shuffle: draw the ghost batches at random, from all examples of the batch and of the shards of `axis_name`, anew
        with each `rng` that `apply` is given in training (of the first shard, where shards have different ones).
      pool_axis_name: named axis, or tuple of them, whose shards have the running statistics in common and nothing else.
      use_scale: learn a scale, "scale" in params.
      use_bias: learn a bias, "bias" in params.
      scale_init: scale_init(key, shape, dtype), ones.
      bias_init: bias_init(key, shape, dtype), zeros.
      dtype: of the output; None is the input's.
      param_dtype: of scale and bias.
      unbiased: the running variance is the unbiased one, as torch stores it; normalization always takes the biased.
      debias: running averages start at zero and are corrected when read, so that early batches do not count short.
      activation: elementwise function applied last; the backward pass recomputes what it needs of the output.
      skip_nonfinite: a batch whose moments are not finite leaves the running statistics alone.
      allow_single_value: train even where each feature sees one value only, so that y is the bias.

    Returns:
      A Normalizer with params {"scale", "bias"} and batch_stats {"mean", "var"}, and "weight" with debias or
      decay=None; all of the features' shape. Running statistics are float32, float64 for float64 inputs.

    Raises:
      ValueError: decay outside [0, 1], a negative epsilon, debias with decay=None, a group_size below 1 or beside
        axis_index_groups, shuffle without group_size; and, from init and apply, inputs whose shapes do not fit.
    """
    _check_hyperparameters(decay, epsilon, debias, group_size, axis_index_groups, shuffle)
    axis_group = axis_group_of(axis_name, axis_index_groups)
    affine = affine_of(use_scale, use_bias, scale_init, bias_init, param_dtype)

    def init(key, x):
        shape = feature_shape(x, feature_axis)
        batch_stats = init_batch_stats(shape, stats_dtype(x), decay=decay, debias=debias)
        return {"params": affine.init(key, shape), "batch_stats": batch_stats}

    out: dict[str, Any] = dict(epsilon=epsilon, activation=activation, dtype=dtype)
    names = batch_stats_names(decay=decay, debias=debias)

    def read(variables, x, train):
        shape = feature_shape(x, feature_axis)
        kept = dict.fromkeys(names, shape)
        params, batch_stats = checked(variables, x, train, feature_axis, affine.shapes(shape), kept)
        return params.get("scale"), params.get("bias"), batch_stats, reduced_axes(x.ndim, feature_axis)

    def evaluate(variables, x, *, where, weights, rng=None, residual=None):
        del rng
        x = inexact(x)
        scale, bias, batch_stats, axes = read(variables, x, False)
        mean, var = running_moments(batch_stats, debias=debias)
        x = at_running_mean(x, mean, where, weights, feature_axis)
        return normalize(x, mean, var, scale, bias, axis=axes, residual=residual, **out)

    def train(variables, x, *, where, weights, rng=None, residual=None):
        x = inexact(x)
        scale, bias, _, axes = read(variables, x, True)
        if shuffle:
            how = dict(axes=axes, group_size=group_size, axis_group=axis_group, rng=rng, where=where, weights=weights)
            y, measured = normalize_shuffled(x, scale, bias, residual=residual, **how, **out)
            return y, _pooled(jax.lax.stop_gradient(measured), axis_group, axis_group, pool_axis_name, 0)
        scope, ghosts = _scope(axis_group, x.shape, axes, group_size)
        if not allow_single_value:
            check_several(x, axes, scope, f"feature_axis={feature_axis} keeps the others. {_SEVERAL}", ghosts)
        batch = dict(where=where, weights=weights, residual=residual)
        if ghosts is None:
            y, measured = normalize_by_batch(x, scale, bias, axis=axes, axis_group=scope, **batch, **out)
        else:
            y, measured = _ghost(x, scale, bias, axes, ghosts, batch, out)
        batch_axis = None if ghosts is None else axes[0]
        return y, _pooled(jax.lax.stop_gradient(measured), axis_group, scope, pool_axis_name, batch_axis)

    def update(batch_stats, measured):
        rule: dict[str, Any] = dict(decay=decay, unbiased=unbiased, debias=debias, skip_nonfinite=skip_nonfinite)
        return update_batch_stats(batch_stats, measured.moments, **rule)

    everyone = AxisGroup((*_names(axis_name), *_names(pool_axis_name)) or None)
    measuring = MeasuringNormalizer(init, train, evaluate)
    return running_normalizer(measuring, update, feature_axis=feature_axis, axis_group=everyone)


def _scope(axis_group, shape, axes, group_size) -> tuple[AxisGroup, int | None]:
    """The shards that share mean and var, and how many examples of a shard do, or None for all of them."""
    shards = axis_group.size()  # ValueError where the axis is not bound.
    if group_size is None:
        return axis_group, None
    if not axes:
        raise ValueError(f"group_size={group_size} splits the examples of x, which has shape {shape} and none.")
    batch = shape[axes[0]]
    if batch and group_size % batch == 0 and shards % (group_size // batch) == 0:
        run = group_size // batch
        if run in (1, shards):
            return axis_group if run == shards else AxisGroup(), None
        return axis_group._replace(groups=tuple(tuple(range(i, i + run)) for i in range(0, shards, run))), None
    if batch % group_size:
        raise ValueError(
            f"group_size={group_size} does not divide the batch of {batch} examples (x has shape {shape}), nor is it"
            f" that of a number of shards that divides {shards}; choose another, or pad the batch and mask the padding"
            " with where=."
        )
    return AxisGroup(), group_size


def _ghost(x, scale, bias, axes, group_size, batch, out) -> tuple[jax.Array, Measured]:
    """Split the batch axis into [groups, group_size] and normalize each group by itself."""
    batch_axis = axes[0]

    def split(v):
        if v is None:
            return None
        v = jnp.asarray(v)
        v = v.reshape((1,) * (x.ndim - v.ndim) + v.shape)
        groups = (-1, group_size) if v.shape[batch_axis] == x.shape[batch_axis] else (1, 1)
        return v.reshape(v.shape[:batch_axis] + groups + v.shape[batch_axis + 1 :])

    # The group axis takes the batch axis's place and counts as a feature axis; the rest moves up by one.
    how = dict(axis=tuple(axis + 1 for axis in axes), axis_group=AxisGroup())
    scale, bias = (None if v is None else jnp.expand_dims(v, batch_axis) for v in (scale, bias))
    batch = {name: split(v) for name, v in batch.items()}
    y, measured = normalize_by_batch(split(x), scale, bias, **how, **batch, **out)
    return y.reshape(x.shape), measured


def _pooled(measured, axis_group, scope, pool_axis_name, batch_axis) -> Measured:
    """Moments of all groups and shards, for the running statistics; batch_axis is that of ghost groups, or None."""
    names = [*_names(pool_axis_name), *(_names(axis_group.axis_name) if scope.axis_name is None else ())]
    others = AxisGroup(tuple(n for n in dict.fromkeys(names) if n not in _names(scope.axis_name)) or None)
    # The rows of groups of shards come first, those of ghost groups where the batch axis was.
    if batch_axis is not None or scope.groups is not None:
        measured = pool_along(measured, batch_axis or 0)
    others.size()  # ValueError where an axis is not bound.
    return pool_shards(measured, others)


def _names(axis_name):
    return () if axis_name is None else axis_name if isinstance(axis_name, tuple | list) else (axis_name,)


def _check_hyperparameters(decay, epsilon, debias, group_size, axis_index_groups, shuffle):
    check_decay(decay)
    checked_epsilon(epsilon)
    if debias and decay is None:
        raise ValueError("debias=True with decay=None: a plain average of all batches has no bias; leave debias out.")
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size={group_size}; expected at least 1 example a group, or None for no groups.")
    if group_size is not None and axis_index_groups is not None:
        raise ValueError("group_size and axis_index_groups both choose who shares statistics; pass one of them.")
    if shuffle and group_size is None:
        raise ValueError("shuffle=True draws which examples share a ghost batch; pass group_size too, its size.")
