"""Data-parallel training with optax: one loss function, and steps for `jit` on a mesh, `shard_map` and `pmap`.

A step takes and returns a `TrainState`. Whichever of the three builds it, it does the same: it follows the gradient of
the mean loss of all examples that count, on however many devices they lie.

    def loss(variables, batch, rng):
        logits, batch_stats = network.apply(variables, batch["image"], train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return LossOutput(losses.sum(), losses.size, batch_stats)

    mesh = jax.make_mesh((8,), ("data",))
    step = shard_map_step(loss, optimizer, mesh=mesh)      # its normalizers have axis_name="data"
    state = replicate(init_state(variables, optimizer), mesh)
    for batch in batches:
        state, metrics = step(state, shard_batch(batch, mesh), rng)

Where one processor plays several devices, wait for each step, as `float(metrics["loss"])` does: XLA ends a process
whose devices do not meet in time.

Under `jit_step` the loss sees the whole batch and normalizers have no axis_name; under `shard_map_step` and
`pmap_step` it sees one shard, and returns sums over the examples of that shard.

A Flax linen network without running statistics has no "batch_stats" among its variables:

    logits, moved = network.apply(variables, x, mutable=["batch_stats"])
    return LossOutput(losses.sum(), losses.size, moved.get("batch_stats", {}))

An nnx model is split before and merged inside the loss. `copy=True` gives it variables of its own, whose change is seen
by this trace alone:

    graph, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    def loss(variables, batch, rng):
        model = nnx.merge(graph, variables["params"], variables["batch_stats"], copy=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(model(batch["image"]), batch["label"])
        return LossOutput(losses.sum(), losses.size, nnx.state(model, nnx.BatchStat))

    state = init_state({"params": params, "batch_stats": batch_stats}, optimizer)
    ...
    nnx.update(model, state.params, state.batch_stats)     # the trained values back into the model

Averages of params (EMA, SWA) are kept by the optimizer: see `averaging`.
"""

from jaxbn.training._average import AverageState, averaged_variables, averaging
from jaxbn.training._build import Step, jit_step, pmap_step, shard_map_step
from jaxbn.training._place import replicate, replicate_for_pmap, shard_batch, unreplicate
from jaxbn.training._state import LossOutput, TrainState, init_state
from jaxbn.training._step import nonfinite_parts

__all__ = [
    # What a step takes and returns
    "TrainState",
    "LossOutput",
    "init_state",
    # Steps
    "jit_step",
    "shard_map_step",
    "pmap_step",
    "Step",
    "nonfinite_parts",
    # Averaged params
    "averaging",
    "averaged_variables",
    "AverageState",
    # Placing batches and states on devices
    "shard_batch",
    "replicate",
    "replicate_for_pmap",
    "unreplicate",
]
