"""From what libraries call a layer to what laws can check: a `Subject`.

Each adapter takes `make`, which builds the layer for a number of features (and, where it can, with other options), and
turns it into pure init and apply functions.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._normalizer import Normalizer
from jaxbn.testing.signatures import defaults, name_of, parameters_of, required, unwrapped
from jaxbn.testing.subject import AXIS, Subject

# The names under which libraries ask for training mode: those that mean "training", and those that mean the opposite.
_TRAIN = ("train", "is_training", "training")
_NOT_TRAIN = ("use_running_average", "deterministic", "inference")
_MASK = ("where", "mask")
_WEIGHTS = ("weights", "sample_weight")


def subject_of(norm: Any, **options: Any) -> Subject:
    """The Subject that `norm` stands for, its fields overridden by options.

    Args:
      norm: a Subject, Normalizer, factory of Normalizers, module of a library whose adapter is here (class or
        instance), or function x -> y.
      **options: fields of Subject.

    Raises:
      TypeError: nothing that fits.
    """
    if isinstance(norm, Subject):
        return _with(norm, options)
    if isinstance(norm, Normalizer):
        return Subject(norm, **options)
    for package, adapt in (("flax", _flax), ("haiku", haiku), ("equinox", equinox), ("torch", torch)):
        if package in sys.modules and (subject := adapt(norm, **options)) is not None:
            return subject
    if not callable(norm):
        raise TypeError(
            f"{norm!r} is no Normalizer, module or function; expected one of them, such as jaxbn.batch_norm() or"
            " lambda x: layer(x)."
        )
    return factory(norm, **options) if required(norm) == [] else function(norm, **options)


def _with(subject, options):
    fields = {name: getattr(subject, name) for name in subject.__dataclass_fields__}
    return Subject(**fields | options)


def function(f: Callable[[jax.Array], jax.Array], **options: Any) -> Subject:
    """A function x -> y: no variables, no modes."""

    def init(key, x):
        del key, x
        return {"params": {}, "batch_stats": {}}

    def apply(variables, x, *, train):
        del train
        return f(x), variables["batch_stats"]

    return Subject(Normalizer(init, apply), **{"name": getattr(f, "__name__", "function")} | options)


def factory(make: Callable[..., Normalizer], **options: Any) -> Subject:
    """A function of keyword arguments that returns a Normalizer; its axis_name and feature_axis are put to use."""
    norm = make()
    if not isinstance(norm, Normalizer):
        raise TypeError(
            f"{name_of(make)}() returned {type(norm).__name__}; expected a Normalizer, or take x and return y."
        )
    stated = defaults(make)
    found = {"name": name_of(make), "epsilon": stated.get("epsilon"), "decay": stated.get("decay")}
    if "axis_name" in stated:
        found["sharded"] = make(axis_name=AXIS)
    # Beside `axis`, which says what is reduced, feature_axis is only where scale and bias run: no layout.
    if "feature_axis" in stated and "axis" not in stated:
        found["channels_first"] = make(feature_axis=1)
    if found["decay"] is None and "decay" in stated:
        found["rule"] = "cumulative"
    if "debias" in stated and "rule" not in found:
        found["rule"] = "debiased" if stated["debias"] else "exponential"
    if "unbiased" in stated:
        found["unbiased"] = stated["unbiased"]
    return Subject(norm, **found | options)


# ---- Flax


def _flax(norm, **options):
    import flax.linen as nn
    from flax import nnx

    if _is(norm, nn.Module):
        return linen(norm, **options)
    if _is(norm, nnx.Module):
        return nnx_module(norm, **options)
    return None


def linen(module: Any, **options: Any) -> Subject:
    """A linen module, class or instance; axis_name, axis, epsilon and momentum are read from its fields."""
    if inspect.isclass(unwrapped(module)):
        module = _filled(module, options.get("features", 2))()
    fields = set(module.__dataclass_fields__)

    def normalizer(module):
        call = inspect.signature(type(module).__call__).parameters

        def init(key, x):
            variables = module.init(key, x, **_call_options(call, train=False))
            return {"params": variables.get("params", {}), "batch_stats": variables.get("batch_stats", {})}

        def run(variables, x, train, where, weights):
            keywords = _call_options(call, train=train, where=where, weights=weights)
            y, moved = module.apply(variables, x, mutable=["batch_stats"], **keywords)
            return y, moved.get("batch_stats", variables["batch_stats"]) if train else variables["batch_stats"]

        return Normalizer(init, _with_capabilities(run, call))

    found = {"name": type(module).__name__, "epsilon": getattr(module, "epsilon", None)}
    found["decay"] = getattr(module, "momentum", None)
    if "axis_name" in fields:
        found["sharded"] = normalizer(module.clone(axis_name=AXIS))
    if "axis" in fields:
        found["channels_first"] = normalizer(module.clone(axis=1))
    return Subject(normalizer(module), **found | options)


def nnx_module(module: Any, **options: Any) -> Subject:
    """A class of nnx modules, or a partial of one; not an instance, which fits one number of features."""
    features = options.get("features", 2)
    layer = unwrapped(module)
    if not inspect.isclass(layer):
        raise TypeError(
            f"{module!r} is an instance, made for one number of features; pass its class, or"
            " functools.partial(Class, ...) with its other arguments."
        )
    make = _filled(module, features)
    parameters = parameters_of(module)
    stated = defaults(module)
    found = {"name": layer.__name__, "epsilon": stated.get("epsilon"), "decay": stated.get("momentum")}
    if "axis_name" in parameters:
        found["sharded"] = _nnx_normalizer(functools.partial(make, axis_name=AXIS), layer)
    if "axis" in parameters:
        found["channels_first"] = _nnx_normalizer(functools.partial(make, axis=1), layer)
    return Subject(_nnx_normalizer(make, layer), **found | options)


def _nnx_normalizer(make, kind):
    from flax import nnx

    call = inspect.signature(kind.__call__).parameters

    def parts():
        return nnx.split(make(), nnx.Param, nnx.BatchStat, ...)

    def init(key, x):
        del key, x
        _, params, batch_stats, rest = parts()
        return {"params": nnx.to_pure_dict(params), "batch_stats": nnx.to_pure_dict(batch_stats), "rest": rest}

    def run(variables, x, train, where, weights):
        # Made anew: tracers of this call must not stay in a module that the next one sees.
        graph, params, batch_stats, _ = parts()
        nnx.replace_by_pure_dict(params, variables["params"])
        nnx.replace_by_pure_dict(batch_stats, variables["batch_stats"])
        layer = nnx.merge(graph, params, batch_stats, variables["rest"])
        y = layer(x, **_call_options(call, train=train, where=where, weights=weights))
        return y, nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))

    return Normalizer(init, _with_capabilities(run, call))


# ---- Haiku


def haiku(module: Any, **options: Any) -> Subject | None:
    """A class of Haiku modules, or a partial of one."""
    import haiku as hk

    if not (inspect.isclass(unwrapped(module)) and issubclass(unwrapped(module), hk.Module)):
        return None
    keywords = _fill(module, options.get("features", 2))
    parameters = parameters_of(module)
    call = inspect.signature(unwrapped(module).__call__).parameters

    def normalizer(**changes):
        def forward(x, train, where=None, weights=None):
            return module(**keywords | changes)(x, **_call_options(call, train=train, where=where, weights=weights))

        pure = hk.without_apply_rng(hk.transform_with_state(forward))

        # Haiku makes its averages where it first trains; no named axis is bound there.
        alone = {name: value for name, value in (keywords | changes).items() if name != "cross_replica_axis"}

        def first(x):
            return module(**alone)(x, **_call_options(call, train=True))

        def init(key, x):
            params, batch_stats = hk.transform_with_state(first).init(key, x)
            return {"params": params, "batch_stats": batch_stats}

        def run(variables, x, train, where, weights):
            return pure.apply(variables["params"], variables["batch_stats"], x, train, where, weights)

        return Normalizer(init, _with_capabilities(run, call))

    stated = defaults(module) | keywords
    found = {"name": name_of(module), "epsilon": stated.get("eps"), "decay": stated.get("decay_rate")}
    if "cross_replica_axis" in parameters:
        found["sharded"] = normalizer(cross_replica_axis=AXIS)
    if "data_format" in parameters:
        found["channels_first"] = normalizer(data_format="channels_first")
    return Subject(normalizer(), **found | options)


# ---- Equinox


def equinox(module: Any, **options: Any) -> Subject | None:
    """A class of stateful Equinox layers: layer(x, state) -> (y, state) on one example, features first, under vmap."""
    import equinox as eqx

    if not (inspect.isclass(unwrapped(module)) and issubclass(unwrapped(module), eqx.Module)):
        return None
    keywords = _fill(module, options.get("features", 2)) | {"axis_name": "examples"}
    call = inspect.signature(unwrapped(module).__call__).parameters

    def normalizer(axis_name):
        def made():
            layer, state = eqx.nn.make_with_state(module)(**keywords | {"axis_name": axis_name})
            return *eqx.partition(layer, eqx.is_inexact_array), state

        def init(key, x):
            del key, x
            params, _, state = made()
            return {"params": params, "batch_stats": state}

        def run(variables, x, train, where, weights):
            del where, weights
            layer = eqx.combine(variables["params"], made()[1])
            # A state may be used once only, and laws try several things from one.
            state = jax.tree.map(lambda v: v, variables["batch_stats"])
            one = functools.partial(layer, **_call_options(call, train=train))
            y, moved = jax.vmap(one, in_axes=(0, None), out_axes=(0, None), axis_name="examples")(
                jnp.moveaxis(x, -1, 1), state
            )
            return jnp.moveaxis(y, 1, -1), moved

        return Normalizer(init, _with_capabilities(run, call))

    stated = defaults(module)
    found = {"name": name_of(module), "epsilon": stated.get("eps"), "decay": stated.get("momentum")}
    found |= {"sharded": normalizer(("examples", AXIS))}
    return Subject(normalizer("examples"), **found | options)


# ---- torch, by callback


def torch(module: Any, **options: Any) -> Subject | None:
    """`torch.nn.BatchNorm1d` and its kin on the host: a callback with a gradient of its own, for tables."""
    from jaxbn.testing.torch_callback import torch_subject  # torch is large

    return torch_subject(module, **options)


# ---- what they share


def _call_options(call, *, train, where=None, weights=None):
    """Keyword arguments of a call, under the names that its signature has."""
    found = {name: train for name in _TRAIN if name in call} | {name: not train for name in _NOT_TRAIN if name in call}
    for names, value in ((_MASK, where), (_WEIGHTS, weights)):
        found |= {name: value for name in names if name in call and value is not None}
    return found


def _with_capabilities(run, call):
    """Apply, with where= and weights= in its signature only where the call has them."""
    masked, weighted = any(name in call for name in _MASK), any(name in call for name in _WEIGHTS)
    if masked and weighted:
        return lambda variables, x, *, train, where=None, weights=None: run(variables, x, train, where, weights)
    if masked:
        return lambda variables, x, *, train, where=None: run(variables, x, train, where, None)
    return lambda variables, x, *, train: run(variables, x, train, None, None)


def _fill(make, features):
    """Required arguments of a constructor that have one sensible value, by name."""
    known = {
        "num_features": features,
        "input_size": features,
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
    return {name: known[name] for name in needed}


def _filled(make, features):
    keywords = _fill(make, features)
    if "rngs" not in keywords:
        return functools.partial(make, **keywords)

    def fresh(**changes):
        return make(**_fill(make, features) | changes)

    return fresh


def _is(norm, base):
    norm = unwrapped(norm)
    return isinstance(norm, base) or (inspect.isclass(norm) and issubclass(norm, base))
