"""Train steps compiled for plain `jit` on a mesh, for `shard_map` and for `pmap`, which check what they are given."""

import dataclasses
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxbn.training._place import automatic, batch_spec, unreplicate
from jaxbn.training._shards import Axis, Shards
from jaxbn.training._state import Loss, TrainState
from jaxbn.training._step import Metrics, advance


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """A compiled train step: step(state, batch, rng) -> (state, metrics), which checks its arguments first.

    Attributes:
      run: the compiled function.
      shards: into how many shards a batch is divided.
      microbatches: into how many microbatches a shard is.
      scan: whether leaves of a batch are [steps, examples, ...].
      donate: whether `run` consumes the state.
    """

    run: Callable[..., Any]
    shards: int
    microbatches: int
    scan: bool
    donate: bool

    def __call__(self, state: TrainState, batch: Any, rng: jax.Array) -> tuple[TrainState, Metrics]:
        """Run the step; ValueError where the batch does not divide or the state was consumed."""
        self._check_batch(batch)
        if self.donate:
            _check_not_consumed(state)
        return self.run(state, batch, rng)

    def lower(self, state: TrainState, batch: Any, rng: jax.Array) -> Any:
        """The step lowered for these arguments, as `jax.jit` lowers; a step by pmap has none."""
        self._check_batch(batch)
        return self._ahead_of_time("lower")(state, batch, rng)

    def trace(self, state: TrainState, batch: Any, rng: jax.Array) -> Any:
        """The step traced for these arguments, as `jax.jit` traces; a step by pmap has none."""
        self._check_batch(batch)
        return self._ahead_of_time("trace")(state, batch, rng)

    def _ahead_of_time(self, name):
        if not hasattr(self.run, name):
            raise AttributeError(f"a step by pmap has no {name}; build it with shard_map_step.")
        return getattr(self.run, name)

    def _check_batch(self, batch):
        axis = 1 if self.scan else 0
        leaves = jax.tree_util.tree_leaves_with_path(batch)
        shapes = {jax.tree_util.keystr(path) or "batch": np.shape(leaf) for path, leaf in leaves}
        if any(len(shape) <= axis for shape in shapes.values()) or len({shape[axis] for shape in shapes.values()}) != 1:
            raise ValueError(
                f"the batch has leaves of shapes {shapes}; expected as many examples in all, along axis {axis}."
            )
        examples, parts = next(iter(shapes.values()))[axis], self.shards * self.microbatches
        if examples % parts:
            raise ValueError(
                f"a batch of {examples} examples does not divide into {self.shards} shards of {self.microbatches}"
                f" microbatches each; pass a multiple of {parts}, padded with examples of weight 0 if need be."
            )


def jit_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    axis: Axis = "data",
    microbatches: int = 1,
    pool: bool = True,
    scan: bool = False,
    donate: bool = True,
) -> Step:
    """A train step under plain `jit`: the batch lies on the mesh in shards, and XLA inserts the collectives.

    The loss sees the whole batch (or microbatch): statistics are global, or those of ghost groups, without axis_name.
    Arguments, result and errors are those of `shard_map_step`.
    """
    mesh, shards = automatic(mesh), _shards(mesh, axis)
    one = partial(advance, loss, optimizer, Shards(None, False), microbatches, pool)
    whole, parts = NamedSharding(mesh, P()), NamedSharding(mesh, batch_spec(axis, scan))
    run = jax.jit(
        _scanned(one, scan),
        in_shardings=(whole, parts, whole),
        out_shardings=(whole, whole),
        donate_argnums=_donated(donate),
    )
    return Step(run, shards, microbatches, scan, donate)


def shard_map_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    axis: Axis = "data",
    microbatches: int = 1,
    pool: bool = True,
    scan: bool = False,
    donate: bool = True,
) -> Step:
    """A train step under `jax.shard_map`, its varying-axis check on: it proves that all shards keep one batch_stats.

    The loss sees one shard: normalizers that share statistics have axis_name=axis, those that do not have it as
    pool_axis_name.

    A step that is not finite changes nothing: where the loss, the gradient or any value that would be stored (params,
    opt_state and batch_stats, as the optimizer and the network return them) is not finite, all of them stay bit for
    bit as they were, on all devices; only `step` moves on. So does a batch of total weight 0. A stored value that was
    not finite before the step is not held against it. The check computes the optimizer's update twice and needs no
    further memory. On two CPU cores a step of Adam with it takes 1.2 times as long as without (three dense layers of
    256 features, 256 examples), and 2.4 times where hardly anything but the update is computed (1,024 features, 32
    examples); `pytest -m slow -n 0 tests/test_training_refusal.py` measures it.

    Args:
      loss: see `LossOutput`. A term that is no sum over examples, such as weight decay, belongs into the optimizer. Its
        `rng` is folded with the step's number, the shard's index and the microbatch's.
      optimizer: optax's.
      mesh: with an axis of that name; params and statistics are the same on all its devices.
      axis: name of the mesh axis, or a tuple of them, over which batches are sharded.
      microbatches: into how many parts each shard's examples are cut, one after the other in memory: every n-th example
        makes one. Gradients are summed, and the gradients of all shards meet once.
      pool: whether the moments of all microbatches are pooled and the running statistics moved once. False moves them
        once a microbatch, which `whitening_norm` and layers that are not jaxbn's need.
      scan: one call runs many steps: leaves of its batch are [steps, examples, ...], metrics [steps].
      donate: whether the step consumes the state that it is given, so that old and new share memory. False keeps it.

    Returns:
      step(state, batch, rng) -> (state, metrics). Leaves of batch are [examples, ...]. metrics, over the whole batch:
      "loss" and each of `metric_sums`, divided by the weight; "weight"; "skipped", 1 where the step was refused; and
      "nonfinite", which says by what: 0, or a code for `nonfinite_parts`. Skipped with a code of 0 is a weight of 0.

    Raises:
      ValueError: the mesh has no such axis; from the step, a batch that does not divide into shards and microbatches,
        a state that was consumed, statistics that differ from shard to shard, or a layer that cannot pool microbatches.
      TypeError: from the step, a loss that does not return a `LossOutput`.
    """
    mesh, shards = automatic(mesh), _shards(mesh, axis)
    one = partial(advance, loss, optimizer, Shards(axis, True), microbatches, pool)
    parts = batch_spec(axis, scan)
    mapped = jax.shard_map(
        _scanned(one, scan), mesh=mesh, in_specs=(P(), parts, P()), out_specs=(P(), P()), check_vma=True
    )
    return Step(jax.jit(mapped, donate_argnums=_donated(donate)), shards, microbatches, scan, donate)


def pmap_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    devices: list | None = None,
    axis: Hashable = "data",
    microbatches: int = 1,
    pool: bool = True,
    scan: bool = False,
    donate: bool = True,
) -> Step:
    """A train step under `jax.pmap`, which is in maintenance: `shard_map_step` does the same with less.

    As `shard_map_step`, but for the state: `replicate_for_pmap(state, devices)` before the first step and
    `unreplicate(state)` after the last. Batches are [examples, ...] as there. Tracing a `shard_map_step` proves that
    all devices keep one batch_stats.

    Args:
      loss: as in `shard_map_step`.
      optimizer: as there.
      devices: None is all of this process.
      axis: the name that pmap binds.
      microbatches: as in `shard_map_step`.
      pool: as there.
      scan: as there.
      donate: as there.
    """
    devices = jax.local_devices() if devices is None else devices
    one = partial(advance, loss, optimizer, Shards(axis, False), microbatches, pool)
    rows = 1 if scan else 0
    mapped = jax.pmap(
        _scanned(one, scan), axis, in_axes=(0, rows, None), devices=devices, donate_argnums=_donated(donate)
    )
    mesh = Mesh(np.asarray(devices), (axis,))
    same = shard_map_step(loss, optimizer, mesh=mesh, axis=axis, microbatches=microbatches, pool=pool, scan=scan)
    prove = _once_a_shape(same.trace)

    def split(leaf):
        return leaf.reshape(*leaf.shape[:rows], len(devices), -1, *leaf.shape[rows + 1 :])

    def run(state, batch, rng):
        prove(jax.tree.map(_first_shape, state), batch, rng)
        state, metrics = mapped(state, jax.tree.map(split, batch), rng)
        return state, unreplicate(metrics)

    return Step(run, len(devices), microbatches, scan, donate)


def _scanned(one, scan):
    if not scan:
        return one
    return lambda state, batches, rng: lax.scan(lambda state, batch: one(state, batch, rng), state, batches)


def _donated(donate) -> tuple[int, ...]:
    return (0,) if donate else ()


def _shards(mesh, axis) -> int:
    names = axis if isinstance(axis, tuple) else (axis,)
    missing = [name for name in names if name not in mesh.shape]
    if missing:
        raise ValueError(f"the mesh has axes {dict(mesh.shape)} and no {missing[0]!r}: pass axis= one of them.")
    return int(np.prod([mesh.shape[name] for name in names]))


def _check_not_consumed(state) -> None:
    # Given a deleted array, XLA's runtime crashes the process where there are several CPU devices.
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted():
            raise ValueError(
                f"state{jax.tree_util.keystr(path)} was consumed by an earlier step. Go on from the state which that"
                " step returned, or build the step with donate=False, which keeps the state that it is given."
            )


def _first_shape(leaf):
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)


def _once_a_shape(f):
    """Call f only for arguments of shapes and dtypes that it has not seen."""
    seen = []

    def first_time(*args):
        shapes = jax.tree.map(lambda v: (np.shape(v), jax.numpy.result_type(v)), args)
        if shapes not in seen:
            f(*args)
            seen.append(shapes)

    return first_time
