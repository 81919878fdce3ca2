"""One optimizer step: gradient, microbatches, sums over shards, and the refusal of what is not finite."""

import functools
import operator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxbn._axis_group import varying_axes
from jaxbn._recording import finish_pooling, start_pooling
from jaxbn.training._shards import Shards
from jaxbn.training._state import Loss, LossOutput, TrainState

Metrics = dict[str, jax.Array]

# What a step checks, in the order of the bits of the metric "nonfinite".
_PARTS = ("loss", "gradient", "params", "opt_state", "batch_stats")


def nonfinite_parts(code: int | jax.Array) -> tuple[str, ...]:
    """The names behind a step's metric "nonfinite": which of its results were not finite.

    Args:
      code: the metric of one step, an integer.

    Returns:
      A part of ("loss", "gradient", "params", "opt_state", "batch_stats"), in this order.
    """
    return tuple(part for bit, part in enumerate(_PARTS) if int(code) >> bit & 1)


def advance(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    shards: Shards,
    microbatches: int,
    pool: bool,
    state: TrainState,
    batch: Any,
    rng: jax.Array,
) -> tuple[TrainState, Metrics]:
    """One optimizer step, refused where any of its results is not finite or no example has weight."""
    rng = shards.fold(jax.random.fold_in(rng, state.step))
    if microbatches == 1:
        gradient, output = _gradient(loss, shards, state.params, state.batch_stats, batch, rng)
        gradient = gradient if shards.varying else shards.total(gradient)
    else:
        gradient, output = _accumulate(loss, shards, microbatches, pool, state, batch, rng)
        gradient = shards.total(gradient)
    loss_sum, weight, metric_sums = shards.total(_float_sums(output))
    share = jnp.where(weight == 0, 0, 1 / jnp.where(weight == 0, 1, weight))
    gradient = jax.tree.map(lambda g: (g * (_examples(batch) * shards.number() * share)).astype(g.dtype), gradient)
    means = {name: value * share for name, value in ({"loss": loss_sum} | metric_sums).items()}
    update = partial(_updated, optimizer, output.batch_stats)
    # The update is computed once to be checked and once to be stored: what is only checked XLA need not write to
    # memory, whereas a new state beside the old one would double what the state takes. The barrier keeps the two apart.
    checked = update(*lax.optimization_barrier((gradient, state)))
    nonfinite = _nonfinite((means["loss"], weight), gradient, checked, state)
    accept = (nonfinite == 0) & (weight != 0)
    kept = jax.tree.map(partial(jnp.where, accept), update(gradient, state), state)._replace(step=state.step + 1)
    return kept, means | {"weight": weight, "skipped": 1 - accept.astype(jnp.int32), "nonfinite": nonfinite}


def _updated(optimizer, batch_stats, gradient, state: TrainState) -> TrainState:
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    return TrainState(state.step, optax.apply_updates(state.params, updates), batch_stats, opt_state)


def _nonfinite(loss: Any, gradient: Any, moved: TrainState, state: TrainState) -> jax.Array:
    """int32 []: a bit for each of `_PARTS` that holds a value which is not finite.

    Stored values that were not finite before the step do not count: some optimizers start from an infinite best value.
    """
    bad = [_any_nonfinite(loss), _any_nonfinite(gradient)]
    bad += [_any_nonfinite(getattr(moved, part), getattr(state, part)) for part in _PARTS[2:]]
    bits = [flag.astype(jnp.int32) << bit for bit, flag in enumerate(bad)]
    return functools.reduce(operator.or_, bits)


def _any_nonfinite(tree: Any, before: Any = None) -> jax.Array:
    """Whether a value of the tree is not finite, that was finite before where `before` is given."""

    def of_leaf(new, old=None):
        if not jnp.issubdtype(jnp.result_type(new), jnp.inexact):
            return jnp.array(False)
        bad = ~jnp.isfinite(new)
        return jnp.any(bad if old is None else bad & jnp.isfinite(old))

    flags = jax.tree.map(of_leaf, tree) if before is None else jax.tree.map(of_leaf, tree, before)
    return jax.tree.reduce(operator.or_, flags, jnp.array(False))


def _gradient(loss, shards, params, batch_stats, batch, rng) -> tuple[Any, LossOutput]:
    """The gradient of loss_sum / examples, and the output of the loss.

    The number of examples is known before the backward pass; dividing by it keeps float16 gradients in range.
    """
    examples = _examples(batch) * shards.number()

    def scaled(params):
        output = loss({"params": params, "batch_stats": batch_stats}, batch, rng)
        _check_output(output, batch_stats, shards)
        return output.loss_sum / examples, output

    return jax.grad(scaled, has_aux=True)(params)


def _accumulate(loss, shards, microbatches, pool, state, batch, rng) -> tuple[Any, LossOutput]:
    """Mean of the microbatches' gradients; their outputs summed and their moments pooled."""

    def one(carry, number_and_part):
        gradient, sums, batch_stats = carry
        number, part = number_and_part
        more, output = _gradient(loss, shards, params, batch_stats, part, jax.random.fold_in(rng, number))
        gradient = jax.tree.map(lambda a, b: a + b / microbatches, gradient, more)
        sums = jax.tree.map(jnp.add, sums, shards.mark_varying(_float_sums(output)))
        return (gradient, sums, output.batch_stats), None

    params = shards.mark_varying(state.params)
    batch_stats = start_pooling(state.batch_stats) if pool else state.batch_stats
    # Every n-th example makes a microbatch, so that it lies on all devices as the batch does.
    parts = jax.tree.map(lambda v: jnp.moveaxis(v.reshape(-1, microbatches, *v.shape[1:]), 1, 0), batch)
    part = jax.tree.map(lambda v: v[0], parts)
    shapes = partial(_shapes_of_sums, loss, params, part=part, rng=rng)
    try:
        sums = shapes(batch_stats)
    except (TypeError, ValueError) as error:
        if pool:
            _explain(error, partial(shapes, state.batch_stats))
        raise
    sums = shards.mark_varying(jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), sums))
    start = shards.mark_varying(jax.tree.map(jnp.zeros_like, params)), sums, batch_stats
    (gradient, sums, batch_stats), _ = lax.scan(one, start, (jnp.arange(microbatches), parts))
    batch_stats = finish_pooling(batch_stats, state.batch_stats) if pool else batch_stats
    loss_sum, weight_sum, metric_sums = sums
    return gradient, LossOutput(loss_sum, weight_sum, batch_stats, metric_sums)


def _shapes_of_sums(loss, params, batch_stats, *, part, rng):
    return jax.eval_shape(lambda: _float_sums(loss({"params": params, "batch_stats": batch_stats}, part, rng)))


def _explain(error, plain) -> None:
    """ValueError where the loss can be traced with plain batch statistics, and so failed because these pool."""
    try:
        plain()
    except (TypeError, ValueError):
        return
    raise ValueError(
        "the loss takes batch_stats as they are, but not batch_stats that pool the moments of microbatches: a layer is"
        " neither jaxbn's nor made recordable, or has no moments to pool. Build the step with pool=False, which moves"
        f" running statistics once a microbatch. The loss said: {error}"
    ) from error


def _float_sums(output: LossOutput) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    return jnp.asarray(output.loss_sum), jnp.asarray(output.weight_sum, jnp.float32), output.metric_sums


def _check_output(output: Any, batch_stats: Any, shards: Shards) -> None:
    if not isinstance(output, LossOutput):
        raise TypeError(f"the loss returned {type(output).__name__}; expected a jaxbn.training.LossOutput.")
    was, now = (str(jax.tree.structure(tree)) for tree in (batch_stats, output.batch_stats))
    if was != now:
        raise ValueError(f"the loss returned batch_stats of structure {now}; expected that of the state's: {was}.")
    shapes = [[jnp.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (batch_stats, output.batch_stats)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the loss returned batch_stats of shapes {shapes[1]}; expected the state's: {shapes[0]}.")
    differ = [
        jax.tree_util.keystr(p) for p, v in jax.tree_util.tree_leaves_with_path(output.batch_stats) if varying_axes(v)
    ]
    if shards.varying and differ:
        raise ValueError(
            f"batch_stats{differ[0]} differs from shard to shard of axis {shards.axis!r}. Give the normalizers"
            f" axis_name={shards.axis!r} to share statistics, or pool_axis_name={shards.axis!r} to keep to each shard's"
            " own and have the running ones in common."
        )


def _examples(batch: Any) -> int:
    return jax.tree.leaves(batch)[0].shape[0]
