"""Modules of flax.linen and flax.nnx as subjects."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from jaxbn._normalizer import Normalizer
from jaxbn.testing._calls import NO_TEST_MODE, call_options, filled, modes, with_capabilities
from jaxbn.testing._layer import AXIS
from jaxbn.testing._signatures import defaults, parameters_of, unwrapped
from jaxbn.testing._subject import Subject


def flax(norm: Any, **options: Any) -> Subject | None:
    """The subject of a Flax module, or None for anything else."""
    import flax.linen as nn
    from flax import nnx

    if _is(norm, nn.Module):
        return linen(norm, **options)
    if _is(norm, nnx.Module):
        return nnx_module(norm, **options)
    return None


def _is(norm: Any, base: type) -> bool:
    norm = unwrapped(norm)
    return isinstance(norm, base) or (inspect.isclass(norm) and issubclass(norm, base))


def linen(module: Any, **options: Any) -> Subject:
    """The subject of a linen module, class or instance; axis_name, axis, epsilon and momentum are read from its fields.

    The mode is an argument of the call (`train`, `use_running_average` and the like) or else a field of that name.
    """
    if inspect.isclass(unwrapped(module)):
        module = filled(module, options.get("features", 2))()
    fields = set(module.__dataclass_fields__)
    call = inspect.signature(type(module).__call__).parameters
    in_call = bool(modes(call, train=True))

    def in_mode(module, train):
        return module if in_call else module.clone(**modes(fields, train=train))

    def normalizer(module):
        def init(key, x):
            variables = in_mode(module, False).init(key, x, **call_options(call, train=False))
            return {"params": variables.get("params", {}), "batch_stats": variables.get("batch_stats", {})}

        def run(variables, x, train, where, weights):
            keywords = call_options(call, train=train, where=where, weights=weights)
            y, moved = in_mode(module, train).apply(variables, x, mutable=["batch_stats"], **keywords)
            return y, moved.get("batch_stats", variables["batch_stats"])

        return Normalizer(init, with_capabilities(run, call))

    found: dict[str, Any] = {
        "name": type(module).__name__,
        "epsilon": getattr(module, "epsilon", None),
        "decay": getattr(module, "momentum", None),
    }
    if not in_call and not modes(fields, train=True):
        found["lacks"] = {"test mode": NO_TEST_MODE}
    if "axis_name" in fields:
        found["sharded"] = normalizer(module.clone(axis_name=AXIS))
    if "axis" in fields:
        found["channels_first"] = normalizer(module.clone(axis=1))
    return Subject(normalizer(module), **found | options)


def nnx_module(module: Any, **options: Any) -> Subject:
    """The subject of a class of nnx modules, or of a partial of one; an instance fits one number of features only.

    The mode is what `.train()` and `.eval()` set, and an argument of the call where it has one.

    Raises:
      TypeError: an instance.
    """
    layer = unwrapped(module)
    if not inspect.isclass(layer):
        raise TypeError(
            f"{module!r} is an instance, made for one number of features; pass its class, or"
            " functools.partial(Class, ...) with its other arguments."
        )
    make = filled(module, options.get("features", 2))
    parameters, stated = parameters_of(module), defaults(module)
    found: dict[str, Any] = {
        "name": layer.__name__,
        "epsilon": stated.get("epsilon"),
        "decay": stated.get("momentum"),
    }
    if not _has_modes(make, layer):
        found["lacks"] = {"test mode": NO_TEST_MODE}
    if "axis_name" in parameters:
        found["sharded"] = _nnx_normalizer(functools.partial(make, axis_name=AXIS), layer)
    if "axis" in parameters:
        found["channels_first"] = _nnx_normalizer(functools.partial(make, axis=1), layer)
    return Subject(_nnx_normalizer(make, layer), **found | options)


def _has_modes(make: Callable, kind: type) -> bool:
    """Whether the call takes the mode, or the module or one inside it has an attribute for it."""
    from flax import nnx

    if modes(inspect.signature(kind.__call__).parameters, train=True):
        return True
    inside = (module for _, module in nnx.iter_modules(make()))
    return any(hasattr(module, name) for module in inside for name in ("use_running_average", "deterministic"))


def _nnx_normalizer(make: Callable, kind: type) -> Normalizer:
    from flax import nnx

    call = inspect.signature(kind.__call__).parameters

    def parts(train):
        layer = make()
        layer.train() if train else layer.eval()
        return nnx.split(layer, nnx.Param, nnx.BatchStat, ...)

    def init(key, x):
        del key, x
        _, params, batch_stats, rest = parts(False)
        return {"params": nnx.to_pure_dict(params), "batch_stats": nnx.to_pure_dict(batch_stats), "rest": rest}

    def run(variables, x, train, where, weights):
        # Made anew: tracers of this call must not stay in a module that the next one sees.
        graph, params, batch_stats, _ = parts(train)
        nnx.replace_by_pure_dict(params, variables["params"])
        nnx.replace_by_pure_dict(batch_stats, variables["batch_stats"])
        layer = nnx.merge(graph, params, batch_stats, variables["rest"])
        y = layer(x, **call_options(call, train=train, where=where, weights=weights))
        return y, nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))

    return Normalizer(init, with_capabilities(run, call))
