"""Which params weight decay should reach: those that are no norm's."""

from collections.abc import Mapping
from typing import Any

import jax

from jaxbn._layers import leaves_by_path
from jaxbn.variants._frozen import path_name

# What the params of normalizers are called, jaxbn's and Flax's.
_NORM_NAMES = {"scale", "bias", "mean_scale", "scale_kernel", "bias_kernel", "threshold", "epsilon"}


def decay_mask(variables: Mapping[str, Any], *, biases: bool = True) -> Any:
    """For each param, whether weight decay should reach it: a tree of bools, False for scales and biases of norms.

        optimizer = optax.adamw(1e-3, weight_decay=0.05, mask=jaxbn.decay_mask(variables))

    Optax also takes `lambda params: jaxbn.decay_mask({"params": params, "batch_stats": batch_stats})`, which fits
    whatever an `nnx.Optimizer` makes of the params.

    Norms are found by structure and not by what they are called: a node is one where its params have no other names
    than a norm's (scale and bias, or one of them), or where running statistics of its path stand beside them.

    Args:
      variables: {"params", "batch_stats", ...} of a network or of one normalizer: nested dicts, boxed values among
        them, or an `nnx.State` each. "batch_stats" may be missing.
      biases: whether decay reaches the biases of other layers.

    Returns:
      A tree of the structure of params, as `optax.adamw` and `optax.masked` take it.

    Raises:
      ValueError: variables without "params".
    """
    if "params" not in variables:
        raise ValueError(f"variables has {sorted(variables)}; expected what init returned, with 'params' among them.")
    params, stats = variables["params"], variables.get("batch_stats", {})
    measured = {path for path, leaves in leaves_by_path(stats).items() if "mean" in leaves}
    norms = {path for path, leaves in leaves_by_path(params).items() if set(leaves) <= _NORM_NAMES} | measured

    def decays(path, leaf):
        del leaf
        node, _, name = path_name(path).rpartition("/")
        return node not in norms and (biases or name != "bias")

    return jax.tree_util.tree_map_with_path(decays, params)
