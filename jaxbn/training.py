"""Data-parallel training with optax: one loss function, and steps for `jit` on a mesh, `shard_map` and `pmap`.

A step takes and returns a `TrainState`, and whichever of the three builds it, it does the same: the gradient of the
mean loss of all examples that count, on however many devices they lie.

    def loss(variables, batch, rng):
        logits, batch_stats = network.apply(variables, batch["image"], train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return LossOutput(losses.sum(), losses.size, batch_stats)

    mesh = jax.make_mesh((8,), ("data",))
    step = shard_map_step(loss, optimizer, mesh=mesh)      # its normalizers have axis_name="data"
    state = replicate(init_state(variables, optimizer), mesh)
    for batch in batches:
        state, metrics = step(state, shard_batch(batch, mesh), rng)

Under `jit_step` the loss sees the whole batch and normalizers have no axis_name; under `shard_map_step` and
`pmap_step` it sees one shard, and a sum over the examples of that shard is all that it has to return.
"""

from collections.abc import Callable, Hashable
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxbn._step import Axis, Loss, LossOutput, Spread, TrainState, advance

__all__ = [
    "LossOutput",
    "TrainState",
    "init_state",
    "jit_step",
    "pmap_step",
    "replicate",
    "shard_map_step",
    "shard_batch",
    "replicate_for_pmap",
    "unreplicate",
]

Step = Callable[[Any, Any, jax.Array], tuple[Any, dict[str, jax.Array]]]


def init_state(variables: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; its arrays are copies, since steps consume the state that they are given."""
    params, batch_stats = jax.tree.map(jnp.array, (variables["params"], variables["batch_stats"]))
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params))


def jit_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    axis: Axis = "data",
    microbatches: int = 1,
    pool: bool = True,
    scan: bool = False,
) -> Step:
    """A train step under plain `jit`: the batch lies on the mesh in shards, and XLA puts in what crosses devices.

    The loss sees the whole batch (or microbatch): statistics are global, or those of ghost groups, without axis_name.
    Arguments, result and errors are those of `shard_map_step`.
    """
    mesh, shards = _automatic(mesh), _shards(mesh, axis)
    one = partial(advance, loss, optimizer, Spread(None, False), microbatches, pool)
    whole, parts = NamedSharding(mesh, P()), NamedSharding(mesh, _spec(axis, scan))
    step = jax.jit(
        _scanned(one, scan),
        in_shardings=(whole, parts, whole),
        out_shardings=(whole, whole),
        donate_argnums=0,
    )
    return _checking(step, shards, microbatches, scan)


def shard_map_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    axis: Axis = "data",
    microbatches: int = 1,
    pool: bool = True,
    scan: bool = False,
) -> Step:
    """A train step under `jax.shard_map`, its varying-axis check on: it proves that all shards keep one batch_stats.

    The loss sees one shard: normalizers that share statistics have axis_name=axis, those that do not have it as
    pool_axis_name. A step whose loss or gradients are not finite leaves params, opt_state and batch_stats as they were,
    on all devices; only `step` moves on.

    Args:
      loss: see `LossOutput`. A term that is no sum over examples, such as weight decay, belongs into the optimizer. Its
        `rng` is folded with the step's number, the shard's index and the microbatch's.
      optimizer: optax's.
      mesh: with an axis of that name; params and statistics are the same on all its devices.
      axis: name of the mesh axis, or a tuple of them, over which batches are spread.
      microbatches: into how many parts each shard's examples are cut, one after the other in memory: every n-th example
        makes one. Gradients are summed, and the gradients of all shards meet once.
      pool: whether the moments of all microbatches are pooled and the running statistics moved once. False moves them
        once a microbatch, which `whitening_norm` and layers that are not jaxbn's need.
      scan: a dispatch runs many steps: leaves of its batch are [steps, examples, ...], metrics [steps].

    Returns:
      step(state, batch, rng) -> (state, metrics). Leaves of batch are [examples, ...]. The state that it is given is
      consumed (donated). metrics: "loss", what `sums` held over the weight, "weight", and "skipped", 1 where the step
      was refused; all means over the whole batch.

    Raises:
      ValueError: the mesh has no such axis; and when traced, a batch that does not divide into shards and microbatches,
        or statistics that differ from shard to shard.
    """
    mesh, shards = _automatic(mesh), _shards(mesh, axis)
    one = partial(advance, loss, optimizer, Spread(axis, True), microbatches, pool)
    parts = _spec(axis, scan)
    spread_out = jax.shard_map(
        _scanned(one, scan), mesh=mesh, in_specs=(P(), parts, P()), out_specs=(P(), P()), check_vma=True
    )
    return _checking(jax.jit(spread_out, donate_argnums=0), shards, microbatches, scan)


def pmap_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    devices: list | None = None,
    axis: Hashable = "data",
    microbatches: int = 1,
    pool: bool = True,
    scan: bool = False,
) -> Step:
    """A train step under `jax.pmap`, which is in maintenance: `shard_map_step` does the same with less.

    As `shard_map_step`, but for the state: `replicate_for_pmap(state, devices)` before the first step and
    `unreplicate(state)` after the last. Batches are [examples, ...] as there. That all devices keep one batch_stats is
    proved as there, by tracing.

    Args:
      loss: as in `shard_map_step`.
      optimizer: as there.
      devices: None is all of this process.
      axis: the name that pmap binds.
      microbatches: as in `shard_map_step`.
      pool: as there.
      scan: as there.
    """
    devices = jax.local_devices() if devices is None else devices
    one = partial(advance, loss, optimizer, Spread(axis, False), microbatches, pool)
    mapped = jax.pmap(_scanned(one, scan), axis, in_axes=(0, 1 if scan else 0, None), devices=devices, donate_argnums=0)
    alike = dict(mesh=Mesh(np.asarray(devices), (axis,)), axis=axis, microbatches=microbatches, pool=pool, scan=scan)
    proof = _once(shard_map_step(loss, optimizer, **alike).trace)
    rows = 1 if scan else 0

    def split(leaf):
        return leaf.reshape(*leaf.shape[:rows], len(devices), -1, *leaf.shape[rows + 1 :])

    def step(state, batch, rng):
        proof(jax.tree.map(_first_shape, state), batch, rng)
        state, metrics = mapped(state, jax.tree.map(split, batch), rng)
        return state, jax.tree.map(lambda leaf: leaf[0], metrics)

    return _checking(step, len(devices), microbatches, scan)


def shard_batch(batch: Any, mesh: Mesh, axis: Axis = "data", *, scan: bool = False) -> Any:
    """This process's examples, numpy or jax arrays [examples, ...], as its part of a batch spread over the mesh.

    With one process that is the whole batch; with several each passes its own, of equal numbers, in the order of their
    devices on the mesh. With scan the leaves are [steps, examples, ...].
    """
    sharding = NamedSharding(_automatic(mesh), _spec(axis, scan))
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Each leaf on every device of the mesh; with several processes all pass the same values."""
    sharding = NamedSharding(_automatic(mesh), P())
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.array(leaf)), tree)


def replicate_for_pmap(tree: Any, devices: list, axis: Hashable = "data") -> Any:
    """Each leaf once per device, along a new first axis, as pmap over `axis` wants it."""
    sharding = NamedSharding(Mesh(np.asarray(devices), (axis,)), P(axis))
    return jax.tree.map(lambda leaf: jax.device_put(jnp.stack([leaf] * len(devices)), sharding), tree)


def unreplicate(tree: Any) -> Any:
    """The first device's copy of each leaf that `replicate_for_pmap` made."""
    return jax.tree.map(lambda leaf: leaf[0], tree)


def _scanned(one, scan):
    if not scan:
        return one
    return lambda state, batches, rng: lax.scan(lambda state, batch: one(state, batch, rng), state, batches)


def _automatic(mesh):
    """The mesh with automatic axes: with explicit ones many an operation of a loss would have to name its sharding."""
    return Mesh(mesh.devices, mesh.axis_names)


def _spec(axis, scan):
    return P(None, axis) if scan else P(axis)


def _shards(mesh, axis):
    names = axis if isinstance(axis, tuple) else (axis,)
    missing = [name for name in names if name not in mesh.shape]
    if missing:
        raise ValueError(f"the mesh has axes {dict(mesh.shape)} and no {missing[0]!r}: pass axis= one of them.")
    return int(np.prod([mesh.shape[name] for name in names]))


def _checking(step, shards, microbatches, scan):
    """The same step behind a check of its batch's shapes; what else it has, such as `lower`, stays."""

    def behind_check(f):
        @wraps(f)
        def checked(state, batch, rng):
            _check_batch(batch, shards, microbatches, 1 if scan else 0)
            return f(state, batch, rng)

        return checked

    checked = behind_check(step)
    for name in ("lower", "trace"):
        if hasattr(step, name):
            setattr(checked, name, behind_check(getattr(step, name)))
    return checked


def _check_batch(batch, shards, microbatches, axis):
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    shapes = {jax.tree_util.keystr(path) or "batch": np.shape(leaf) for path, leaf in leaves}
    if any(len(shape) <= axis for shape in shapes.values()) or len({shape[axis] for shape in shapes.values()}) != 1:
        raise ValueError(
            f"the batch has leaves of shapes {shapes}; expected as many examples in all, along axis {axis}."
        )
    examples = next(iter(shapes.values()))[axis]
    if examples % (shards * microbatches):
        raise ValueError(
            f"a batch of {examples} examples does not divide into {shards} shards of {microbatches} microbatches each;"
            f" pass a multiple of {shards * microbatches}, padded with examples of weight 0 if need be."
        )


def _first_shape(leaf):
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)


def _once(f):
    done = []

    def first_time(*args):
        shapes = jax.tree.map(lambda v: (np.shape(v), jnp.result_type(v)), args)
        if shapes not in done:
            f(*args)
            done.append(shapes)

    return first_time
