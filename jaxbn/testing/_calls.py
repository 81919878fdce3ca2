"""The names that libraries use for training mode, masks and weights, and for what a constructor must be told."""

import functools
from collections.abc import Callable, Collection
from typing import Any

from jaxbn.testing._signatures import defaults, name_of, required

# The names under which libraries ask for training mode: those that mean "training", and those that mean the opposite.
_TRAIN = ("train", "is_training", "training")
_NOT_TRAIN = ("use_running_average", "deterministic", "inference")
_MASK = ("where", "mask")
_WEIGHTS = ("weights", "sample_weight")

NO_TEST_MODE = "it could not be switched to test mode"


def modes(names: Collection[str], *, train: bool) -> dict[str, bool]:
    """Of the names those that stand for the mode, with the value that asks for training or for test mode."""
    found = {name: train for name in _TRAIN if name in names}
    return found | {name: not train for name in _NOT_TRAIN if name in names}


def call_options(call: Collection[str], *, train: bool, where: Any = None, weights: Any = None) -> dict[str, Any]:
    """Keyword arguments of a call, under the names that its signature `call` has."""
    found: dict[str, Any] = dict(modes(call, train=train))
    for names, value in ((_MASK, where), (_WEIGHTS, weights)):
        found |= {name: value for name in names if name in call and value is not None}
    return found


def with_capabilities(run: Callable, call: Collection[str]) -> Callable:
    """Turn `run` into an `apply` that has where= and weights= in its signature only where the call has them."""
    masked, weighted = any(name in call for name in _MASK), any(name in call for name in _WEIGHTS)
    if masked and weighted:
        return lambda variables, x, *, train, where=None, weights=None: run(variables, x, train, where, weights)
    if masked:
        return lambda variables, x, *, train, where=None: run(variables, x, train, where, None)
    return lambda variables, x, *, train: run(variables, x, train, None, None)


def fill(make: Callable, features: int) -> dict[str, Any]:
    """Values for the required arguments of a constructor that have one sensible value, by name.

    Raises:
      TypeError: it requires an argument that is not known here.
    """
    known: dict[str, Any] = {
        "num_features": features,
        "num_channels": features,
        "input_size": features,
        "channels": features,
        "normalized_shape": features,
        "shape": features,
        "create_scale": True,
        "create_offset": True,
        "decay_rate": 0.99,
        "axis_name": None,
    }
    needed = required(make)
    if "rngs" in needed:
        from flax import nnx

        known["rngs"] = nnx.Rngs(0)
    unknown = [name for name in needed if name not in known]
    if unknown:
        raise TypeError(
            f"{name_of(make)} needs {', '.join(unknown)}; give them in a functools.partial,"
            f" or on the command line as in {name_of(make)}({unknown[0]}=...)."
        )
    # GroupNorm of Equinox requires it where there is a scale, but its signature does not say so.
    optional = [name for name in ("channels",) if defaults(make).get(name, 0) is None]
    return {name: known[name] for name in (*needed, *optional)}


def filled(make: Callable, features: int) -> Callable:
    """The constructor with its required arguments filled in, anew at each call (an nnx.Rngs serves one module)."""

    @functools.wraps(make, updated=())
    def fresh(**changes: Any) -> Any:
        return make(**fill(make, features) | changes)

    return fresh
