"""Group normalization: every example by the mean and variance of groups of its channels."""

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._affine import Activation, Initializer, scale_shift
from jaxbn._axis_group import axis_group_of
from jaxbn._checks import check_several, checked_epsilon
from jaxbn._factory import normalizer_factory
from jaxbn._inputs import canonical_axes, feature_shape, reduced_axes, stats_dtype
from jaxbn._normalize import batch_normalize
from jaxbn._normalizer import Normalizer
from jaxbn.variants._each_example import each_example_norm


@normalizer_factory
def group_norm(
    num_groups: int | None = 32,
    *,
    group_size: int | None = None,
    epsilon: float = 1e-5,
    feature_axis: int = -1,
    batch_axis: int | Sequence[int] = 0,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
    use_scale: bool = True,
    use_bias: bool = True,
    scale_init: Initializer = jax.nn.initializers.ones,
    bias_init: Initializer = jax.nn.initializers.zeros,
    dtype: jax.typing.DTypeLike | None = None,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    activation: Activation | None = None,
) -> Normalizer:
    """Group normalization (Wu and He 2018, equations 1, 6 and 7).

    It keeps no running statistics: training and evaluation compute the same.

    The channels fall into groups of neighbours; mean and var are those of one group of one example, over all positions.
    One group is layer normalization over everything, as many groups as channels is instance normalization. `apply` also
    takes `residual`, an array of x's shape added before the activation.

    Args:
      num_groups: groups of channels, the paper's 32; None where group_size is given.
      group_size: channels a group, in place of num_groups.
      epsilon: added to the variance, inside the square root.
      feature_axis: the axis of the channels.
      batch_axis: the axis or axes of the examples.
      axis_name: named axis over which the positions are sharded: statistics are pooled over its shards.
      use_scale: learn a scale per channel.
      use_bias: learn a bias per channel.
      scale_init: scale_init(key, shape, dtype), ones.
      bias_init: bias_init(key, shape, dtype), zeros.
      dtype: of the output; None is the input's.
      param_dtype: of scale and bias.
      activation: elementwise function applied last.

    Returns:
      A Normalizer with params {"scale", "bias"} of shape [channels] and batch_stats {}.

    Raises:
      ValueError: both or neither of num_groups and group_size, or one below 1; and from init and apply, channels that
        they do not divide, or a single value a group.
    """
    checked_epsilon(epsilon)
    given = [size for size in (num_groups, group_size) if size is not None]
    if len(given) != 1 or given[0] < 1:
        raise ValueError(f"num_groups={num_groups} and group_size={group_size}; expected one of them, of 1 or more.")

    def compute(x, params, weights, residual):
        (channels,) = canonical_axes(feature_axis, x.ndim, "feature_axis")
        parts = _split(x, channels, groups(x))
        weights = None if weights is None else _split(weights, channels, groups(x))
        # The group axis takes the channels' place and is kept; axes behind it move up by one.
        batch = (a + (a > channels) for a in canonical_axes(batch_axis, x.ndim, "batch_axis"))
        axes = reduced_axes(parts.ndim, (*batch, channels), "batch_axis, feature_axis")
        check_several(parts, axes, axis_group_of(axis_name, None))
        how: dict[str, Any] = dict(axis=axes, epsilon=epsilon, axis_name=axis_name, dtype=stats_dtype(x))
        xhat = batch_normalize(parts, weights=weights, **how)[0].reshape(x.shape)
        return scale_shift(
            xhat, params.get("scale"), params.get("bias"), residual, activation, jnp.dtype(dtype or x.dtype)
        )

    def groups(x):
        (channels,) = feature_shape(x, feature_axis)
        if channels % given[0]:
            raise ValueError(
                f"x of shape {x.shape} has {channels} channels along feature_axis={feature_axis}; num_groups="
                f"{num_groups}, group_size={group_size} does not divide them: choose a divisor."
            )
        return given[0] if group_size is None else channels // group_size

    return each_example_norm(
        compute,
        {"scale": scale_init if use_scale else None, "bias": bias_init if use_bias else None},
        feature_axis=feature_axis,
        param_dtype=param_dtype,
        check=groups,
    )


def _split(v, axis, groups):
    """[..., channels, ...] as [..., groups, channels / groups, ...]; a length of 1, which broadcasts, as [1, 1]."""
    parts = (groups, v.shape[axis] // groups) if v.shape[axis] != 1 else (1, 1)
    return v.reshape(v.shape[:axis] + parts + v.shape[axis + 1 :])
