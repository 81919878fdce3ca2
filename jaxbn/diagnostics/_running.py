"""Health of the running statistics of a network, layer by layer, in numbers and as a plain table."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxbn._layers import find_layers, leaves_by_path
from jaxbn._moments import Moments
from jaxbn._running import running_moments

# bias + _REACH * |scale| < 0: a standard normal is above 4 once in 30,000 values, so that a relu lets nothing through.
_REACH = 4.0
_AFFINE = ("scale", "bias")


class LayerSummary(NamedTuple):
    """One batch norm in figures.

    Attributes:
      path: of the layer, "/" between names.
      features: how many there are.
      constant: how many have a variance below epsilon: they are scaled by 1 / sqrt(epsilon) rather than standardized.
      silent: how many have a scale of 0, whatever the condition, and so tell nothing of their input.
      negative: how many a relu after the layer shuts off, whatever the condition: bias + 4 |scale| < 0, scale not 0.
      nonfinite: how many have a mean or variance that is not finite, or a negative variance.
      var_min: least running variance of the finite features.
      var_median: their median.
      var_max: their greatest.
      mean_over_std: greatest |mean| / sqrt(var + epsilon): how far the inputs lie from zero.
      mean_drift: greatest |running mean - batch mean| / sqrt(batch variance + epsilon); NaN without moments.
      var_drift: greatest |log2((running var + epsilon) / (batch variance + epsilon))|, 1 being a factor of two either
        way; NaN without moments.
    """

    path: str
    features: int
    constant: int
    silent: int
    negative: int
    nonfinite: int
    var_min: float
    var_median: float
    var_max: float
    mean_over_std: float
    mean_drift: float
    var_drift: float


def running_stats_summary(
    variables: Mapping[str, Any],
    moments: Mapping[str, Moments] | None = None,
    *,
    epsilon: float = 1e-5,
    debias: bool = False,
) -> list[LayerSummary]:
    """Health of every layer that keeps a running mean and variance.

    Args:
      variables: {"params", "batch_stats"}: dicts of any depth, `nnx.State`s, or those of one normalizer. Features of
        any shape. Layers without a running mean and variance, such as layer norm, have no row.
      moments: {path: Moments of the layer's input}, of a batch or of a data set, as `input_moments` measures them:
        what the running statistics are held against. Layers that it leaves out have no drift.
      epsilon: of the layers.
      debias: of the layers.

    Returns:
      One LayerSummary a layer, in the order of the tree. A layer without scale or bias counts as having ones or zeros;
      one that chooses them by class or vector counts what holds for every class or vector.
    """
    layers, params = find_layers(variables.get("batch_stats", {})), leaves_by_path(variables.get("params", {}))
    moments = {} if moments is None else moments
    return [
        _layer(path, stats, params.get(path, {}), moments.get(path), epsilon, debias) for path, stats in layers.items()
    ]


def running_stats_table(rows: Sequence[LayerSummary]) -> str:
    """The rows as text, one line a layer under a line of names, without trailing newline; drift only where measured."""
    drift = any(not np.isnan(row.mean_drift) for row in rows)
    names = [name for name in LayerSummary._fields if drift or not name.endswith("drift")]
    cells = [names] + [[_cell(getattr(row, name)) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(_line(row, widths) for row in cells)


def _layer(path, stats, params, moments, epsilon, debias) -> LayerSummary:
    stats = {name: jnp.asarray(value) for name, value in stats.items()}
    mean, var = (np.asarray(v) for v in running_moments(stats, debias=debias))
    mean, var = mean.astype(np.result_type(mean, np.float64)), var.astype(np.float64)
    sound = np.isfinite(mean) & np.isfinite(var) & (var >= 0)
    silent, negative = _shut(params, var.shape)
    finite = var[sound] if sound.any() else np.array([np.nan])
    return LayerSummary(
        path=path,
        features=var.size,
        constant=int(np.sum(sound & (var < epsilon))),
        silent=int(np.sum(silent)),
        negative=int(np.sum(negative)),
        nonfinite=int(np.sum(~sound)),
        var_min=float(finite.min()),
        var_median=float(np.median(finite)),
        var_max=float(finite.max()),
        mean_over_std=_greatest(np.abs(mean[sound]) / np.sqrt(var[sound] + epsilon)),
        **_drift(mean[sound], var[sound], moments, sound, epsilon),
    )


def _shut(params, features) -> tuple[np.ndarray, np.ndarray]:
    """Which features are silent and which negative, under every condition: bool, of the features' shape."""
    # Classes have a scale and bias each, along one more axis at the start.
    scale, bias = (np.asarray(params.get(n, default), float) for n, default in (("scale", 1.0), ("bias", 0.0)))
    rows = np.broadcast_shapes(scale.shape, bias.shape, (1, *features))
    scale, bias = np.abs(np.broadcast_to(scale, rows)), np.broadcast_to(bias, rows)
    # Vectors move the scale and bias by a kernel, [vector, features].
    fixed = [np.all(np.asarray(params.get(f"{n}_kernel", np.zeros((1, *features)))) == 0, axis=0) for n in _AFFINE]
    silent = np.all(scale == 0, axis=0) & fixed[0]
    return silent, np.all(bias + _REACH * scale < 0, axis=0) & ~silent & fixed[0] & fixed[1]


def _drift(mean, var, moments, sound, epsilon) -> dict[str, float]:
    if moments is None:
        return {"mean_drift": float("nan"), "var_drift": float("nan")}
    # A feature that saw nothing has moments of zero, which say nothing.
    seen = np.broadcast_to(np.asarray(moments.count), sound.shape)[sound] > 0
    batch_mean, batch_var = (np.broadcast_to(np.asarray(v), sound.shape)[sound] for v in (moments.mean, moments.var))
    shift = np.abs(mean - batch_mean) / np.sqrt(batch_var + epsilon)
    ratio = np.abs(np.log2((var + epsilon) / (batch_var + epsilon)))
    return {"mean_drift": _greatest(shift[seen]), "var_drift": _greatest(ratio[seen])}


def _greatest(values) -> float:
    return float(np.max(values)) if values.size else float("nan")


def _line(cells, widths) -> str:
    figures = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "  ".join([cells[0].ljust(widths[0]), *figures])


def _cell(value) -> str:
    if isinstance(value, str):
        return value or "."
    return str(value) if isinstance(value, int) else f"{value:.3g}"
