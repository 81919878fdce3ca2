"""The loss on lines and planes between parameter vectors, with statistics that fit each point and with stale ones."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxbn.diagnostics._network import (
    Loss,
    Variables,
    check_alike,
    checked_output,
    checked_variables,
    key_of,
    mean_loss,
    vector_of,
)


class Interpolation(NamedTuple):
    """The mean loss at points between corners, under three kinds of statistics: [points] or [points, points].

    Attributes:
      recomputed: by the training loss: statistics are those of the batch at each point.
      stale: by the evaluation loss, with the running statistics of the first corner: what a network shows into which
        only new params were loaded.
      averaged: by the evaluation loss, with running statistics that are interpolated as if they were params.
    """

    recomputed: Array
    stale: Array
    averaged: Array


def interpolate(
    train_loss: Loss,
    eval_loss: Loss,
    corners: Sequence[Variables],
    batch: Any,
    coordinates: Sequence[ArrayLike],
    *,
    rng: Array | None = None,
) -> Interpolation:
    """The loss at `corner_0 + a (corner_1 - corner_0) + b (corner_2 - corner_0)`, for all a and b (Im et al. 2016).

    Params between two trained networks have other statistics than either: the running statistics of an end, or their
    average, belong to another network. `recomputed` is the loss to look at; the others show how large the mistake is.

    Args:
      train_loss: loss(variables, batch, rng) -> LossOutput in training mode; see `jaxbn.diagnostics`. A batch that
        holds the whole data set gives exact statistics; with `over_batches` each batch has its own.
      eval_loss: the same in evaluation mode, normalizing by variables["batch_stats"]. A network without statistics may
        pass one loss twice.
      corners: two or three variables {"params", "batch_stats", ...} of one network: the ends of a line, or the corners
        of a plane.
      batch: what the losses take.
      coordinates: one vector for each corner but the first: (a,) for a line, (a, b) for a plane. 0 is the first corner,
        1 the other.
      rng: random key, the same at every point; None is a fixed one.

    Returns:
      Arrays of shape [len(a)] or [len(a), len(b)].

    Raises:
      TypeError: variables without params, params that are not real floats, a loss that does not return a LossOutput.
      ValueError: fewer than two or more than three corners, corners that are not alike, as many coordinates as do not
        fit them, or coordinates that are no vectors.
    """
    if len(corners) not in (2, 3) or len(coordinates) != len(corners) - 1:
        raise ValueError(
            f"{len(corners)} corners and {len(coordinates)} vectors of coordinates; expected 2 and 1 for a line, or 3"
            " and 2 for a plane."
        )
    corners = [checked_variables(corner, f"corners[{number}]") for number, corner in enumerate(corners)]
    for number, corner in enumerate(corners[1:], start=1):
        check_alike(corner, f"corners[{number}]", corners[0], "corners[0]")
    axes = [vector_of(axis, f"coordinates[{number}]") for number, axis in enumerate(coordinates)]
    return _interpolate(train_loss, eval_loss, corners, batch, axes, key_of(rng))


@partial(jax.jit, static_argnames=("train_loss", "eval_loss"))
def _interpolate(train_loss, eval_loss, corners, batch, axes, rng) -> Interpolation:
    first = corners[0]
    grid = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1)

    def mean(loss, variables):
        return mean_loss(checked_output(loss(variables, batch, rng)))

    def at(point):
        params, averaged = (_mixed(point, [c.get(part, {}) for c in corners]) for part in ("params", "batch_stats"))
        here = {**first, "params": params}
        with_averaged = {**here, "batch_stats": averaged} if "batch_stats" in first else here
        return mean(train_loss, here), mean(eval_loss, here), mean(eval_loss, with_averaged)

    results = lax.map(at, grid.reshape(-1, len(axes)))
    return Interpolation(*(values.reshape(grid.shape[:-1]) for values in results))


def _mixed(point: Array, trees: Sequence[Any]) -> Any:
    """The first tree plus the sum of coordinates times differences to it; what is no float stays the first's."""

    def mix(first, *others):
        if not jnp.issubdtype(first.dtype, jnp.inexact):
            return first
        return (first + sum(a * (other - first) for a, other in zip(point, others, strict=True))).astype(first.dtype)

    return jax.tree.map(mix, *trees)
