"""Forecasts of what an update does to the loss, by a Taylor series, against what it does."""

from collections.abc import Callable
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
from jaxbn.diagnostics._trees import add_scaled, dot


class Taylor(NamedTuple):
    """What updates `params + rate * direction` do to the loss, for several rates.

    With f(rate) the loss, terms[k - 1] is `rate^k f^(k)(0) / k!`: for k = 1 rate times g.u, with g the gradient and u
    the direction, and for k = 2 half of rate^2 times u.H.u, with H the Hessian.

    Attributes:
      rates: [rates], as given.
      true: [rates], f(rate) - f(0).
      terms: [orders, rates], of the Taylor series of f(rate) - f(0).
      resolution: [rates], the rounding of a loss that is exact but for its last digit, eps |f(0)|, plus that of the
        first term: a difference of this size says nothing. What the network rounds within comes on top.
      gradient: tree like params, at params.
    """

    rates: Array
    true: Array
    terms: Array
    resolution: Array
    gradient: Any

    @property
    def forecasts(self) -> Array:
        """[orders, rates]: of each order the sum of the terms up to it."""
        return jnp.cumsum(self.terms, axis=0)

    @property
    def relative_error(self) -> Array:
        """[orders, rates]: |true - forecast| over the size of the first-order term; 0 where it is within resolution."""
        gap = jnp.abs(self.true[None] - self.forecasts)
        gap = jnp.where(gap <= self.resolution[None], 0, gap)
        return gap / jnp.abs(self.terms[:1])


def taylor(
    loss: Loss,
    variables: Variables,
    batch: Any,
    *,
    rates: ArrayLike,
    orders: int = 2,
    direction: Any = None,
    rng: Array | None = None,
) -> Taylor:
    """True change of the loss by an update, and its forecasts of first and higher order.

    Deep Learning (Goodfellow, Bengio and Courville), section 8.7.1: the gradient tells how to change each weight while
    the others stand still, and then all change at once. The first derivative along the direction is taken by the
    reverse mode and the others by forward over reverse, without a Hessian: each further order about doubles the cost.

    Args:
      loss: loss(variables, batch, rng) -> LossOutput; see `jaxbn.diagnostics`.
      variables: {"params", "batch_stats", ...}.
      batch: what the loss takes.
      rates: [rates], how many times the direction to move by.
      orders: of the highest derivative, 1 or more.
      direction: a tree like params, such as an optimizer's updates; None is minus the gradient, so that rates are
        learning rates.
      rng: random key, the same at every point; None is a fixed one.

    Raises:
      TypeError: variables without params, params that are not real floats, a loss that does not return a LossOutput.
      ValueError: orders below 1, rates that are no vector, or a direction that is not like params.
    """
    if orders < 1:
        raise ValueError(f"orders={orders}; expected 1 or more.")
    variables = checked_variables(variables)
    if direction is not None:
        check_alike(direction, "direction", variables["params"], "params")
    return _taylor(loss, variables, batch, vector_of(rates, "rates"), orders, direction, key_of(rng))


@partial(jax.jit, static_argnames=("loss", "orders"))
def _taylor(loss, variables, batch, rates, orders, direction, rng) -> Taylor:
    params, mean = variables["params"], loss_of_params(loss, variables, batch, rng)
    here, gradient = jax.value_and_grad(mean)(params)
    direction = jax.tree.map(jnp.negative, gradient) if direction is None else direction

    def slope(rate):
        return (dot(jax.grad(mean)(add_scaled(params, rate, direction)), direction),)

    derivatives = [dot(gradient, direction)]
    if orders > 1:
        derivatives += _derivatives(slope, orders - 1)(jnp.zeros((), rates.dtype))[1:]
    terms, factor = [], jnp.ones_like(rates)
    for order, derivative in enumerate(derivatives, start=1):
        factor = factor * rates / order
        terms.append(factor * derivative)
    true = lax.map(lambda rate: mean(add_scaled(params, rate, direction)), rates) - here
    resolution = jnp.finfo(here.dtype).eps * (jnp.abs(here) + jnp.abs(terms[0]))
    return Taylor(rates, true, jnp.stack(terms), resolution, gradient)


def _derivatives(function: Callable[[Array], tuple[Array, ...]], further: int) -> Callable[[Array], tuple[Array, ...]]:
    """From x -> (f(x), ...) the function x -> (f(x), ..., and `further` derivatives of the last)."""
    if further == 0:
        return function

    def one_more(x):
        values, slopes = jax.jvp(function, (x,), (jnp.ones_like(x),))
        return (*values, slopes[-1])

    return _derivatives(one_more, further - 1)
