"""From what a user types, `flax.linen.BatchNorm` or `equinox.nn.BatchNorm(mode='batch')`, to the thing itself."""

import ast
import functools
import importlib
import sys
from typing import Any

from jaxbn.testing._signatures import parameters_of, takes_any_keyword


class UnknownPathError(ValueError):
    """What was typed names nothing; the message is one line."""


def resolve(text: str) -> Any:
    """The object at an import path, with keyword arguments bound where the path is followed by a call.

    Args:
      text: "package.module.Name" or "package.module.Name(argument=literal, ...)".

    Raises:
      UnknownPathError: no such module or attribute, or arguments that are not literals or that nothing takes.
    """
    path, keywords = _parsed(text)
    found = _attribute(path)
    if not keywords:
        return found
    if not callable(found):
        raise UnknownPathError(f"{path} is not callable, so it takes no arguments")
    accepted = parameters_of(found)
    unknown = [] if takes_any_keyword(found) else [name for name in keywords if name not in accepted]
    if unknown:
        raise UnknownPathError(f"{path} takes no {', '.join(unknown)}; it takes {', '.join(accepted)}")
    return functools.partial(found, **keywords)


def _parsed(text):
    try:
        node = ast.parse(text.strip(), mode="eval").body
        call = node if isinstance(node, ast.Call) else None
        name = ast.unparse(call.func if call else node)
        if call and call.args:
            raise UnknownPathError(f"{text}: name the arguments, as in epsilon=1e-3")
        keywords = {k.arg: ast.literal_eval(k.value) for k in call.keywords} if call else {}
    except (SyntaxError, ValueError) as error:
        if isinstance(error, UnknownPathError):
            raise
        raise UnknownPathError(f"{text!r} is not an import path such as flax.linen.BatchNorm") from error
    if not all(part.isidentifier() for part in name.split(".")):
        raise UnknownPathError(f"{text!r} is not an import path such as flax.linen.BatchNorm")
    return name, keywords


def _attribute(path):
    parts = path.split(".")
    if len(parts) == 1:
        raise UnknownPathError(f"{path!r} names no module; write package.module.Name, such as flax.linen.BatchNorm")
    # As `python -m` does: what lies in the current folder can be named.
    if "" not in sys.path:
        sys.path.insert(0, "")
    for length in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:length])
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name and (module == error.name or module.startswith(f"{error.name}.")):
                continue
            raise UnknownPathError(f"importing {module} failed: no module named {error.name!r}") from error
        except Exception as error:
            raise UnknownPathError(f"importing {module} failed: {type(error).__name__}: {error}") from error
        for part in parts[length:]:
            if not hasattr(found, part):
                raise UnknownPathError(f"{module} has no attribute {part!r} (in {path})")
            found = getattr(found, part)
        return found
    raise UnknownPathError(f"no module named {parts[0]!r} (in {path})")
