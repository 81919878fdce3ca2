"""What a constructor takes, for classes whose metaclass hides it too."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any


def unwrapped(make: Any) -> Any:
    """The class or function inside `functools.partial`."""
    return make.func if isinstance(make, functools.partial) else make


def name_of(make: Any) -> str:
    """Name of the class or function."""
    return getattr(unwrapped(make), "__name__", type(make).__name__)


def parameters_of(make: Callable) -> dict[str, inspect.Parameter]:
    """Parameters by name, keywords that a partial binds among them as defaults; TypeError where Python knows none."""
    inner = unwrapped(make)
    try:
        # A class is asked for its __init__: metaclasses (those of nnx and Equinox) answer for themselves.
        signature = inspect.signature(inner.__init__ if inspect.isclass(inner) else inner)
    except (ValueError, TypeError) as error:
        raise TypeError(f"{make!r} has no signature that Python can read; wrap it in a function.") from error
    found = list(signature.parameters.values())
    found = found[1:] if inspect.isclass(inner) else found
    bound: Mapping[str, Any] = getattr(make, "keywords", {})
    return {p.name: p.replace(default=bound[p.name]) if p.name in bound else p for p in found if not _variadic(p)}


def takes_any_keyword(make: Callable) -> bool:
    """Whether it has **keywords."""
    inner = unwrapped(make)
    signature = inspect.signature(inner.__init__ if inspect.isclass(inner) else inner)
    return any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())


def required(make: Callable) -> list[str]:
    """Names of the parameters without a default."""
    return [name for name, p in parameters_of(make).items() if p.default is p.empty]


def defaults(make: Callable) -> dict[str, Any]:
    """Defaults by name, what a partial binds included."""
    return {name: p.default for name, p in parameters_of(make).items() if p.default is not p.empty}


def _variadic(parameter):
    return parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
