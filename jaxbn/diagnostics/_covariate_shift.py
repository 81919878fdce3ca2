"""What a layer notices of the layers below it being moved: in the distribution of its inputs, and in its gradient."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxbn._arithmetic import at_least_float32
from jaxbn.diagnostics._network import (
    Loss,
    Variables,
    check_alike,
    checked_variables,
    key_of,
    loss_of_params,
    named_leaves,
)
from jaxbn.diagnostics._taps import Activations, TappedLoss, activations
from jaxbn.diagnostics._trees import cosine, leaf_dot


class InputShift(NamedTuple):
    """How far the distribution of a layer's inputs moved, feature by feature.

    Differences are in units of the feature's standard deviation before; of a feature that was constant they are
    infinite where it moved and NaN where it did not.

    Attributes:
      mean_before: [features]
      mean_after: [features]
      var_before: [features], mean squared deviation.
      var_after: [features]
      mean_shift: [features], |mean_after - mean_before| / std before.
      log_std_ratio: [features], log(std after / std before): 0 where it kept, 0.69 where it doubled.
      distance: [features], the Wasserstein-1 (earth mover's) distance between the two sets of values, over the std
        before: the mean of how far the sorted values lie apart. 0 only where both sets are equal.
    """

    mean_before: Array
    mean_after: Array
    var_before: Array
    var_after: Array
    mean_shift: Array
    log_std_ratio: Array
    distance: Array


class GradientShift(NamedTuple):
    """How much a layer's gradient changes because the layers below it moved.

    Attributes:
      distance: [layers], |G - G'|, G the layer's gradient where nothing has moved and G' where all layers below have.
      cosine: [layers], of the angle between G and G'; NaN where one of them is 0.
      norm: [layers], |G|.
      norm_after: [layers], |G'|.
    """

    distance: Array
    cosine: Array
    norm: Array
    norm_after: Array


def covariate_shift(
    loss: TappedLoss,
    before: Variables,
    after: Variables,
    batch: Any,
    *,
    rng: Array | None = None,
) -> dict[str, InputShift]:
    """Shift of the distributions of what is tapped, between two sets of variables, on one batch.

    Ioffe and Szegedy 2015, section 2: internal covariate shift is the change of the distribution of a network's
    activations due to the change of its parameters.

    Args:
      loss: loss(variables, batch, rng, tap) -> LossOutput, as `linen_taps` makes one; see `jaxbn.diagnostics`. It taps
        the inputs of layers, [..., features].
      before: {"params", "batch_stats", ...}.
      after: the same after one update or more.
      batch: what the loss takes, the same for both.
      rng: random key for the loss, the same for both; None is a fixed one.

    Returns:
      {name: InputShift}, of what was tapped.

    Raises:
      TypeError: variables without params, params that are not real floats, a loss that does not return a LossOutput, a
        tap of something else than floats.
      ValueError: params that are not alike, nothing tapped, one name tapped twice, a tap within another transformation,
        or of a scalar.
    """
    before, after = checked_variables(before, "before"), checked_variables(after, "after")
    check_alike(after["params"], "after", before["params"], "before")
    return _covariate_shift(loss, before, after, batch, key_of(rng))


def gradient_shift(
    loss: Loss,
    before: Variables,
    after: Any,
    batch: Any,
    *,
    layers: Sequence[str | Sequence[str]],
    rng: Array | None = None,
) -> GradientShift:
    """Internal covariate shift as optimization sees it (Santurkar et al. 2018, definition 2.1).

    Of layer i it compares the gradient by its params W_i at (W_1, ..., W_k) with that at (W_1', ..., W_(i-1)', W_i,
    ..., W_k), the layers below it moved. The first layer has none below: its distance is 0, but for rounding. Takes one
    gradient more than there are layers, one after the other.

    Args:
      loss: loss(variables, batch, rng) -> LossOutput; see `jaxbn.diagnostics`.
      before: {"params", "batch_stats", ...}.
      after: params after the update, a tree like before["params"].
      batch: what the loss takes; the source takes the batch of the update. For full gradients see `over_batches`.
      layers: from the input to the output; of each layer the path of its params, or several, as ("Dense_0",
        "BatchNorm_0"). A path stands for all that lies below it. Each param belongs to one layer.
      rng: random key, the same at every point; None is a fixed one.

    Raises:
      TypeError: variables without params, params that are not real floats, a loss that does not return a LossOutput.
      ValueError: params after that are not like those before, a path that no param has, a param in no layer or in two.
    """
    before = checked_variables(before, "before")
    check_alike(after, "after", before["params"], 'before["params"]')
    owners = _owners(list(named_leaves(before["params"])), layers)
    return _gradient_shift(loss, before, after, batch, owners, len(layers), key_of(rng))


@partial(jax.jit, static_argnames="loss")
def _covariate_shift(loss, before, after, batch, rng) -> dict[str, InputShift]:
    old, new = (activations(loss, variables, batch, rng) for variables in (before, after))
    return {name: _shift(name, old, new) for name in old}


def _shift(name: str, old: Activations, new: Activations) -> InputShift:
    if old[name].ndim == 0:
        raise ValueError(f"{name!r} was tapped as a scalar; expected [..., features].")
    a, b = (at_least_float32(h[name]).reshape(-1, h[name].shape[-1]) for h in (old, new))
    mean, std = (jnp.stack([f(a, axis=0), f(b, axis=0)]) for f in (jnp.mean, jnp.std))
    apart = jnp.mean(jnp.abs(jnp.sort(a, axis=0) - jnp.sort(b, axis=0)), axis=0)
    return InputShift(
        mean_before=mean[0],
        mean_after=mean[1],
        var_before=std[0] ** 2,
        var_after=std[1] ** 2,
        mean_shift=jnp.abs(mean[1] - mean[0]) / std[0],
        log_std_ratio=jnp.log(std[1]) - jnp.log(std[0]),
        distance=apart / std[0],
    )


@partial(jax.jit, static_argnames=("loss", "owners", "layers"))
def _gradient_shift(loss, before, after, batch, owners, layers, rng) -> GradientShift:
    params = before["params"]
    gradient = jax.grad(loss_of_params(loss, before, batch, rng))
    leaves, treedef = jax.tree.flatten(params)
    unmoved = jax.tree.leaves(gradient(params))

    def of_layer(layer):
        pairs = zip(leaves, jax.tree.leaves(after), owners, strict=True)
        mixed = [jnp.where(owner < layer, new, old).astype(old.dtype) for old, new, owner in pairs]
        moved = jax.tree.leaves(gradient(jax.tree.unflatten(treedef, mixed)))
        terms = jnp.stack([_products(g, h) for g, h in zip(unmoved, moved, strict=True)])
        own = jnp.asarray(owners)[:, None] == layer
        return jnp.sum(jnp.where(own, terms, 0), axis=0)

    distance, products, before_square, after_square = lax.map(of_layer, jnp.arange(layers)).T
    norm, norm_after = jnp.sqrt(before_square), jnp.sqrt(after_square)
    return GradientShift(jnp.sqrt(distance), cosine(products, norm, norm_after), norm, norm_after)


def _products(g: Array, h: Array) -> Array:
    """[4]: |g - h|^2, g.h, |g|^2 and |h|^2."""
    g, h = at_least_float32(g), at_least_float32(h)
    return jnp.stack([leaf_dot(g - h, g - h), leaf_dot(g, h), leaf_dot(g, g), leaf_dot(h, h)])


def _owners(paths: list[str], layers: Sequence[str | Sequence[str]]) -> tuple[int, ...]:
    """The number of each param's layer."""
    owned: dict[str, list[int]] = {path: [] for path in paths}
    for number, layer in enumerate(layers):
        for start in (layer,) if isinstance(layer, str) else layer:
            below = [path for path in paths if path == start or path.startswith(f"{start}/")]
            if not below:
                raise ValueError(f"layers: no param lies at {start!r}; the params are {paths}.")
            for path in below:
                owned[path].append(number)
    wrong = {path: numbers for path, numbers in owned.items() if len(numbers) != 1}
    if wrong:
        raise ValueError(f"layers: each param has to belong to one layer; these belong to none or several: {wrong}.")
    return tuple(numbers[0] for numbers in owned.values())
