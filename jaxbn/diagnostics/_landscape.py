"""The loss and its gradient along a line: how far a gradient can be trusted."""

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
    checked_variables,
    key_of,
    loss_of_params,
    vector_of,
)
from jaxbn.diagnostics._trees import add_scaled, cosine, dot, norm, subtract


class Landscape(NamedTuple):
    """Loss and gradient g at `params + rate * direction`, for several rates.

    Attributes:
      rates: [rates], as given.
      loss: [rates], the mean loss there.
      gradient_distance: [rates], |g(there) - g(params)|: the gradient's predictiveness, 0 if it foretells all.
      gradient_cosine: [rates], of the angle between the two gradients; NaN where one is 0.
      beta: [rates], gradient_distance over |rate| |direction|, how far one is from params; NaN at a distance of 0.
      loss_here: [], the mean loss at params.
      gradient_norm: [], |g(params)|.
    """

    rates: Array
    loss: Array
    gradient_distance: Array
    gradient_cosine: Array
    beta: Array
    loss_here: Array
    gradient_norm: Array

    @property
    def beta_smoothness(self) -> Array:
        """[]: the effective beta-smoothness, the greatest `beta` of all rates; NaN where no rate moves."""
        greatest = jnp.max(jnp.where(jnp.isnan(self.beta), -jnp.inf, self.beta))
        return jnp.where(greatest < 0, jnp.nan, greatest)


def landscape(
    loss: Loss,
    variables: Variables,
    batch: Any,
    *,
    rates: ArrayLike,
    direction: Any = None,
    rng: Array | None = None,
) -> Landscape:
    """Loss, gradient predictiveness and effective beta-smoothness along a step (Santurkar et al. 2018, section 3.1).

    Takes one gradient at params and one for each rate. The ranges that the source plots are the least and greatest
    `loss` and `gradient_distance` over the rates, at each step of training.

    Args:
      loss: loss(variables, batch, rng) -> LossOutput; see `jaxbn.diagnostics`.
      variables: {"params", "batch_stats", ...}.
      batch: what the loss takes.
      rates: [rates], how many times the direction to move by.
      direction: a tree like params; None is minus the gradient, so that rates are learning rates.
      rng: random key, the same at every point; None is a fixed one.

    Raises:
      TypeError: variables without params, params that are not real floats, a loss that does not return a LossOutput.
      ValueError: rates that are no vector, or a direction that is not like params.
    """
    variables = checked_variables(variables)
    if direction is not None:
        check_alike(direction, "direction", variables["params"], "params")
    return _landscape(loss, variables, batch, vector_of(rates, "rates"), direction, key_of(rng))


@partial(jax.jit, static_argnames="loss")
def _landscape(loss, variables, batch, rates, direction, rng) -> Landscape:
    run = jax.value_and_grad(loss_of_params(loss, variables, batch, rng))
    here, gradient = run(variables["params"])
    direction = jax.tree.map(jnp.negative, gradient) if direction is None else direction

    def at(rate):
        value, there = run(add_scaled(variables["params"], rate, direction))
        return value, norm(subtract(there, gradient)), cosine(dot(there, gradient), norm(there), norm(gradient))

    values, distances, cosines = lax.map(at, rates)
    moved = jnp.abs(rates) * norm(direction)
    beta = jnp.where(moved > 0, distances / jnp.where(moved > 0, moved, 1), jnp.nan)
    return Landscape(rates, values, distances, cosines, beta, here, norm(gradient))
