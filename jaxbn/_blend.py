"""Running statistics blended with those of a few examples from where the network is used."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._arithmetic import safe_divide
from jaxbn._layers import find_layers, replace_layers
from jaxbn._moments import Moments
from jaxbn._running import accepts, moved_where


def blend(
    batch_stats: Any,
    moments: Moments | Mapping[str, Moments],
    *,
    prior_count: float | jax.Array,
    count: float | jax.Array | None = None,
    debias: bool = False,
) -> Any:
    """Test-time adaptation with few examples (Schneider et al. 2020, section 2).

        mean = (N mean_running + n mean_batch) / (N + n)        var = (N var_running + n var_batch) / (N + n)

    N, the prior_count, is how many examples the running statistics are worth: 0 forgets them. n is the number of the
    examples at hand. As the paper has it, variances are averaged and nothing is added for what lies between the means.

    Args:
      batch_stats: of one layer, {"mean", "var"} of shape [features]; or of a network, then with a mapping of moments.
      moments: of the layer's input on those examples, as `jaxbn.moments` measures them; or {path: Moments}, as
        `input_moments` measures them. Layers that the mapping does not name stay as they are.
      prior_count: N, at least 0.
      count: n; None is the number of values that each feature saw. The paper counts images: with positions in them
        pass their number, or count positions in N too.
      debias: of the normalizers.

    Returns:
      batch_stats of the same structure, shapes and dtypes. A feature that saw nothing, and a layer whose moments are
      not finite, keep their statistics. No gradient flows into them.

    Raises:
      ValueError: prior_count or count below 0, a path that is no layer's, or moments of other features.
    """
    for name, value in (("prior_count", prior_count), ("count", count)):
        if isinstance(value, int | float) and not value >= 0:
            raise ValueError(f"{name}={value}; expected a number of examples of at least 0.")
    layers = find_layers(batch_stats)
    given = {"": moments} if isinstance(moments, Moments) else moments
    unknown = sorted(set(given) - set(layers))
    if unknown:
        raise ValueError(f"moments name the layer {unknown[0]!r}; batch_stats has the layers {sorted(layers)}.")
    blended = {path: _blended(path, layers[path], m, prior_count, count, debias) for path, m in given.items()}
    return replace_layers(batch_stats, blended)


def _blended(path, stats, moments, prior_count, count, debias):
    shapes = jnp.shape(moments.mean), jnp.shape(stats["mean"])
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the moments of layer {path!r} have features of shape {shapes[0]}; its statistics have {shapes[1]}:"
            " measure over all other axes."
        )
    old = {name: jnp.asarray(stats[name]) for name in ("mean", "var")}
    # Averages that are corrected when read are kept multiplied by their weight.
    return _average(old, Moments(*moments), stats["weight"] if debias else 1.0, prior_count, count)


@jax.jit
def _average(old, moments, scale, prior_count, count):
    seen = jnp.broadcast_to(moments.count, old["var"].shape)
    n = seen if count is None else jnp.where(seen > 0, jnp.asarray(count, seen.dtype), 0)
    share, kept = (safe_divide(part, n + prior_count) for part in (n, jnp.full_like(n, prior_count)))
    new = {"mean": moments.mean, "var": moments.var}
    moved = {name: kept * old[name] + share * scale * new[name] for name in old}
    return moved_where(accepts(n > 0, moments.mean, moments.var), old, moved)
