"""A network of one linear unit per layer: what a gradient step does to it, and what a Taylor series says of it.

`y = x w_1 w_2 ... w_l`, the example of Goodfellow, Bengio and Courville, Deep Learning, section 8.7.1. What the last
weight sees is `h = x w_1 ... w_(l-1)`; the normalized chain gives it `h_hat`, the batch-normalized h, instead.

Every function here takes one chain, and `jax.vmap` runs thousands. Learning rates and costs have no unit.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

import jaxbn

Chain = Callable[[Array, Array], Array]  # (weights [layers], x [batch]) -> y [batch]

OFF, LINEAR, NORMALIZED = 0, 1, 2  # kinds of layers


def chain(kinds: Array, epsilons: Sequence[float] = ()) -> Chain:
    """`h_i = h_(i-1) w_i`, with `h_0 = x` and y the last; a normalized layer takes h_hat_(i-1) instead.

    Kinds may be traced: one compiled program then serves every depth and every way to normalize.

    Args:
      kinds: of the layers: [layers], integers. OFF leaves a layer out, LINEAR multiplies by its weight,
        NORMALIZED + i normalizes with `epsilons[i]` before that.
      epsilons: added to the variance, inside the square root.
    """
    inputs = [lambda h: h, lambda h: h, *(partial(standardize, epsilon=epsilon) for epsilon in epsilons)]

    def layer(h: Array, one: tuple[Array, Array]) -> tuple[Array, None]:
        kind, weight = one
        return jax.lax.switch(kind, inputs, h) * jnp.where(kind == OFF, 1, weight), None

    return lambda weights, x: jax.lax.scan(layer, x, (jnp.asarray(kinds), weights))[0]


def standardize(h: Array, epsilon: float) -> Array:
    """`h_hat = (h - mean) / sqrt(var + epsilon)` by the library, without scale and bias; h: [batch]."""
    return jaxbn.batch_normalize(h, axis=(0,), epsilon=epsilon)[0]


def cost(network: Chain, weights: Array, x: Array) -> Array:
    """Mean of `x y` over the batch: how strongly y answers to x.

    It is linear in y, so that nothing but the chain bends it: the book's cost, whose gradient on the output is 1,
    carried to a batch (the gradient on y_n is x_n / batch). The plainer mean of y would not do: x has mean 0, and
    after normalization the mean of y is 0 whatever the weights are.
    """
    return jnp.mean(x * network(weights, x))


class Step(NamedTuple):
    """What steps `w - r g` do to the cost, for several rates r; g is the gradient and H the Hessian at w."""

    gradient: Array  # g: [layers]
    true: Array  # cost(w - r g) - cost(w): [rates]
    forecast: Array  # first order, -r g.g: [rates]
    second_order: Array  # r^2 g.H.g / 2: [rates]
    resolution: Array  # how much of `true` may be rounding: a difference below it says nothing: [rates]


def step(network: Chain, weights: Array, x: Array, rates: Callable[[Array], Array]) -> Step:
    """A gradient step on all layers at once, for every rate in `rates(g.g): [rates]`.

    The curvature g.H.g is taken by forward over reverse, without a Hessian.
    """

    def value_and_gradient(w: Array) -> tuple[Array, Array]:
        return jax.value_and_grad(cost, argnums=1)(network, w, x)

    (value, gradient), push = jax.linearize(value_and_gradient, weights)
    _, hessian_times_gradient = push(gradient)
    slope = gradient @ gradient
    r = rates(slope)
    true = jax.vmap(lambda rate: cost(network, weights - rate * gradient, x))(r) - value
    # Products of l factors are subtracted, and summed over the batch: each factor may be off by an epsilon or so.
    rounding = 4 * weights.shape[0] * jnp.finfo(weights.dtype).eps
    resolution = rounding * (jnp.abs(value) + jnp.abs(r * slope))
    return Step(gradient, true, -r * slope, 0.5 * r**2 * (gradient @ hessian_times_gradient), resolution)


def relative_error(change: Step, predicted: Array) -> Array:
    """`|true - predicted| / |forecast|`, and 0 where the difference is no more than rounding."""
    gap = jnp.abs(change.true - predicted)
    return jnp.where(gap <= change.resolution, 0.0, gap) / jnp.abs(change.forecast)


def expansion_in_rate(weights: Array, gradient: Array) -> Array:
    """Coefficients `c_0 ... c_l` of `prod_i (w_i - r g_i) = sum_k c_k r^k`: the plain step's whole expansion.

    Multiplies the l linear factors out one by one. weights, gradient: [layers]; result: [layers + 1].
    """

    def multiply(coefficients: Array, factor: tuple[Array, Array]) -> tuple[Array, None]:
        weight, slope = factor
        return weight * coefficients - slope * jnp.roll(coefficients, 1).at[0].set(0), None

    one = jnp.zeros(weights.shape[0] + 1, weights.dtype).at[0].set(1)
    return jax.lax.scan(multiply, one, (weights, gradient))[0]


def orders_needed(weights: Array, gradient: Array, rate: float, tolerance: float) -> Array:
    """The smallest K such that the terms of order 1 to K, or to any higher one, give the plain step's true change.

    Within `tolerance` of it; weights, gradient: [layers]; an integer between 1 and layers. Only ratios of terms
    enter, so the cost may be the product of the weights times any constant.
    """
    orders = jnp.arange(1, weights.shape[0] + 1)
    sums = jnp.cumsum(expansion_in_rate(weights, gradient)[1:] * rate ** orders.astype(weights.dtype))
    wrong = jnp.abs(sums - sums[-1]) > tolerance * jnp.abs(sums[-1])
    return 1 + jnp.max(jnp.where(wrong, orders, 0))


def kolmogorov_distance(h: Array) -> Array:
    """Largest gap between the empirical distribution function of `h: [batch]` and that of a unit Gaussian."""
    expected = jax.scipy.stats.norm.cdf(jnp.sort(h))
    steps = jnp.arange(h.shape[0] + 1, dtype=h.dtype) / h.shape[0]
    return jnp.maximum(jnp.max(steps[1:] - expected), jnp.max(expected - steps[:-1]))


def kolmogorov_limit(count: int) -> float:
    """What the distance of a *standardized* Gaussian sample of `count` values exceeds one time in twenty.

    Stephens, EDF statistics for goodness of fit, J. Am. Stat. Assoc. 69 (1974): mean and variance estimated.
    """
    return 0.895 / (count**0.5 - 0.01 + 0.85 / count**0.5)
