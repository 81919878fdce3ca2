"""A network of one linear unit per layer: what a gradient step does to it, and what a Taylor series says of it.

`y = x w_1 w_2 ... w_l`, the example of Goodfellow, Bengio and Courville, Deep Learning, section 8.7.1. What the last
weight sees is `h = x w_1 ... w_(l-1)`; the normalized chain gives it `h_hat`, the batch-normalized h, instead.

A chain is a function `(weights [layers], x [batch]) -> y [batch]`; every function here takes one chain, and
`jax.vmap` runs thousands. Learning rates and costs have no unit.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

import jaxbn

Chain = Callable[[Array, Array], Array]


def below(lower_weights: Array, x: Array) -> Array:
    """`h = x w_1 ... w_(l-1)`, layer after layer; lower_weights: [layers - 1], x and h: [batch]."""
    return jax.lax.scan(lambda h, w: (h * w, None), x, lower_weights)[0]


def standardize(h: Array, epsilon: float) -> Array:
    """`h_hat = (h - mean) / sqrt(var + epsilon)` by the library, without scale and bias; h: [batch]."""
    return jaxbn.batch_normalize(h, axis=(0,), epsilon=epsilon)[0]


def plain(weights: Array, x: Array) -> Array:
    """`y = x w_1 ... w_l`."""
    return below(weights, x)


def normalized(epsilon: float) -> Chain:
    """`y = h_hat w_l`: batch norm once, under the last weight."""
    return lambda weights, x: standardize(below(weights[:-1], x), epsilon) * weights[-1]


def normalized_throughout(epsilon: float) -> Chain:
    """Batch norm under every weight, as networks have it: `h_i = standardize(h_(i-1)) w_i`, with `h_0 = x`."""

    def layer(h: Array, weight: Array) -> tuple[Array, None]:
        return standardize(h, epsilon) * weight, None

    return lambda weights, x: jax.lax.scan(layer, x, weights)[0]


def shortened(chain: Chain, active: Array) -> Chain:
    """The chain with only its `active: [layers]` (bool) weights: the others are 1, whatever is given, and stay so.

    One compiled program then serves chains of every depth.
    """
    return lambda weights, x: chain(jnp.where(active, weights, 1), x)


def cost(chain: Chain, weights: Array, x: Array) -> Array:
    """Mean of `x y` over the batch: how strongly y answers to x.

    It is linear in y, so that nothing but the chain bends it: the book's cost, whose gradient on the output is 1,
    carried to a batch (the gradient on y_n is x_n / batch). The plainer mean of y would not do: x has mean 0, and
    after normalization the mean of y is 0 whatever the weights are.
    """
    return jnp.mean(x * chain(weights, x))


class Taylor(NamedTuple):
    """Gradient and curvature of the cost at one point; g: the gradient, [layers]."""

    value: Array  # the cost before the step
    gradient: Array  # g
    slope: Array  # g.g: the forecast of a step of rate r is -r g.g
    curvature: Array  # g.H.g: the second-order term of that step is r^2 g.H.g / 2


def taylor(chain: Chain, weights: Array, x: Array) -> Taylor:
    """Taylor coefficients along the negative gradient; the curvature by forward over reverse, without a Hessian."""

    def value_and_gradient(w: Array) -> tuple[Array, Array]:
        return jax.value_and_grad(cost, argnums=1)(chain, w, x)

    (value, gradient), push = jax.linearize(value_and_gradient, weights)
    _, hessian_times_gradient = push(gradient)
    return Taylor(value, gradient, gradient @ gradient, gradient @ hessian_times_gradient)


class StepChange(NamedTuple):
    """The change of the cost by one gradient step; each field has the shape of the learning rates."""

    true: Array  # cost(w - r g) - cost(w)
    forecast: Array  # first order: -r g.g
    second_order: Array  # r^2 g.H.g / 2
    resolution: Array  # how much of `true` may be rounding: a difference below it says nothing


def step_change(chain: Chain, weights: Array, x: Array, expansion: Taylor, rates: Array) -> StepChange:
    """What a step `w - r g` does to all layers at once, for every learning rate r in `rates: [rates]`."""

    def stepped(rate: Array) -> Array:
        return cost(chain, weights - rate * expansion.gradient, x)

    true = jax.vmap(stepped)(rates) - expansion.value
    forecast = -rates * expansion.slope
    # Products of l factors are subtracted, and summed over the batch: each factor may be off by an epsilon or so.
    rounding = 4 * weights.shape[0] * jnp.finfo(weights.dtype).eps
    resolution = rounding * (jnp.abs(expansion.value) + jnp.abs(forecast))
    return StepChange(true, forecast, 0.5 * rates**2 * expansion.curvature, resolution)


def relative_error(change: StepChange, predicted: Array) -> Array:
    """`|true - predicted| / |forecast|`, and 0 where the difference is no more than rounding."""
    gap = jnp.abs(change.true - predicted)
    return jnp.where(gap <= change.resolution, 0.0, gap) / jnp.abs(change.forecast)


def expansion_in_rate(weights: Array, gradient: Array) -> Array:
    """Coefficients `c_0 ... c_l` of `prod_i (w_i - r g_i) = sum_k c_k r^k`: the plain step's whole expansion.

    Multiplies the l linear factors out one by one. weights, gradient: [layers]; result: [layers + 1].
    """

    def multiply(coefficients: Array, factor: tuple[Array, Array]) -> tuple[Array, None]:
        weight, slope = factor
        shifted = jnp.concatenate([jnp.zeros_like(coefficients[:1]), coefficients[:-1]])
        return weight * coefficients - slope * shifted, None

    one = jnp.zeros(weights.shape[0] + 1, weights.dtype).at[0].set(1)
    return jax.lax.scan(multiply, one, (weights, gradient))[0]


def orders_needed(weights: Array, gradient: Array, rate: Array, tolerance: float) -> Array:
    """The smallest K such that the terms of order 1 to K, or to any higher one, give the plain step's true change.

    Within `tolerance` of it; weights, gradient: [layers]; an int32 scalar between 1 and layers. Only ratios of terms
    enter, so the cost may be the product of the weights times any constant.
    """
    powers = rate ** jnp.arange(1, weights.shape[0] + 1, dtype=weights.dtype)
    partial = jnp.cumsum(expansion_in_rate(weights, gradient)[1:] * powers)
    wrong = jnp.abs(partial - partial[-1]) > tolerance * jnp.abs(partial[-1])
    return 1 + jnp.max(jnp.where(wrong, jnp.arange(1, wrong.shape[0] + 1), 0)).astype(jnp.int32)


def kolmogorov_distance(h: Array) -> Array:
    """Largest gap between the empirical distribution function of `h: [batch]` and that of a unit Gaussian."""
    count = h.shape[0]
    expected = jax.scipy.stats.norm.cdf(jnp.sort(h))
    steps = jnp.arange(count + 1, dtype=h.dtype) / count
    return jnp.maximum(jnp.max(steps[1:] - expected), jnp.max(expected - steps[:-1]))


def kolmogorov_limit(count: int) -> float:
    """What the distance of a *standardized* Gaussian sample of `count` values exceeds one time in twenty.

    Stephens, EDF statistics for goodness of fit, J. Am. Stat. Assoc. 69 (1974): mean and variance estimated.
    """
    return 0.895 / (count**0.5 - 0.01 + 0.85 / count**0.5)
