"""A network of one linear unit per layer: what one gradient step does to it, and what a Taylor series says it does.

`y = x w_1 w_2 ... w_l`, the example of Goodfellow, Bengio and Courville, Deep Learning, section 8.7.1. `h = x w_1 ...
w_(l-1)` is what the last weight sees; the normalized chain gives it `h_hat`, the batch-normalized `h`, instead.

A chain is a function `(weights [layers], x [batch]) -> y [batch]`; every function here takes one chain, so that
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
    """`h_hat = (h - mean) / sqrt(var + epsilon)` with the library's batch norm, no scale and no bias; h: [batch]."""
    return jaxbn.batch_normalize(h, axis=(0,), epsilon=epsilon)[0]


def plain(weights: Array, x: Array) -> Array:
    """`y = x w_1 ... w_l`."""
    return below(weights, x)


def normalized(epsilon: float) -> Chain:
    """`y = h_hat w_l`: batch norm once, under the last weight."""
    return lambda weights, x: standardize(below(weights[:-1], x), epsilon) * weights[-1]


def normalized_throughout(epsilon: float) -> Chain:
    """`y = h_hat w_l` with batch norm after each of the lower layers, as networks have it."""

    def layer(h: Array, weight: Array) -> tuple[Array, None]:
        return standardize(h * weight, epsilon), None

    return lambda weights, x: jax.lax.scan(layer, x, weights[:-1])[0] * weights[-1]


def cost(chain: Chain, weights: Array, x: Array) -> Array:
    """Mean of `x y` over the batch: how strongly y answers to x.

    It is linear in y, so that nothing but the chain bends it: the book's cost, which "has put a gradient of 1" on
    the output, carried to a batch (the gradient on y_n is x_n / batch). The plainer mean of y would not do: x has
    mean 0, and after normalization the mean of y is 0 whatever the weights are.
    """
    return jnp.mean(x * chain(weights, x))


class Taylor(NamedTuple):
    """Gradient and curvature of the cost at one point; g: the gradient, [layers]."""

    value: Array  # the cost before the step
    gradient: Array  # g
    slope: Array  # g.g: the forecast of a step of rate r is -r g.g
    curvature: Array  # g.H.g: the second-order term of that step is r^2 g.H.g / 2


def taylor(chain: Chain, weights: Array, x: Array) -> Taylor:
    """Taylor coefficients along the negative gradient, the curvature by a jvp of the gradient (no Hessian is built)."""

    def value_and_gradient(w: Array) -> tuple[Array, Array]:
        return jax.value_and_grad(cost, argnums=1)(chain, w, x)

    value, gradient = value_and_gradient(weights)
    _, (_, hessian_times_gradient) = jax.jvp(value_and_gradient, (weights,), (gradient,))
    return Taylor(value, gradient, gradient @ gradient, gradient @ hessian_times_gradient)


class StepChange(NamedTuple):
    """The change of the cost by one gradient step; each field has the shape of the learning rates."""

    true: Array  # cost(w - r g) - cost(w), in the arithmetic of the weights
    forecast: Array  # first order: -r g.g
    second_order: Array  # r^2 g.H.g / 2


def step_change(chain: Chain, weights: Array, x: Array, rates: Array) -> tuple[StepChange, Taylor]:
    """What a step `w - r g` does to all layers at once, for every learning rate r in `rates: [rates]`."""
    expansion = taylor(chain, weights, x)

    def stepped(rate: Array) -> Array:
        return cost(chain, weights - rate * expansion.gradient, x)

    true = jax.vmap(stepped)(rates) - expansion.value
    change = StepChange(true, -rates * expansion.slope, 0.5 * rates**2 * expansion.curvature)
    return change, expansion


def expansion_in_rate(weights: Array, gradient: Array) -> Array:
    """Coefficients `c_0 ... c_l` of `prod_i (w_i - r g_i) = sum_k c_k r^k`: the plain step's whole Taylor series.

    Multiplies the l linear factors out one by one. weights, gradient: [layers]; result: [layers + 1].
    """

    def multiply(coefficients: Array, factor: tuple[Array, Array]) -> tuple[Array, None]:
        weight, slope = factor
        shifted = jnp.concatenate([jnp.zeros_like(coefficients[:1]), coefficients[:-1]])
        return weight * coefficients - slope * shifted, None

    one = jnp.zeros(weights.shape[0] + 1, weights.dtype).at[0].set(1)
    return jax.lax.scan(multiply, one, (weights, gradient))[0]


def orders_needed(weights: Array, gradient: Array, rate: Array, tolerance: float) -> Array:
    """The smallest K such that the terms of order 1 to K, and to every K above it, give the plain step's change.

    Within `tolerance` of the true change; weights, gradient: [layers]; an int32 scalar between 1 and layers. Only
    ratios of terms enter, so the cost may be the product of the weights times any constant.
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

    Stephens, EDF statistics for goodness of fit, J. Am. Stat. Assoc. 69 (1974), the case of both moments estimated.
    """
    return 0.895 / (count**0.5 - 0.01 + 0.85 / count**0.5)


class Shape(NamedTuple):
    """How a batch of one feature is distributed; each field a scalar."""

    mean: Array
    var: Array  # biased
    distance: Array  # Kolmogorov distance to a unit Gaussian


def shape_of(h: Array) -> Shape:
    """Mean, variance and distance to a unit Gaussian of `h: [batch]`."""
    return Shape(jnp.mean(h), jnp.var(h), kolmogorov_distance(h))
