"""Fine-tuning: normalizers that stand still, in one layer or by path in a whole network."""

import re
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from jaxbn._factory import normalizer_factory
from jaxbn._normalizer import Normalizer

PathFilter = str | Callable[[str], bool]


@normalizer_factory
def frozen(norm: Normalizer, *, freeze_params: bool = False) -> Normalizer:
    """A normalizer that stays at its running statistics: `train=True` computes what `train=False` does.

    So do `use_running` and `update`, whatever they say: nothing normalizes by the batch, and nothing moves.

    params and batch_stats are those of `norm`, so that a checkpoint of a network built with `norm` fits one built with
    frozen(norm). It is what detection networks do that are fine-tuned on few images a device (He et al. 2016, appendix
    A). A normalizer without running state is not changed but for its params.

    Args:
      norm: the Normalizer.
      freeze_params: no gradient flows to its params, scale and bias, either.

    Returns:
      A Normalizer whose apply returns batch_stats as they came.
    """

    def apply(variables, x, *, train, where=None, weights=None, rng=None, **arguments):
        del train
        arguments |= dict(where=where, weights=weights, rng=rng)
        params, batch_stats = variables.get("params", {}), variables["batch_stats"]
        params = lax.stop_gradient(params) if freeze_params else params
        y, _ = norm.apply({"params": params, "batch_stats": batch_stats}, x, train=False, **arguments)
        return y, batch_stats

    return type(norm)(norm.init, apply)


def path_mask(tree: Any, path_filter: PathFilter) -> Any:
    """For each leaf, whether its path is chosen: a tree of bools, as `optax.masked` takes them.

    `optax.chain(optimizer, optax.masked(optax.set_to_zero(), path_mask(params, "BatchNorm")))` leaves the scales and
    biases of all layers of that name as they are.

    Args:
      tree: such as the params or batch_stats of a network: nested dicts, boxed values among them, or an `nnx.State`.
      path_filter: a regular expression that is searched for in the path, "Block_0/BatchNorm_1/scale"; or a function of
        that path.

    Returns:
      A tree of the same structure.

    Raises:
      ValueError: the tree has leaves and none is chosen.
    """
    chosen = path_filter if callable(path_filter) else lambda path: re.search(path_filter, path) is not None
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    names = [path_name(path) for path, _ in leaves]
    mask = [bool(chosen(name)) for name in names]
    if names and not any(mask):
        raise ValueError(f"path_filter={path_filter!r} chooses none of the paths, which are {names}.")
    return jax.tree.unflatten(treedef, mask)


def path_name(path) -> str:
    """The names on the way to a leaf, joined by "/"."""
    # Variables of nnx and boxed values of linen hold their array in an attribute of this name.
    path = path[:-1] if path and path[-1] == jax.tree_util.GetAttrKey("value") else path
    return jax.tree_util.keystr(path, simple=True, separator="/")


def stop_gradient_at(tree: Any, path_filter: PathFilter) -> Any:
    """The same tree, through whose chosen leaves no gradient flows: to be applied to params inside the loss.

    Args:
      tree: as in `path_mask`.
      path_filter: as in `path_mask`.

    Raises:
      ValueError: as `path_mask`.
    """
    return jax.tree.map(lambda v, stop: lax.stop_gradient(v) if stop else v, tree, path_mask(tree, path_filter))


def keep_at(old: Any, new: Any, path_filter: PathFilter) -> Any:
    """The new tree with the chosen leaves of the old one: batch_stats after a step, those of some layers not moved.

    The layers themselves still normalize by their batch in training; to have them use their running statistics
    build them with `frozen`.

    Args:
      old: as `tree` in `path_mask`.
      new: of the same structure.
      path_filter: as in `path_mask`.

    Raises:
      ValueError: as `path_mask`.
    """
    return jax.tree.map(lambda a, b, keep: a if keep else b, old, new, path_mask(old, path_filter))
