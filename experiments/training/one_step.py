"""One network's training step and its prediction, compiled, to be timed: no batches to draw, nothing to wait for."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from experiments.training.loop import softmax_loss
from experiments.training.models import Network


class Timed(NamedTuple):
    """A compiled program and its arguments.

    Attributes:
      run: runs it once, and waits.
      compiled: the program.
    """

    run: Callable[[], object]
    compiled: jax.stages.Compiled


def training(network: Network, optimizer: optax.GradientTransformation, x: Array, labels: Array) -> Timed:
    """A step that goes on from the state of the last one; x: [batch, ...], labels: int [batch]."""
    variables = jax.jit(network.init)(jax.random.key(0), x)

    def step(state: tuple, x: Array, labels: Array) -> tuple:
        params, batch_stats, optimizer_state = state

        def loss(params: Any) -> tuple[Array, Any]:
            logits, moved = network.apply({"params": params, "batch_stats": batch_stats}, x, train=True)
            return softmax_loss(logits, labels), moved

        gradients, batch_stats = jax.grad(loss, has_aux=True)(params)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state)
        return optax.apply_updates(params, updates), batch_stats, optimizer_state

    state = variables["params"], variables["batch_stats"], optimizer.init(variables["params"])
    compiled = jax.jit(step, donate_argnums=0).lower(state, x, labels).compile()
    held = {"state": jax.tree.map(jnp.copy, state)}  # equal arrays may share a buffer, which is donated once

    def run() -> None:
        held["state"] = jax.block_until_ready(compiled(held["state"], x, labels))

    return Timed(run, compiled)


def prediction(network: Network, x: Array) -> Timed:
    """The logits of a batch at test time."""
    variables = jax.jit(network.init)(jax.random.key(0), x)

    def predict(variables: dict, x: Array) -> Array:
        return network.apply(variables, x, train=False)[0]

    compiled = jax.jit(predict).lower(variables, x).compile()
    return Timed(lambda: jax.block_until_ready(compiled(variables, x)), compiled)
