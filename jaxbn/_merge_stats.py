"""Running statistics of several networks of one architecture pooled: those of clients, or of checkpoints."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._arithmetic import safe_divide
from jaxbn._layers import leaves_by_path, replace_layers
from jaxbn._moments import Measured, pool_along
from jaxbn._record import is_recorded

_MERGED = {"mean", "var", "weight"}


def merge_batch_stats(trees: Sequence[Any], counts: Sequence[float] | jax.Array, *, debias: bool = False) -> Any:
    """Statistics of all the examples that several networks saw, from those of each: the variance between them counts.

    With shares s = counts / sum(counts), for each feature

        mean = sum(s * mean_i)        var = sum(s * (var_i + |mean_i - mean|**2))

    An average of the variances alone, as federated averaging takes it, lacks the second term: clients of different
    means would be normalized by too small a variance (the formula: Chan, Golub and LeVeque 1983, section 2; what
    clients that differ do to batch norm: Hsieh et al. 2020, section 5). Params are averaged elsewhere, as usual.

    Args:
      trees: batch_stats, one of each network, as dicts, FrozenDicts or `nnx.State`s of one structure.
      counts: [networks], positive: how many examples each saw, or any weights.
      debias: of the normalizers.

    Returns:
      batch_stats of the same structure, shapes and dtypes. "weight" is the average of the networks'; what is counted
      in integers, such as "step" or "length", the largest. A feature that a network has not seen, by its "weight" or
      "length", counts for nothing; one that none has seen keeps what the first network has.

    Raises:
      ValueError: no trees, trees of unequal structure or shapes, counts of another number or not positive, or layers
        whose statistics are no moments: of `whitening_norm`, `virtual_batch_norm`, `stochastic_batch_norm`.
      TypeError: a record, as `start_pooling` makes it, in the place of batch_stats.
    """
    trees = list(trees)
    weights = _checked_counts(counts, len(trees))
    layers = [leaves_by_path(tree) for tree in trees]
    _check_alike(layers)
    merged = {}
    for path in layers[0]:
        stats = [{name: jnp.asarray(leaf) for name, leaf in layer[path].items()} for layer in layers]
        _check_moments(path, stats[0])
        merged[path] = _merged(stats, weights, debias)
    return replace_layers(trees[0], merged)


@partial(jax.jit, static_argnums=(2,))
def _merged(stats: list[dict[str, jax.Array]], weights: jax.Array, debias: bool) -> dict[str, jax.Array]:
    """The merged leaves of one layer, by name."""
    first, stacked = stats[0], {name: jnp.stack([s[name] for s in stats]) for name in stats[0]}
    found = {name: jnp.max(v, 0) for name, v in stacked.items() if jnp.issubdtype(v.dtype, jnp.integer)}
    if "mean" not in first:
        return found
    mean = _wide(stacked["mean"])
    counts = _along_rows(weights, mean) * _seen(stacked)
    var = _wide(stacked["var"]) if "var" in first else jnp.zeros_like(mean.real)
    if "weight" in first:
        shares = safe_divide(counts, jnp.sum(counts, 0, keepdims=True))
        found["weight"] = jnp.sum(shares * stacked["weight"], 0)
    if debias:
        mean, var = (safe_divide(v, stacked["weight"]) for v in (mean, var))
    pooled = pool_along(Measured(counts, mean, jnp.zeros_like(mean), var), 0)
    scale = found["weight"] if debias else 1
    found |= {"mean": scale * pooled.mean} | ({"var": scale * pooled.var} if "var" in first else {})
    return {name: _kept(first[name], value, pooled.count) for name, value in found.items()}


def _kept(first, value, count):
    """The merged leaf in the dtype of the first network's, which features that nobody has seen keep."""
    value = value if jnp.issubdtype(first.dtype, jnp.integer) else jnp.where(count > 0, value, first)
    return value.astype(first.dtype)


def _seen(stacked):
    """Whether each network has seen each feature, as far as its layer says: real, of the mean's shape."""
    mean = stacked["mean"]
    seen = jnp.ones(mean.shape, bool)
    if "weight" in stacked:
        seen &= stacked["weight"] > 0
    if "length" in stacked:  # [networks]: rows of the statistics that belong to a time step that was seen.
        rows = jnp.arange(mean.shape[1])[None] < stacked["length"][:, None]
        seen &= rows.reshape(rows.shape + (1,) * (mean.ndim - 2))
    return seen.astype(mean.real.dtype)


def _wide(v):
    return v.astype(jnp.promote_types(v.dtype, jnp.float32))


def _along_rows(weights, v):
    return jnp.broadcast_to(weights.reshape(-1, *(1,) * (v.ndim - 1)), v.shape).astype(v.real.dtype)


def _checked_counts(counts, number) -> jax.Array:
    if number == 0:
        raise ValueError("trees is empty; pass the batch_stats of at least one network.")
    values = jnp.asarray(counts)
    if values.shape != (number,):
        raise ValueError(f"counts has shape {values.shape} for {number} trees; pass one count for each of them.")
    if not isinstance(values, jax.core.Tracer) and not np.all((np.asarray(values) > 0) & np.isfinite(values)):
        raise ValueError(
            f"counts={np.asarray(values).tolist()}; expected finite numbers above 0: leave out a network that saw"
            " nothing."
        )
    return values


def _check_alike(layers):
    """ValueError that names the first leaf in which a tree differs from the first one."""
    expected = _shapes(layers[0])
    for number, layer in enumerate(layers[1:], 1):
        found = _shapes(layer)
        wrong = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
        if wrong:
            name = min(wrong)
            raise ValueError(
                f"trees[{number}] has {_described(found.get(name))} at {name!r}, where trees[0] has"
                f" {_described(expected.get(name))}; merge statistics of networks of one architecture."
            )


def _shapes(layer):
    named = {f"{path}/{name}": leaf for path, stats in layer.items() for name, leaf in stats.items()}
    records = [name for name, leaf in named.items() if is_recorded(leaf)]
    if records:
        raise TypeError(f"{records[0]!r} is a record of moments; pass plain batch_stats, as finish_pooling gives them.")
    return {name: jnp.shape(leaf) for name, leaf in named.items()}


def _described(shape):
    return "nothing" if shape is None else f"an array of shape {shape}"


def _check_moments(path, leaves):
    other = [n for n, v in leaves.items() if n not in _MERGED and not jnp.issubdtype(v.dtype, jnp.integer)]
    if other:
        raise ValueError(
            f"layer {path!r} keeps {sorted(leaves)}; {other[0]!r} is neither mean nor variance, and has no merged"
            " value. Measure this layer in the merged network, or keep what one network has."
        )
