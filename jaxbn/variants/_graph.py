"""Graph normalization: every graph of a batch by itself, with a learned share of its mean taken out."""

from collections.abc import Hashable

import jax
import jax.numpy as jnp

from jaxbn._affine import Activation, Initializer, affine_of, scale_shift
from jaxbn._axis_group import axis_group_of
from jaxbn._checks import check_residual, checked, checked_epsilon
from jaxbn._factory import normalizer_factory
from jaxbn._inputs import along, combined_weights, feature_shape, inexact, reduced_axes
from jaxbn._normalizer import Normalizer
from jaxbn._padding import silenced
from jaxbn._segments import normalize_segments, segment_weights, segments_of


@normalizer_factory
def graph_norm(
    num_segments: int | None = None,
    *,
    epsilon: float = 1e-5,
    feature_axis: int = -1,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
    use_mean_scale: bool = True,
    use_scale: bool = True,
    use_bias: bool = True,
    mean_scale_init: Initializer = jax.nn.initializers.ones,
    scale_init: Initializer = jax.nn.initializers.ones,
    bias_init: Initializer = jax.nn.initializers.zeros,
    dtype: jax.typing.DTypeLike | None = None,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    activation: Activation | None = None,
) -> Normalizer:
    """GraphNorm (Cai et al. 2021, section 4): statistics of each graph, and a learned share alpha of its mean.

        y = scale * (x - alpha * mean) / sqrt(mean(|x - alpha * mean|**2) + epsilon) + bias

    mean is that of the nodes of one graph, per feature, and so is the mean square. alpha, "mean_scale" in params, lets
    a layer keep what the mean says of a regular graph. It keeps no running statistics: training and evaluation compute
    the same.

    `apply` takes `segment_ids`, integers [nodes]: the graph of each node, in any order, from 0 to num_segments - 1.
    What is outside is padding, and y there is the bias, as at the mean of a graph with an alpha of 1. It also takes
    `residual`, an array of x's shape added before the activation. Packed sequences are normalized alike: for x of
    [rows, positions, features], segment_ids may be [rows, positions].

    Args:
      num_segments: how many graphs there are at most; None is as many as there are nodes, which always suffices, but
        costs a row of statistics for each, and digits where a graph has many thousands of nodes (see `moments`).
      epsilon: added to the mean square, inside the square root.
      feature_axis: the axis of the features.
      axis_name: named axis over which the nodes are sharded; on all shards the same id is the same graph.
      use_mean_scale: learn alpha; else it is 1, and this is instance normalization of graphs.
      use_scale: learn a scale.
      use_bias: learn a bias.
      mean_scale_init: mean_scale_init(key, shape, dtype), ones.
      scale_init: scale_init(key, shape, dtype), ones.
      bias_init: bias_init(key, shape, dtype), zeros.
      dtype: of the output; None is the input's.
      param_dtype: of the parameters.
      activation: elementwise function applied last.

    Returns:
      A Normalizer with params {"mean_scale", "scale", "bias"} of shape [features], and batch_stats {}.

    Raises:
      ValueError: a negative epsilon, num_segments below 1; and from apply, no segment_ids or some of another shape than
        x's, or params of another shape.
      TypeError: complex x, or segment_ids that are not integers.
    """
    checked_epsilon(epsilon)
    if num_segments is not None and num_segments < 1:
        raise ValueError(f"num_segments={num_segments}; expected at least 1 graph, or None for one a node.")
    axis_group = axis_group_of(axis_name, None)
    affine = affine_of(use_scale, use_bias, scale_init, bias_init, param_dtype)

    def init(key, x):
        shape = feature_shape(x, feature_axis)
        mean_key, affine_key = jax.random.split(key)
        mean_scale = {"mean_scale": mean_scale_init(mean_key, shape, param_dtype)} if use_mean_scale else {}
        return {"params": mean_scale | affine.init(affine_key, shape), "batch_stats": {}}

    def apply(variables, x, *, train, segment_ids=None, where=None, weights=None, rng=None, residual=None):
        del rng
        x = inexact(x)
        if jnp.iscomplexobj(x):
            raise TypeError(f"x has dtype {x.dtype}; graph_norm takes real arrays.")
        shape = feature_shape(x, feature_axis)
        shapes = affine.shapes(shape) | ({"mean_scale": shape} if use_mean_scale else {})
        params, batch_stats = checked(variables, x, train, feature_axis, shapes, {})
        if segment_ids is None:
            raise ValueError(f"graph_norm needs segment_ids=, the graph of each node of x, which has shape {x.shape}.")
        check_residual(residual, x)
        axes = reduced_axes(x.ndim, feature_axis)
        number = num_segments or jnp.size(segment_ids) * axis_group.size()
        ids, segments = segments_of(x, axes, segment_ids, max(number, 1), axis_group)
        counted = segment_weights(x, combined_weights(x, where, weights), ids, segments)
        xhat, _ = normalize_segments(x, params.get("mean_scale"), counted, ids, segments, epsilon)
        scale, bias = (along(params.get(name), x.ndim, feature_axis) for name in ("scale", "bias"))
        residual = silenced(residual, counted)
        return scale_shift(xhat, scale, bias, residual, activation, jnp.dtype(dtype or x.dtype)), batch_stats

    return Normalizer(init, apply)
