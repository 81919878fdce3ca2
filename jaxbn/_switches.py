"""Which statistics normalize, and whether they move: two switches a call, the same for every normalizer."""

import functools
import inspect
from collections.abc import Callable

import numpy as np
from jax import lax

SWITCHES = ("use_running", "update")


def switched(apply: Callable) -> Callable:
    """`apply` of a normalizer that knows `train` alone, with the arguments `use_running` and `update`.

    y is what `apply` makes with train=not use_running, batch_stats what it makes with train=update; where both ask for
    the same mode, in one call. An `apply` that takes both arguments itself stays as it is.

    Args:
      apply: apply(variables, x, *, train, ...) -> (y, batch_stats).
    """
    signature = inspect.signature(apply)
    if set(SWITCHES) <= set(signature.parameters):
        return apply

    @functools.wraps(apply)
    def both(variables, x, *, train, use_running=None, update=None, **arguments):
        if use_running is None and update is None:
            return apply(variables, x, train=train, **arguments)
        use_running, update = _chosen(train, use_running, update)
        if use_running != update:
            return apply(variables, x, train=update, **arguments)
        y, _ = apply(variables, x, train=not update, **arguments)
        if not update:
            return y, variables["batch_stats"]
        # Its y is not used: under jit nothing of it is computed but the statistics.
        _, moved = apply(*lax.stop_gradient((variables, x)), train=True, **arguments)
        return y, moved

    # mypy knows no attributes of functions. A class with __call__ would be shown and compared as no function is.
    both.__signature__ = _with_switches(signature)  # type: ignore[attr-defined]
    both.alone = apply  # type: ignore[attr-defined]
    return both


def alone(apply: Callable) -> Callable:
    """What `switched` was given."""
    return getattr(apply, "alone", apply)


def _with_switches(signature: inspect.Signature) -> inspect.Signature:
    own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in SWITCHES]
    *others, last = signature.parameters.values()
    variadic = last.kind is last.VAR_KEYWORD
    return signature.replace(parameters=[*others, *own, last] if variadic else [*others, last, *own])


def _chosen(train, use_running, update) -> tuple[bool, bool]:
    """Both switches, those that are None as `train` says; TypeError unless they are known when a function is traced."""
    for name, value in (("train", train), ("use_running", use_running), ("update", update)):
        if not isinstance(value, bool | np.bool_) and (value is not None or name == "train"):
            raise TypeError(f"{name}={value!r}; expected True or False, known at trace time: mark it static under jit.")
    return bool(not train if use_running is None else use_running), bool(train if update is None else update)
