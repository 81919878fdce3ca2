"""The Normalizer that a Flax module stands for, linen's or nnx's, and the one that takes its place."""

import inspect
import re
from collections.abc import Callable
from typing import Any

from jaxbn._batch_norm import batch_norm
from jaxbn._normalizer import Normalizer
from jaxbn.variants._frozen import PathFilter
from jaxbn.variants._renorm import batch_renorm

Make = Normalizer | Callable[[Normalizer], Normalizer]

# What the modules call differently.
_RENAMED = {"decay": "momentum", "feature_axis": "axis"}


def normalizer_of(module: Any) -> Normalizer:
    """The Normalizer with a batch norm module's hyperparameters, whose variables have the same names and shapes.

    Args:
      module: a `BatchNorm` of Flax or of jaxbn, a `BatchRenorm` or a `Norm`, of linen or of nnx.

    Returns:
      The one that a `Norm` holds; else `batch_norm` or `batch_renorm` with the module's arguments. It trains on one
      value per feature where the module does. With dtype=None its output has x's dtype.

    Raises:
      TypeError: any other module.
    """
    held = getattr(module, "norm", None)
    if isinstance(held, Normalizer):
        return held
    if not hasattr(module, "momentum"):
        raise TypeError(
            f"{type(module).__name__} stands for no Normalizer of jaxbn; expected a BatchNorm, BatchRenorm or Norm. To"
            " put one Normalizer in the place of any module, pass that Normalizer itself."
        )
    factory = batch_renorm if hasattr(module, "warmup_steps") else batch_norm
    return factory(**arguments_of(module, factory))


def arguments_of(module: Any, factory: Callable[..., Normalizer]) -> dict[str, Any]:
    """The arguments of a factory that a module has as attributes, under Flax's names."""
    names = {name: _RENAMED.get(name, name) for name in inspect.signature(factory).parameters}
    arguments = {ours: getattr(module, theirs) for ours, theirs in names.items() if hasattr(module, theirs)}
    allow = arguments.get("allow_single_value")
    return arguments | {"allow_single_value": True if allow is None else allow}


def moves_statistics(use_running_average: bool, arguments: dict[str, Any]) -> bool:
    """Whether a call moves the running statistics: as its `update` says, else in training."""
    update = arguments.get("update")
    return not use_running_average if update is None else update


def made_for(module: Any, make: Make) -> Normalizer:
    """The Normalizer that takes a module's place: `make`, or what it makes of the one that the module stands for."""
    norm = make if isinstance(make, Normalizer) or not callable(make) else make(normalizer_of(module))
    if not isinstance(norm, Normalizer):
        raise TypeError(f"make gave {norm!r}; expected a Normalizer, or a function from one to another.")
    return norm


class Chosen:
    """Which paths a filter chooses of those that it is asked about; see `path_mask`."""

    def __init__(self, where: PathFilter):
        self.where = where
        self.met: dict[str, bool] = {}

    def __call__(self, path: tuple[Any, ...]) -> bool:
        """Whether the names on the way to a module, joined by "/", are chosen."""
        name = "/".join(map(str, path))
        chosen = self.where(name) if callable(self.where) else re.search(self.where, name) is not None
        self.met[name] = bool(chosen)
        return self.met[name]

    def check(self, remedy: str = "") -> None:
        """ValueError where none was chosen."""
        if not any(self.met.values()):
            raise ValueError(f"where={self.where!r} chooses none of the norms, which are {sorted(self.met)}.{remedy}")
