"""One optimizer step, as every way to spread a batch takes it: gradient, microbatches, sums over shards, refusal."""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxbn._normalize import varying_axes
from jaxbn._recording import finish_pooling, start_pooling

Axis = Hashable | tuple[Hashable, ...]


class TrainState(NamedTuple):
    """Everything that a step changes.

    Attributes:
      step: int32 []: batches consumed so far, those of refused steps included, so that it tells the place in the data.
      params: the network's.
      batch_stats: the network's running statistics, the same on all devices.
      opt_state: optax's.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any

    @property
    def variables(self) -> dict:
        """What a network's apply takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


class LossOutput(NamedTuple):
    """What a loss function returns: loss(variables, batch, rng) -> LossOutput, for the examples that it was given.

    Sums and not means, so that shards and microbatches with unequal numbers of examples that count add up exactly.

    Attributes:
      total: [], the sum of the examples' losses, each times its weight; its gradient is taken.
      weight: [], the sum of the weights: the number of examples where all count once. No gradient flows into it.
      batch_stats: as moved by the network.
      sums: further sums over examples, such as {"correct": ..}; a step reports them divided by the weight.
    """

    total: jax.Array
    weight: jax.Array | float
    batch_stats: Any
    sums: dict[str, jax.Array] = {}  # noqa: RUF012


Loss = Callable[[dict, Any, jax.Array], LossOutput]


class Spread(NamedTuple):
    """How the examples of a batch are spread while the loss is traced."""

    axis: Axis | None  # named, where the loss sees one shard
    varying: bool  # whether types tell what differs between shards (shard_map), so that gradients of params are summed

    def total(self, tree):
        """The sum over shards of each leaf."""
        return tree if self.axis is None else lax.psum(tree, self.axis)

    def size(self):
        """How many shards there are, where the loss sees one of them."""
        return 1 if self.axis is None else lax.axis_size(self.axis)

    def fold(self, rng):
        """A key for each shard."""
        return rng if self.axis is None else jax.random.fold_in(rng, lax.axis_index(self.axis))

    def apart(self, tree):
        """Mark leaves as differing between shards, so that their gradients stay with each shard."""
        if not self.varying:
            return tree
        names = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        return jax.tree.map(
            lambda v: lax.pcast(v, tuple(n for n in names if n not in varying_axes(v)), to="varying"), tree
        )


def advance(loss, optimizer, how, microbatches, pool, state, batch, rng):
    """One optimizer step."""
    rng = how.fold(jax.random.fold_in(rng, state.step))
    if microbatches == 1:
        gradient, outcome = _gradient(loss, how, state.params, state.batch_stats, batch, rng)
        gradient = gradient if how.varying else how.total(gradient)
    else:
        gradient, outcome = _accumulate(loss, how, microbatches, pool, state, batch, rng)
        gradient = how.total(gradient)
    sums = how.total({"loss": outcome.total, **outcome.sums, "weight": jnp.asarray(outcome.weight, jnp.float32)})
    weight = sums.pop("weight")
    share = jnp.where(weight == 0, 0, 1 / jnp.where(weight == 0, 1, weight))
    gradient = jax.tree.map(lambda g: (g * (_examples(batch) * how.size() * share)).astype(g.dtype), gradient)
    means = {name: value * share for name, value in sums.items()}
    finite = jax.tree.reduce(lambda ok, g: ok & jnp.all(jnp.isfinite(g)), gradient, jnp.isfinite(means["loss"]))
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    moved = state._replace(
        params=optax.apply_updates(state.params, updates), opt_state=opt_state, batch_stats=outcome.batch_stats
    )
    moved = jax.tree.map(partial(jnp.where, finite), moved, state)._replace(step=state.step + 1)
    return moved, means | {"weight": weight, "skipped": 1 - finite.astype(jnp.int32)}


def _gradient(loss, how, params, batch_stats, batch, rng):
    """The gradient of total / examples, and the outcome. Dividing by a number known now keeps float16 in its range."""
    examples = _examples(batch) * how.size()

    def scaled(params):
        outcome = loss({"params": params, "batch_stats": batch_stats}, batch, rng)
        _check_outcome(outcome, batch_stats, how)
        return outcome.total / examples, outcome

    return jax.grad(scaled, has_aux=True)(params)


def _accumulate(loss, how, microbatches, pool, state, batch, rng):
    """Mean of the microbatches' gradients, their outcomes summed and their moments pooled."""

    def one(carry, number_and_part):
        gradient, sums, batch_stats = carry
        number, part = number_and_part
        more, outcome = _gradient(loss, how, params, batch_stats, part, jax.random.fold_in(rng, number))
        gradient = jax.tree.map(lambda a, b: a + b / microbatches, gradient, more)
        sums = jax.tree.map(jnp.add, sums, how.apart(_float_sums(outcome)))
        return (gradient, sums, outcome.batch_stats), None

    params = how.apart(state.params)
    batch_stats = start_pooling(state.batch_stats) if pool else state.batch_stats
    # Every n-th example, so that a microbatch is spread over the devices as the batch is.
    parts = jax.tree.map(lambda v: jnp.moveaxis(v.reshape(-1, microbatches, *v.shape[1:]), 1, 0), batch)
    part = jax.tree.map(lambda v: v[0], parts)
    sums = jax.eval_shape(lambda: _float_sums(loss({"params": params, "batch_stats": batch_stats}, part, rng)))
    sums = how.apart(jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), sums))
    start = how.apart(jax.tree.map(jnp.zeros_like, params)), sums, batch_stats
    (gradient, sums, batch_stats), _ = lax.scan(one, start, (jnp.arange(microbatches), parts))
    batch_stats = finish_pooling(batch_stats, state.batch_stats) if pool else batch_stats
    total, weight, more = sums
    return gradient, LossOutput(total, weight, batch_stats, more)


def _float_sums(outcome):
    return jnp.asarray(outcome.total), jnp.asarray(outcome.weight, jnp.float32), outcome.sums


def _check_outcome(outcome, batch_stats, how):
    if not isinstance(outcome, LossOutput):
        raise TypeError(f"the loss returned {type(outcome).__name__}; expected a jaxbn.training.LossOutput.")
    was, now = jax.tree.structure(batch_stats), jax.tree.structure(outcome.batch_stats)
    if was != now:
        raise ValueError(f"the loss returned batch_stats of structure {now}; expected that of the state's: {was}.")
    differ = [
        jax.tree_util.keystr(p) for p, v in jax.tree_util.tree_leaves_with_path(outcome.batch_stats) if varying_axes(v)
    ]
    if how.varying and differ:
        raise ValueError(
            f"batch_stats{differ[0]} differs from shard to shard of axis {how.axis!r}. Give the normalizers"
            f" axis_name={how.axis!r} to share statistics, or pool_axis_name={how.axis!r} to keep to each shard's own"
            " and have the running ones in common."
        )


def _examples(batch):
    return jax.tree.leaves(batch)[0].shape[0]
