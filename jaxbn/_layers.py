"""The normalization layers of a tree of statistics, by path."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.tree_util import GetAttrKey, keystr, tree_flatten_with_path

from jaxbn._record import is_recorded

Layers = dict[str, dict[str, Any]]

# What the variables hold of a normalizer that is one affine map of each feature at test time. Others hold more: "count"
# (virtual batch norm), "whitening", "length" (recurrent), "scale_kernel" (conditional).
AFFINE_NAMES = {
    "params": {"scale", "bias"},
    "batch_stats": {"mean", "var", "weight", "step", "mean_bank", "var_bank"},
}


def find_layers(batch_stats: Any, names: Iterable[str] = ("mean", "var")) -> Layers:
    """Every layer that keeps statistics of these names: {path: {"mean": .., "var": .., ...}}.

    A path is "/" between names, such as "ResNet_0/norm", and "" for the statistics of one normalizer. The tree may be
    a dict, a FrozenDict, an `nnx.State`, or hold boxed values such as `nn.Partitioned`.
    """
    return {path: stats for path, stats in leaves_by_path(batch_stats).items() if set(names) <= set(stats)}


def leaves_by_path(tree: Any) -> Layers:
    """Every leaf under the path and the name of its node: {path: {name: leaf}}."""
    nodes: Layers = {}
    for (path, name), leaf in _named_leaves(tree)[0]:
        nodes.setdefault(path, {})[name] = leaf
    return nodes


def replace_layers(batch_stats: Any, layers: Mapping[str, Mapping[str, Any]]) -> Any:
    """The same tree with the leaves that `layers` names put in place of its own."""
    leaves, treedef = _named_leaves(batch_stats)
    return jax.tree.unflatten(treedef, [layers.get(path, {}).get(name, leaf) for (path, name), leaf in leaves])


def flat_names(tree: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    """Nested dicts as one dict by names joined with "/"; boxed values stay as they are."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flat_names(value, f"{start}{name}/") if isinstance(value, Mapping) else {f"{start}{name}": value}
    return flat


def nested_names(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flat_names`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *nodes, name = path.split("/")
        node = tree
        for key in nodes:
            node = node.setdefault(key, {})
        node[name] = value
    return tree


def _named_leaves(tree):
    leaves, treedef = tree_flatten_with_path(tree, is_leaf=is_recorded)
    return [(_split(path), leaf) for path, leaf in leaves], treedef


def _split(path):
    # Variables of nnx and boxed values of linen hold their array in an attribute of this name.
    if path and path[-1] == GetAttrKey("value"):
        path = path[:-1]
    return keystr(path[:-1], simple=True, separator="/"), keystr(path[-1:], simple=True)
