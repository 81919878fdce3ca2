"""Checkpoints of CrossQ in SBX (Bhatt et al. 2024), whose batch renormalization keeps its limits as variables."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxbn._layers import find_layers, flat_names, nested_names

_LIMITS = ("r_max", "d_max")
_NAMES = {"mean", "var", "steps", *_LIMITS}


def from_crossq(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of a linen network of SBX's BatchRenorm layers, for `jaxbn.linen.BatchRenorm` in their place.

    Every layer's "steps" becomes "step", and its limits, which do not change in training, are left out:
    `arguments_from_crossq` reads them. Critics that SBX maps with `nn.vmap` keep their first axis. In evaluation and
    while they warm up both layers compute the same. Afterwards SBX adds epsilon to a corrected variance, and the paper
    and jaxbn to the batch's own: they differ by a share of about epsilon / variance.

    Args:
      variables: {"params", "batch_stats"}, such as those of SBX's `actor_state` and `qf_state`.

    Returns:
      The same tree, arrays unchanged but for "step", int32.

    Raises:
      ValueError: no such layer among batch_stats.
    """
    flat = dict(flat_names(variables.get("batch_stats", {})))
    for path in _layers(variables):
        start = f"{path}/" if path else ""
        for name in _LIMITS:
            del flat[start + name]
        flat[f"{start}step"] = np.asarray(flat.pop(f"{start}steps"), np.int32)
    return {**variables, "batch_stats": nested_names(flat)}


def to_crossq(variables: Mapping[str, Any], *, r_max: float = 3, d_max: float = 5) -> dict[str, Any]:
    """The inverse of `from_crossq`: "steps", "r_max" and "d_max" in every layer that keeps a "step".

    Args:
      variables: {"params", "batch_stats"} of a linen network of `jaxbn.linen.BatchRenorm` layers.
      r_max: of the layers.
      d_max: of the layers.

    Raises:
      ValueError: no batch renormalization among batch_stats.
    """
    layers = find_layers(variables.get("batch_stats", {}), ("mean", "var", "step"))
    if not layers:
        raise ValueError(f"no batch renormalization, with a step, among batch_stats: {_shown(variables)}.")
    flat = dict(flat_names(variables["batch_stats"]))
    for path in layers:
        start = f"{path}/" if path else ""
        steps = np.asarray(flat.pop(f"{start}step"), np.int32)
        limits = {"r_max": r_max, "d_max": d_max}
        flat |= {f"{start}steps": steps} | {start + n: np.full(steps.shape, v) for n, v in limits.items()}
    return {**variables, "batch_stats": nested_names(flat)}


def arguments_from_crossq(
    variables: Mapping[str, Any], *, momentum: float = 0.99, epsilon: float = 1e-3, warm_up_steps: int = 100_000
) -> dict[str, Any]:
    """Arguments for `jaxbn.batch_renorm` that do what SBX's layers do: its defaults, and the limits that it saved.

    Args:
      variables: as in `from_crossq`, as SBX saved them.
      momentum: of the layers; the policy's `batch_norm_momentum`.
      epsilon: of the layers.
      warm_up_steps: of the layers.

    Raises:
      ValueError: no such layer among batch_stats, or layers with different limits.
    """
    found = {name: {float(v) for s in _layers(variables).values() for v in np.ravel(s[name])} for name in _LIMITS}
    if any(len(values) != 1 for values in found.values()):
        raise ValueError(f"the layers have limits {found}; expected the same in all of them: convert them one by one.")
    limits = {name: values.pop() for name, values in found.items()}
    return dict(decay=momentum, epsilon=epsilon, warmup_steps=warm_up_steps) | limits


def _layers(variables):
    layers = find_layers(variables.get("batch_stats", {}), _NAMES)
    if not layers:
        raise ValueError(
            f"no layer with {sorted(_NAMES)}, as SBX's BatchRenorm keeps them, among batch_stats: {_shown(variables)}."
        )
    return layers


def _shown(variables):
    return sorted(flat_names(variables.get("batch_stats", {})))
