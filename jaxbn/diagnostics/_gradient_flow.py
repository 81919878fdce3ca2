"""How signals flow up a network and gradients down: one line of figures per tapped layer, and one per param."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from jaxbn._arithmetic import at_least_float32
from jaxbn.diagnostics._network import Variables, checked_variables, key_of, named_leaves
from jaxbn.diagnostics._taps import TappedLoss, activation_gradients
from jaxbn.diagnostics._trees import cosine, leaf_dot


class LayerFlow(NamedTuple):
    """One tapped layer, its values h: [..., units] taken as a matrix [values, units].

    Attributes:
      rms: [], root of the mean square of h.
      gradient_norm: [], Euclidean norm of the derivative of the mean loss by h.
      saturated: [], share of values at which the activation's slope is below `flat_below` in size.
      dead: [], share of units for which that is so on every value: of a relu the units that pass nothing on.
      effective_rank: [], exp of the entropy of the singular values of h divided by their sum (Roy and Vetterli 2007):
        between 1 and units. The mean is not taken away.
      participation: [], (sum s^2)^2 / sum s^4 over the singular values s, a lower bound of the rank
        (Daneshmand et al. 2020, section 3).
      rank: [], number of singular values above max(values, units) * eps times the largest one, as
        `numpy.linalg.matrix_rank` counts.
    """

    rms: Array
    gradient_norm: Array
    saturated: Array
    dead: Array
    effective_rank: Array
    participation: Array
    rank: Array


class ParamFlow(NamedTuple):
    """One array w of the params, with its gradient g and its update u.

    Attributes:
      norm: [], |w|, Euclidean.
      gradient_norm: [], |g|.
      update_norm: [], |u|.
      relative_update: [], |u| / |w|; NaN for a w of zeros.
      effective_rate: [], rate / |w|^2: what counts where the loss does not depend on the size of w, as it does not for
        the weights below a batch norm (van Laarhoven 2017). NaN for a w of zeros.
      radial: [], w.g / (|w| |g|): 0 to rounding where the loss does not depend on the size of w (Euler), and so a
        test of whether `effective_rate` applies. NaN where w or g is 0.
    """

    norm: Array
    gradient_norm: Array
    update_norm: Array
    relative_update: Array
    effective_rate: Array
    radial: Array


class GradientFlow(NamedTuple):
    """Figures by layer and by param, under their names.

    Attributes:
      loss: [], the mean loss.
      layers: {name: LayerFlow}, of what was tapped.
      params: {path: ParamFlow}, "/" between the names of a path.
    """

    loss: Array
    layers: dict[str, LayerFlow]
    params: dict[str, ParamFlow]


def gradient_flow(
    loss: TappedLoss,
    variables: Variables,
    batch: Any,
    *,
    rate: ArrayLike,
    activation: Callable[[Array], Array] = jax.nn.relu,
    flat_below: float = 0.01,
    optimizer: optax.GradientTransformation | None = None,
    opt_state: Any = None,
    rng: Array | None = None,
) -> GradientFlow:
    """Norms of activations, gradients and updates, what is saturated or dead, ranks and effective rates, by layer.

    Args:
      loss: loss(variables, batch, rng, tap) -> LossOutput, as `linen_taps` makes one; see `jaxbn.diagnostics`. Tap what
        goes into the activation; a relu may also be tapped behind it.
      variables: {"params", "batch_stats", ...}.
      batch: what the loss takes.
      rate: [], the learning rate: of the effective rates, and of plain gradient descent where there is no optimizer.
      activation: elementwise, what follows on the layers tapped.
      flat_below: the slope below which a value counts as saturated. The slope of tanh falls below 0.01 at 3.0, that of
        the logistic sigmoid at 4.6.
      optimizer: optax's, whose update is looked at; None is plain gradient descent, u = -rate g.
      opt_state: its state.
      rng: random key for the loss; None is a fixed one.

    Raises:
      TypeError: variables without params, params that are not real floats, a loss that does not return a LossOutput, a
        tap of something else than floats, an optimizer without opt_state.
      ValueError: nothing tapped, one name tapped twice, a tap within another transformation, or of a scalar.
    """
    if optimizer is not None and opt_state is None:
        raise TypeError("optimizer was given without opt_state; pass optimizer.init(params), or the state of training.")
    variables, rate = checked_variables(variables), jnp.asarray(rate, float)
    return _gradient_flow(
        loss, variables, batch, rate, activation, jnp.asarray(flat_below, float), optimizer, opt_state, key_of(rng)
    )


@partial(jax.jit, static_argnames=("loss", "activation", "optimizer"))
def _gradient_flow(loss, variables, batch, rate, activation, flat_below, optimizer, opt_state, rng) -> GradientFlow:
    params = variables["params"]
    value, found, gradient, by_layer = activation_gradients(loss, variables, batch, rng)
    if optimizer is None:
        updates = jax.tree.map(lambda g: -rate * g, gradient)
    else:
        updates, _ = optimizer.update(gradient, opt_state, params)
    layers = {name: _layer(name, h, by_layer[name], activation, flat_below) for name, h in found.items()}
    trees = zip(*(named_leaves(tree).items() for tree in (params, gradient, updates)), strict=True)
    return GradientFlow(value, layers, {path: _param(w, g, u, rate) for (path, w), (_, g), (_, u) in trees})


def _layer(name, h, gradient, activation, flat_below) -> LayerFlow:
    if h.ndim == 0:
        raise ValueError(f"{name!r} was tapped as a scalar; expected [..., units].")
    h, gradient = at_least_float32(h), at_least_float32(gradient)
    _, slope = jax.jvp(activation, (h,), (jnp.ones_like(h),))
    flat = (jnp.abs(slope) < flat_below).reshape(-1, h.shape[-1])
    singular = jnp.linalg.svd(h.reshape(-1, h.shape[-1]), compute_uv=False)
    return LayerFlow(
        rms=jnp.sqrt(jnp.mean(h**2)),
        gradient_norm=jnp.sqrt(leaf_dot(gradient, gradient)),
        saturated=jnp.mean(flat),
        dead=jnp.mean(jnp.all(flat, axis=0)),
        effective_rank=_effective_rank(singular),
        participation=_participation(singular),
        rank=_rank(singular, max(flat.shape)),
    )


def _effective_rank(singular: Array) -> Array:
    """Exp of the entropy of the shares; 0 for a matrix of zeros, which has no rank."""
    total = jnp.sum(singular)
    shares = singular / jnp.where(total > 0, total, 1)
    return jnp.where(total > 0, jnp.exp(jnp.sum(jax.scipy.special.entr(shares))), 0)


def _rank(singular: Array, size: int) -> Array:
    """How many singular values are more than rounding; `size` is the matrix's larger side."""
    above = singular > size * jnp.finfo(singular.dtype).eps * jnp.max(singular)
    return jnp.sum(above, dtype=singular.dtype)


def _participation(singular: Array) -> Array:
    """(sum s^2)^2 / sum s^4; 0 for a matrix of zeros."""
    # Relative to the greatest, so that no fourth power leaves the range of float32.
    greatest = jnp.max(singular)
    squares = (singular / jnp.where(greatest > 0, greatest, 1)) ** 2
    return jnp.where(greatest > 0, jnp.sum(squares) ** 2 / jnp.sum(jnp.where(greatest > 0, squares, 1) ** 2), 0)


def _param(w, g, u, rate) -> ParamFlow:
    square, of_gradient, of_update = leaf_dot(w, w), jnp.sqrt(leaf_dot(g, g)), jnp.sqrt(leaf_dot(u, u))
    size = jnp.sqrt(square)
    nonzero = jnp.where(square > 0, square, jnp.nan)
    return ParamFlow(
        norm=size,
        gradient_norm=of_gradient,
        update_norm=of_update,
        relative_update=of_update / jnp.sqrt(nonzero),
        effective_rate=rate / nonzero,
        radial=cosine(leaf_dot(w, g), size, of_gradient),
    )
