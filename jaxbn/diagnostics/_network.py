"""The one way in which diagnostics call a network: the loss function that it is trained with."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.tree_util import GetAttrKey, keystr, tree_flatten_with_path
from jax.typing import ArrayLike

from jaxbn._arithmetic import at_least_float32
from jaxbn.training._state import LossOutput

Variables = Mapping[str, Any]

# loss(variables, batch, rng) -> LossOutput, as jaxbn.training takes it.
Loss = Callable[[Any, Any, Array], LossOutput]


def over_batches(loss: Loss) -> Loss:
    """A loss of several batches, from one of a single batch: each is normalized by itself, and their sums are added.

    Diagnostics of the result are those of the mean loss of all batches, computed in the memory of one: the batches come
    one after the other, and the backward pass computes each forward pass again.

    Args:
      loss: as diagnostics take it; see `jaxbn.diagnostics`.

    Returns:
      A loss whose batch has leaves [batches, examples, ...]. Every batch starts from the same running statistics; those
      of the last batch come back. Each batch has a random key of its own.
    """

    def total(variables: Variables, batches: Any, rng: Array) -> LossOutput:
        @jax.checkpoint
        def one(batch, number):
            output = checked_output(loss(variables, batch, jax.random.fold_in(rng, number)))
            return output._replace(weight_sum=jnp.asarray(output.weight_sum, jnp.float32))

        def add(sums, numbered):
            output = one(*numbered)
            sums = jax.tree.map(jnp.add, sums, output._replace(batch_stats={}))
            return sums, output.batch_stats

        count = _number_of_batches(batches)
        first = jax.tree.map(lambda leaf: leaf[0], batches)
        shapes = jax.eval_shape(one, first, jnp.zeros((), jnp.int32))._replace(batch_stats={})
        start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        sums, batch_stats = lax.scan(add, start, (batches, jnp.arange(count, dtype=jnp.int32)))
        return sums._replace(batch_stats=jax.tree.map(lambda leaf: leaf[-1], batch_stats))

    return total


def mean_loss(output: LossOutput) -> Array:
    """[]: loss_sum / weight_sum, in float32 at least; no gradient flows into the weight."""
    return at_least_float32(jnp.asarray(output.loss_sum)) / lax.stop_gradient(jnp.asarray(output.weight_sum))


def loss_of_params(loss: Loss, variables: Variables, batch: Any, rng: Array) -> Callable[[Any], Array]:
    """The mean loss as a function of params alone, everything else held fixed."""
    return lambda params: mean_loss(checked_output(loss({**variables, "params": params}, batch, rng)))


def checked_output(output: Any) -> LossOutput:
    """What a loss returned; TypeError or ValueError where it is not a LossOutput of two scalars."""
    if not isinstance(output, LossOutput):
        raise TypeError(
            f"the loss returned {type(output).__name__}; expected jaxbn.training.LossOutput(loss_sum, weight_sum,"
            " batch_stats): of a mean over n examples LossOutput(n * mean, n, batch_stats)."
        )
    shapes = jnp.shape(output.loss_sum), jnp.shape(output.weight_sum)
    if shapes != ((), ()):
        raise ValueError(f"the loss returned loss_sum and weight_sum of shapes {shapes}; expected scalars, ().")
    return output


def checked_variables(variables: Any, name: str = "variables") -> Variables:
    """Variables as a dict; TypeError or ValueError where there are no real params to differentiate by."""
    if not isinstance(variables, Mapping) or "params" not in variables:
        held = sorted(map(str, variables)) if isinstance(variables, Mapping) else type(variables).__name__
        raise TypeError(f'{name} is {held}; expected a dict {{"params": .., "batch_stats": ..}}.')
    leaves = named_leaves(variables["params"])
    if not leaves:
        raise ValueError(f'{name}["params"] holds no arrays; there is nothing to differentiate by.')
    for path, leaf in leaves.items():
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"{name}: param {path!r} has dtype {jnp.result_type(leaf)}; expected real floats. Keep what is not"
                " trained in a collection of its own."
            )
    return {**variables}


def check_alike(tree: Any, name: str, expected: Any, expected_name: str) -> None:
    """ValueError where two trees differ in structure or shapes."""
    got, wanted = str(jax.tree.structure(tree)), str(jax.tree.structure(expected))
    if got != wanted:
        raise ValueError(f"{name} has structure {got}; expected that of {expected_name}: {wanted}.")
    for (path, leaf), like in zip(named_leaves(tree).items(), jax.tree.leaves(expected), strict=True):
        if jnp.shape(leaf) != jnp.shape(like):
            raise ValueError(
                f"{name}: {path!r} has shape {jnp.shape(leaf)}; expected that of {expected_name}: {jnp.shape(like)}."
            )


def vector_of(values: ArrayLike, name: str) -> Array:
    """A vector of real floats; ValueError for other shapes and TypeError for other numbers."""
    vector = jnp.asarray(values)
    if vector.ndim != 1 or vector.size == 0:
        raise ValueError(f"{name} has shape {vector.shape}; expected a vector of one value or more.")
    if jnp.issubdtype(vector.dtype, jnp.complexfloating):
        raise TypeError(f"{name} has dtype {vector.dtype}; expected real numbers.")
    return vector.astype(jnp.promote_types(vector.dtype, jnp.float32))


def key_of(rng: Array | None) -> Array:
    """The key given, or one that is always the same."""
    return jax.random.key(0) if rng is None else rng


def named_leaves(tree: Any) -> dict[str, Any]:
    """{"path/name": leaf} in the order of the tree; "" for a tree that is one array."""
    leaves = tree_flatten_with_path(tree)[0]
    # Variables of nnx hold their array in an attribute of this name.
    paths = [path[:-1] if path and path[-1] == GetAttrKey("value") else path for path, _ in leaves]
    return {keystr(path, simple=True, separator="/"): leaf for path, (_, leaf) in zip(paths, leaves, strict=True)}


def _number_of_batches(batches: Any) -> int:
    shapes = {path or "batches": jnp.shape(leaf) for path, leaf in named_leaves(batches).items()}
    if not shapes or any(not shape for shape in shapes.values()) or len({shape[0] for shape in shapes.values()}) != 1:
        raise ValueError(f"the batches have leaves of shapes {shapes}; expected as many batches in all, along axis 0.")
    return next(iter(shapes.values()))[0]
