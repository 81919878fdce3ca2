"""Equinox layers as subjects."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._normalizer import Normalizer
from jaxbn.testing._calls import NO_TEST_MODE, call_options, fill, modes, with_capabilities
from jaxbn.testing._layer import AXIS
from jaxbn.testing._signatures import defaults, name_of, parameters_of, unwrapped
from jaxbn.testing._subject import Subject

# The axis of vmap over which a stateful layer pools its batch.
_EXAMPLES = "examples"


def equinox(module: Any, **options: Any) -> Subject | None:
    """The subject of a class of Equinox layers, or of a partial of one; None for anything else.

    A layer takes one example, features first, and is mapped over the batch: layer(x) -> y, or, where `state` is
    required, layer(x, state) -> (y, state). The mode is an argument of the call, or an attribute `inference`.
    """
    import equinox as eqx

    if not (inspect.isclass(unwrapped(module)) and issubclass(unwrapped(module), eqx.Module)):
        return None
    keywords = fill(module, options.get("features", 2))
    pools = "axis_name" in parameters_of(module)
    call = inspect.signature(unwrapped(module).__call__).parameters
    stateful = "state" in call and call["state"].default is inspect.Parameter.empty

    def normalizer(axis_name):
        changes = {"axis_name": axis_name} if pools else {}

        def made(train=True):
            layer, state = eqx.nn.make_with_state(module)(**keywords | changes)
            layer = layer if modes(call, train=True) else eqx.nn.inference_mode(layer, not train)
            return *eqx.partition(layer, eqx.is_inexact_array), state

        def init(key, x):
            del key, x
            params, _, state = made()
            return {"params": params, "batch_stats": state if stateful else {}}

        def run(variables, x, train, where, weights):
            del where, weights  # Layers of Equinox take one example: there is nothing to leave out.
            layer = eqx.combine(variables["params"], made(train)[1])
            one = functools.partial(layer, **call_options(call, train=train))
            x = jnp.moveaxis(x, -1, 1)
            if not stateful:
                return jnp.moveaxis(jax.vmap(one, axis_name=_EXAMPLES)(x), 1, -1), variables["batch_stats"]
            # A state may be used once only, and laws try several things from one.
            state = jax.tree.map(lambda v: v, variables["batch_stats"])
            mapped = jax.vmap(one, in_axes=(0, None), out_axes=(0, None), axis_name=_EXAMPLES)
            y, moved = mapped(x, state)
            return jnp.moveaxis(y, 1, -1), moved

        return Normalizer(init, with_capabilities(run, ()))

    stated = defaults(module)
    found: dict[str, Any] = {"name": name_of(module), "epsilon": stated.get("eps"), "decay": stated.get("momentum")}
    if pools:
        found["sharded"] = normalizer((_EXAMPLES, AXIS))
    if not modes(call, train=True) and "inference" not in unwrapped(module).__dataclass_fields__:
        found["lacks"] = {"test mode": NO_TEST_MODE}
    return Subject(normalizer(_EXAMPLES), **found | options)
