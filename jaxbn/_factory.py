"""What a factory makes is compared, hashed, printed and pickled by the factory and its arguments."""

import functools
import inspect
import pickle
import sys
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, ParamSpec, TypeVar, overload

import jax
import numpy as np

P = ParamSpec("P")
M = TypeVar("M", bound="Made")


class Origin(NamedTuple):
    """Where a product of a factory comes from.

    Attributes:
      factory: the decorated factory.
      passed: the arguments it was called with, by name; lists and NumPy arrays as tuples.
      changed: those of them that differ from the defaults.
    """

    factory: Callable[..., Any]
    passed: dict[str, Any]
    changed: dict[str, Any]


class Made(tuple):
    """Base of NamedTuples of functions: two made by one factory with equal arguments are equal.

    One that was put together by hand, without a factory, is what its functions are.
    """

    _origin: Origin | None = None

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Made) or type(self) is not type(other):
            return False
        a, b = self._origin, other._origin
        if a is None or b is None:
            return a is b and self._parts() == other._parts()
        if a.factory is not b.factory or a.changed.keys() != b.changed.keys():
            return False
        return all(_equal(value, b.changed[name]) for name, value in a.changed.items())

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        if self._origin is None:
            return hash(self._parts())
        return hash((self._origin.factory, frozenset(self._hashed(*item) for item in self._origin.changed.items())))

    def __repr__(self) -> str:
        if self._origin is None:
            return super().__repr__()
        arguments = (f"{name}={_shown(value)}" for name, value in self._origin.passed.items())
        return f"{self._origin.factory.__name__}({', '.join(arguments)})"

    def _parts(self) -> tuple:
        """The functions as they were given, by which those made by hand are compared and pickled."""
        return tuple(self)

    def __copy__(self: M) -> M:
        return self

    def __deepcopy__(self: M, memo: dict) -> M:
        return self

    def __reduce__(self) -> tuple:
        if self._origin is None:
            return type(self), self._parts()
        passed = {name: self._pickled(name, value) for name, value in self._origin.passed.items()}
        return _called, (self._origin.factory, passed)

    def _hashed(self, name, value):
        try:
            return name, hash(_comparable(value))
        except TypeError as error:
            raise TypeError(f"{self!r} cannot be hashed, because of its argument {name}: {error}.") from error

    def _pickled(self, name, value):
        try:
            pickle.dumps(value)
        except Exception as error:
            if _named(value):
                return _ByName(value.__module__, value.__qualname__)
            raise pickle.PicklingError(
                f"{self!r} cannot be pickled, because of its argument {name}: {error}."
            ) from error
        return value


@overload
def normalizer_factory(factory: Callable[P, M]) -> Callable[P, M]: ...


@overload
def normalizer_factory(*, options_of: Callable[..., Any]) -> Callable[[Callable[P, M]], Callable[P, M]]: ...


def normalizer_factory(
    factory: Callable[P, M] | None = None, *, options_of: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Decorate a function that makes a `Normalizer`, so that what it makes is known by the arguments.

        @jaxbn.normalizer_factory
        def my_norm(*, decay=0.99, epsilon=1e-5): ...

    Two made with equal arguments are equal and hash alike, so that they do not compile a program twice as static
    arguments of `jax.jit` or as fields of modules; they print as they were made, and pickle where the arguments do.

    Args:
      factory: the function; it has to be found by its name in its module.
      options_of: the factory that gets the further keyword arguments of this one, `**options`, and so knows their
        defaults.

    Returns:
      The decorated function, or a decorator where factory is None.
    """
    if factory is None:
        return functools.partial(normalizer_factory, options_of=options_of)
    signature = inspect.signature(factory)
    defaults = getattr(options_of, "_defaults", {}) | _defaults(signature)

    @functools.wraps(factory)
    def make(*args: P.args, **kwargs: P.kwargs) -> M:
        functions = factory(*args, **kwargs)
        passed = _flat(signature, signature.bind(*args, **kwargs).arguments)
        changed = {n: v for n, v in passed.items() if n not in defaults or not _equal(v, defaults[n])}
        made = type(functions)(*functions)  # A copy: some factories return another's.
        made._origin = Origin(make, passed, changed)
        return made

    make._defaults = defaults  # type: ignore[attr-defined]  # For factories that pass their options on to this one.
    return make


class _ByName(NamedTuple):
    """Stands for a function in a pickle that does not pickle itself, such as `jax.nn.relu`."""

    module: str
    qualname: str


def _called(factory, passed):
    arguments = {name: _found(value) if isinstance(value, _ByName) else value for name, value in passed.items()}
    signature = inspect.signature(factory)
    positional = [name for name, p in signature.parameters.items() if p.kind is p.POSITIONAL_ONLY]
    return factory(*(arguments.pop(name) for name in positional), **arguments)


def _found(name):
    __import__(name.module)
    return functools.reduce(getattr, name.qualname.split("."), sys.modules[name.module])


def _named(value) -> bool:
    """Whether the value is what its module has under its name."""
    try:
        return _found(_ByName(value.__module__, value.__qualname__)) is value
    except (AttributeError, ImportError, KeyError):
        return False


def _defaults(signature):
    return {name: _fixed(name, p.default) for name, p in signature.parameters.items() if p.default is not p.empty}


def _flat(signature, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, `**options` among them."""
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        flat |= value if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return {name: _fixed(name, value) for name, value in flat.items()}


def _fixed(name, value):
    """Dtypes in one form; lists and NumPy arrays, which do not hash, as tuples."""
    if name.endswith("dtype") and value is not None:
        return np.dtype(value)
    if isinstance(value, np.ndarray):
        return _fixed(name, value.tolist())
    if isinstance(value, list):
        return tuple(_fixed(name, v) for v in value)
    return tuple(_fixed(name, v) for v in value) if type(value) is tuple else value


def _equal(a, b) -> bool:
    """Equality that arrays, which compare element by element, have with themselves only."""
    if a is b:
        return True
    a, b = _comparable(a), _comparable(b)
    if isinstance(a, jax.Array | np.ndarray) or isinstance(b, jax.Array | np.ndarray):
        return False
    return bool(a == b)


def _comparable(value) -> Hashable:
    """A partial function, which compares by identity, as its parts."""
    if isinstance(value, functools.partial):
        return _comparable(value.func), value.args, frozenset(value.keywords.items())
    return value


def _shown(value) -> str:
    if isinstance(value, Made | np.dtype):
        return str(value)
    if isinstance(value, functools.partial):
        arguments = [_shown(v) for v in value.args] + [f"{name}={_shown(v)}" for name, v in value.keywords.items()]
        return f"partial({', '.join([_shown(value.func), *arguments])})"
    return getattr(value, "__name__", None) or repr(value)
