"""Averages of params over training steps, kept by the optimizer: exponential (EMA) or plain (SWA)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbn._arithmetic import at_least_float32


class AverageState(NamedTuple):
    """What `averaging` keeps.

    Attributes:
      step: int32 []: updates so far.
      average: the tree of params, float32 at least.
      inner: the optimizer's own state.
    """

    step: jax.Array
    average: Any
    inner: Any


def averaging(
    optimizer: optax.GradientTransformation, *, decay: float | None = 0.999, start: int = 0, every: int = 1
) -> optax.GradientTransformation:
    """The same optimizer, which also keeps an average of the params that it makes.

        optimizer = averaging(optax.adam(1e-3), decay=0.999)
        ...                                                          # steps as always
        variables = averaged_variables(state)                        # averaged params; batch_stats have to be remade
        batch_stats = jaxbn.population_statistics(apply, variables, batches)

    After each `every`-th step beyond `start`, with the params that it made,

        average = decay * average + (1 - decay) * params             decay a number (Polyak and Juditsky 1992)
        average = average + (params - average) / n                   decay=None, n params so far (Izmailov et al. 2018)

    The first params that count are the first average, and until then the average follows the params. Training itself
    does not change. The average is a part of `opt_state`: every step of this package keeps, shards, refuses and saves
    it with the rest.

    Args:
      optimizer: optax's; its update gets params.
      decay: None averages all params equally, as stochastic weight averaging (SWA) and soups do.
      start: steps before the first params that count.
      every: steps from one to the next, such as those of an epoch.

    Returns:
      A GradientTransformation with an `AverageState`.

    Raises:
      ValueError: decay outside [0, 1], a negative start or an `every` below 1; from update, params=None.
    """
    if decay is not None and not 0 <= decay <= 1:
        raise ValueError(f"decay={decay}; expected 0 to 1, the share of the old average, or None for a plain average.")
    if start < 0 or every < 1:
        raise ValueError(f"start={start}, every={every}; expected at least 0 and at least 1 step.")

    def init(params):
        return AverageState(jnp.zeros((), jnp.int32), jax.tree.map(at_least_float32, params), optimizer.init(params))

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError("averaging needs the params: call optimizer.update(updates, state, params).")
        updates, inner = optax.with_extra_args_support(optimizer).update(updates, state.inner, params, **extra)
        step = state.step + 1
        after = jnp.maximum(step - start, 0)
        number = after // every
        share = 1 / jnp.maximum(number, 1) if decay is None else 1 - decay
        share = jnp.where(number <= 1, 1, share) * ((number == 0) | (after % every == 0))
        new = jax.tree.map(at_least_float32, optax.apply_updates(params, updates))
        return updates, AverageState(step, optax.incremental_update(new, state.average, share), inner)

    return optax.GradientTransformationExtraArgs(init, update)


def averaged_variables(state: Any) -> dict[str, Any]:
    """{"params", "batch_stats"} with the params averaged, in the dtypes of params; batch_stats are those of training.

    They belong to other params, and have to be measured anew with `jaxbn.population_statistics`.

    Args:
      state: a `TrainState` whose optimizer is, or holds, one of `averaging`.

    Raises:
      ValueError: no average among the optimizer's states.
    """
    nodes = jax.tree.leaves(state.opt_state, is_leaf=lambda node: isinstance(node, AverageState))
    found = [node for node in nodes if isinstance(node, AverageState)]
    if len(found) != 1:
        raise ValueError(
            f"opt_state holds {len(found)} averages of params; expected 1: wrap the optimizer in averaging."
        )
    params = jax.tree.map(lambda average, v: average.astype(v.dtype), found[0].average, state.params)
    return {"params": params, "batch_stats": state.batch_stats}
