"""What a train step takes and returns, and what a loss function returns to it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class TrainState(NamedTuple):
    """Everything that a step changes.

    Attributes:
      step: int32 []: batches consumed so far, those of refused steps included: the place in the data.
      params: the network's.
      batch_stats: the network's running statistics, the same on all devices; {} for a network without any.
      opt_state: optax's.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """What a network's apply takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


class LossOutput(NamedTuple):
    """What a loss function returns for the examples it was given: loss(variables, batch, rng) -> LossOutput.

    Sums and not means, so that shards and microbatches with unequal numbers of examples that count add up exactly.

    Attributes:
      loss_sum: [], the sum of the examples' losses, each times its weight; its gradient is taken.
      weight_sum: [], the sum of the weights: the number of examples where all count once. No gradient flows into it.
      batch_stats: as moved by the network; {} for a network without any.
      metric_sums: further sums over examples, such as {"correct": ..}; a step reports them divided by the weight.
    """

    loss_sum: jax.Array
    weight_sum: jax.Array | float
    batch_stats: Any
    metric_sums: dict[str, jax.Array] = {}  # noqa: RUF012 (a NamedTuple's default; nothing writes to it)


Loss = Callable[[dict[str, Any], Any, jax.Array], LossOutput]


def init_state(variables: dict[str, Any], optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step.

    Its arrays are copies, each its own, since a step consumes the state that it is given.

    Args:
      variables: {"params", "batch_stats"}; a network without params or without statistics may leave them out.
      optimizer: optax's.
    """
    params, batch_stats = _copied((variables.get("params", {}), variables.get("batch_stats", {})))
    # Some optimizers keep the params themselves as a part of their state.
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, _copied(optimizer.init(params)))


def _copied(tree: Any) -> Any:
    return jax.tree.map(jnp.array, tree)
