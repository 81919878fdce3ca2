"""Batch whitening: remove all linear relations between features, beyond their means and variances."""

from collections.abc import Callable, Hashable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxbn._affine import Activation, Initializer, affine_of, scale_shift
from jaxbn._arithmetic import safe_divide
from jaxbn._axis_group import axis_group_of
from jaxbn._checks import check_decay, check_several, checked, checked_epsilon
from jaxbn._factory import normalizer_factory
from jaxbn._inputs import along, canonical_axes, combined_weights, feature_shape, inexact, reduced_axes, stats_dtype
from jaxbn._measure import STATISTICS, centered, measure_groups
from jaxbn._normalizer import Normalizer
from jaxbn._padding import silenced
from jaxbn._recording import unrecordable
from jaxbn._running import accepts, moved_where, over_all_groups
from jaxbn.variants._inverse_root import inverse_square_root

_NO_RECORD = (
    "whitening_norm does not record covariances: there are no population statistics of it, and a train step with"
    " microbatches has to be built with pool=False."
)


@normalizer_factory
def whitening_norm(
    *,
    group_size: int | None = None,
    inverse_root: Callable[[jax.Array], jax.Array] = inverse_square_root,
    decay: float = 0.99,
    epsilon: float = 1e-5,
    feature_axis: int = -1,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    use_scale: bool = True,
    use_bias: bool = True,
    scale_init: Initializer = jax.nn.initializers.ones,
    bias_init: Initializer = jax.nn.initializers.zeros,
    dtype: jax.typing.DTypeLike | None = None,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    activation: Activation | None = None,
    skip_nonfinite: bool = True,
) -> Normalizer:
    """Batch whitening: y = scale * (covariance + epsilon I)**-1/2 (x - mean) + bias.

    With the default `inverse_root` this is ZCA whitening (Huang et al. 2018, Decorrelated Batch Normalization,
    algorithm 1), the whitening that moves x least. With `newton_inverse_square_root` it is Iterative Normalization
    (Huang et al. 2019, algorithm 1), which whitens nearly and costs matrix products only. In training mean and
    covariance are the batch's, and gradients flow through both; at test time the running mean and the running whitening
    matrix are used, as both papers have it. `apply` also takes `residual`, an array of x's shape added before the
    activation.

    Two collectives forward, not one: the covariance is measured from the exact mean.

    Args:
      group_size: features are whitened in groups of that many neighbours, such as 16; None whitens all together. Choose
        fewer than there are values per feature.
      inverse_root: the inverse square root of positive definite matrices, [groups, d, d] to [groups, d, d].
      decay: of the running statistics: new = decay * old + (1 - decay) * batch.
      epsilon: added to the covariance's diagonal.
      feature_axis: the axis kept.
      axis_name: named axis, or tuple of them, whose shards share statistics.
      axis_index_groups: groups of indices on `axis_name` that share statistics.
      use_scale: learn a scale.
      use_bias: learn a bias.
      scale_init: scale_init(key, shape, dtype), ones.
      bias_init: bias_init(key, shape, dtype), zeros.
      dtype: of the output; None is the input's.
      param_dtype: of scale and bias.
      activation: elementwise function applied last.
      skip_nonfinite: a batch whose statistics are not finite leaves the running ones alone.

    Returns:
      A Normalizer with params {"scale", "bias"} and batch_stats {"mean"}, all [features], and {"whitening"}, of shape
      [groups, group_size, group_size], which starts as the identity.

    Raises:
      TypeError: complex x.
      ValueError: decay outside [0, 1], a negative epsilon, group_size below 1; and from init and apply, a group_size
        that does not divide the features, a mask that differs between features, or one value per feature.
    """
    check_decay(decay)
    checked_epsilon(epsilon)
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size={group_size}; expected at least 1 feature a group, or None for one group.")
    axis_group = axis_group_of(axis_name, axis_index_groups)
    affine = affine_of(use_scale, use_bias, scale_init, bias_init, param_dtype)

    def init(key, x):
        shape, (groups, size) = feature_shape(x, feature_axis), _groups(x)
        eye = jnp.broadcast_to(jnp.eye(size, dtype=stats_dtype(x)), (groups, size, size))
        batch_stats = {"mean": jnp.zeros(shape, stats_dtype(x)), "whitening": eye}
        return {"params": affine.init(key, shape), "batch_stats": batch_stats}

    def apply(variables, x, *, train, where=None, weights=None, rng=None, residual=None):
        del rng
        x = inexact(x)
        if jnp.iscomplexobj(x):
            raise TypeError(f"x has dtype {x.dtype}; whitening takes real arrays.")
        shape, (groups, size) = feature_shape(x, feature_axis), _groups(x)
        kept = dict(mean=shape, whitening=(groups, size, size))
        params, batch_stats = checked(variables, x, train, feature_axis, affine.shapes(shape), kept)
        weights = combined_weights(x, where, weights)
        if train:
            axes = reduced_axes(x.ndim, feature_axis)
            check_several(x, axes, axis_group, "Train on more examples, or use train=False.")
            rows = measure_groups(x, weights, axes, axis_group)
            c = silenced(centered(x, axis_group.select_group(rows), axes), weights)
            covariances = _covariances(c, weights, rows.count)
            whitening = _inverse_root(axis_group.select_group(covariances))
            batch_stats = _moved(batch_stats, rows, covariances, whitening)
        else:
            mean, whitening = (lax.stop_gradient(batch_stats[name]) for name in ("mean", "whitening"))
            c = silenced(x - along(mean, x.ndim, feature_axis), weights)
        xhat = _merged(
            _product(f"{_POSITIONS[: x.ndim - 1]}gi,gij->{_POSITIONS[: x.ndim - 1]}gj", _rows(c), whitening), x
        )
        scale, bias = (along(params.get(name), x.ndim, feature_axis) for name in ("scale", "bias"))
        return scale_shift(xhat, scale, bias, residual, activation, jnp.dtype(dtype or x.dtype)), batch_stats

    def _inverse_root(covariance):
        return inverse_root(covariance + epsilon * jnp.eye(covariance.shape[-1], dtype=covariance.dtype)[None])

    def _moved(batch_stats, rows, covariances, whitening):
        """The running statistics moved by the batch, which with groups of shards is that of all groups."""
        rows, covariances, whitening = lax.stop_gradient((rows, covariances, whitening))
        measured = over_all_groups(rows, axis_group)
        if axis_group.groups is not None:
            whitening = _inverse_root(_pooled_covariance(rows, measured, covariances))
        seen = jnp.any(measured.count > 0)
        means = measured.mean.reshape(*whitening.shape[:-1], 1)
        accept = accepts(seen, means, whitening, skip_nonfinite=skip_nonfinite)
        new = {"mean": measured.mean, "whitening": whitening}
        return moved_where(accept, batch_stats, {n: decay * batch_stats[n] + (1 - decay) * new[n] for n in new})

    def _covariances(c, weights, counts):
        """Weighted mean of c c^T over values and shards: [d, d] for each group of features, zeros where nothing counts.

        With groups of shards as `AxisGroup.psum` gives it.
        """
        rows = _rows(c)
        share = safe_divide(jnp.ones((), rows.dtype), jnp.max(axis_group.select_group(counts)))
        if weights is None:
            # Each factor is multiplied by the root of the share, so that the sum of squares does not overflow.
            rows = rows * jnp.sqrt(share)
            return _total(_sum_of_products(rows, rows))
        (axis,) = canonical_axes(feature_axis, c.ndim, "feature_axis")
        if weights.shape[axis] != 1:
            raise ValueError(
                f"where or weights differ between features: their shape is {weights.shape}; whitening needs all of an"
                f" example's features, so give them length 1 along feature_axis={feature_axis}."
            )
        weights = jnp.broadcast_to(jnp.moveaxis(weights, axis, -1), (*jnp.moveaxis(c, axis, -1).shape[:-1], 1))
        weights = jnp.expand_dims(weights, -1)
        rows = jnp.where(weights == 0, 0, rows)
        return _total(_sum_of_products(rows * share * weights, rows))

    def _total(products):
        # By this name the policies of `jax.checkpoint` keep it, and the backward pass needs no collective for it.
        return checkpoint_name(axis_group.psum(products), STATISTICS)

    def _pooled_covariance(rows, measured, covariances):
        """Covariance of all values: those within the groups of shards, and that of the groups' means."""
        share = safe_divide(jnp.max(rows.count, -1), jnp.max(measured.count))
        apart = (rows.mean - measured.mean[None]) + (rows.remainder - measured.remainder[None])
        apart = apart.reshape(*covariances.shape[:-1])
        within = jnp.sum(share[:, None, None, None] * covariances, 0)
        return within + _product("ngi,ngj->gij", share[:, None, None] * apart, apart)

    def _rows(c):
        """[..., groups, features of a group]; the axes of the values stay, over which a mesh may shard them."""
        c = jnp.moveaxis(c, feature_axis, -1)
        return c.reshape(*c.shape[:-1], *_groups(c if feature_axis == -1 else jnp.moveaxis(c, -1, feature_axis)))

    def _merged(rows, x):
        moved = jnp.moveaxis(x, feature_axis, -1).shape
        return jnp.moveaxis(rows.reshape(moved), -1, feature_axis)

    def _groups(x):
        (features,) = feature_shape(x, feature_axis)
        size = features if group_size is None else group_size
        if features % size:
            raise ValueError(
                f"x of shape {x.shape} has {features} features along feature_axis={feature_axis}; group_size={size}"
                " does not divide them: choose a divisor."
            )
        return features // size, size

    return unrecordable(Normalizer(init, apply), _NO_RECORD)


_POSITIONS = "abcdefkl"


def _sum_of_products(a, b):
    """Sum over all values of a b^T: [groups, d, d]; on a mesh of explicit axes every device has the whole of it."""
    values = _POSITIONS[: a.ndim - 2]
    mesh = jax.typeof(a).sharding.mesh
    everywhere = NamedSharding(mesh, P()) if AxisType.Explicit in mesh.axis_types else None
    return _product(f"{values}gi,{values}gj->gij", a, b, everywhere)


def _product(spec, a, b, out_sharding=None):
    # Accelerators multiply float32 matrices in fewer bits unless told otherwise; whitening amplifies that error.
    return jnp.einsum(spec, a, b, precision="highest", out_sharding=out_sharding)
