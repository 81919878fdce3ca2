"""Which statistics normalize, and whether they move: two switches a call, the same for every normalizer."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax

SWITCHES = ("use_running", "update")


@dataclasses.dataclass(frozen=True)
class Switched:
    """`apply` of a normalizer that knows `train` alone, with the arguments `use_running` and `update`.

    y is what `apply` makes with train=not use_running, batch_stats what it makes with train=update; where both are
    asked of the same mode, in one call.

    Attributes:
      apply: apply(variables, x, *, train, ...) -> (y, batch_stats).
    """

    apply: Callable[..., tuple[jax.Array, dict[str, Any]]]

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.apply)
        own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in SWITCHES]
        *others, last = signature.parameters.values()
        variadic = last.kind is last.VAR_KEYWORD
        return signature.replace(parameters=[*others, *own, last] if variadic else [*others, last, *own])

    def __call__(self, variables, x, *, train, use_running=None, update=None, **arguments):
        """Normalize x, as `Apply` says."""
        if use_running is None and update is None:
            return self.apply(variables, x, train=train, **arguments)
        use_running, update = chosen(train, use_running, update)
        if use_running != update:
            return self.apply(variables, x, train=update, **arguments)
        y, _ = self.apply(variables, x, train=not update, **arguments)
        if not update:
            return y, variables["batch_stats"]
        # Its y is not used: under jit nothing of it is computed but the statistics.
        _, moved = self.apply(*lax.stop_gradient((variables, x)), train=True, **arguments)
        return y, moved


def switched(apply: Callable) -> Callable:
    """`apply` with both switches; as it is where it has them already."""
    return apply if set(SWITCHES) <= set(inspect.signature(apply).parameters) else Switched(apply)


def chosen(train: bool, use_running: bool | None, update: bool | None) -> tuple[bool, bool]:
    """Both switches, those that are None as `train` says; TypeError unless they are known when a function is traced."""
    for name, value in (("train", train), ("use_running", use_running), ("update", update)):
        if not isinstance(value, bool | np.bool_) and (value is not None or name == "train"):
            raise TypeError(f"{name}={value!r}; expected True or False, known at trace time: mark it static under jit.")
    return bool(not train if use_running is None else use_running), bool(train if update is None else update)
