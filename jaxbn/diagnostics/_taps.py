"""Activations by layer, and their gradients: a loss that shows each layer's output to a function, its tap."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
from jax import Array

from jaxbn.diagnostics._network import Loss, Variables, checked_output, mean_loss
from jaxbn.training._state import LossOutput

Activations = dict[str, Array]

# tap(name, x) -> x: the network goes on with what comes back.
Tap = Callable[[str, Array], Array]

# loss(variables, batch, rng, tap) -> LossOutput
TappedLoss = Callable[[Any, Any, Array, Tap], LossOutput]


def linen_taps(loss: Loss, keep: Callable[[str], bool] = lambda path: True) -> TappedLoss:
    """A loss that taps the output of every Flax linen module it calls; neither loss nor modules need a change.

    Args:
      loss: as diagnostics take it, with a linen model's `apply` inside.
      keep: keep(path) -> whether to tap the module of this path, such as "Block_0/Dense_1"; "" is the model itself.

    Returns:
      A tapped loss. A name is the module's path, for further calls of the same module with "#1", "#2", ... Modules
      whose output is not one array of floats are passed over.
    """

    def tapped(variables: Variables, batch: Any, rng: Array, tap: Tap) -> LossOutput:
        calls: dict[str, int] = {}

        def intercept(call, args, kwargs, context):
            y, path = call(*args, **kwargs), "/".join(context.module.path)
            if context.method_name != "__call__" or not _is_floating(y) or not keep(path):
                return y
            number = calls[path] = calls.get(path, -1) + 1
            return tap(f"{path}#{number}" if number else path, y)

        with nn.intercept_methods(intercept):
            return loss(variables, batch, rng)

    return tapped


def activations(loss: TappedLoss, variables: Variables, batch: Any, rng: Array) -> Activations:
    """{name: array} of what the loss tapped, in the order of the calls."""
    return _run(loss, variables, batch, rng, None)[1]


def activation_gradients(
    loss: TappedLoss, variables: Variables, batch: Any, rng: Array
) -> tuple[Array, Activations, Any, Activations]:
    """The mean loss, the activations, and the gradients of the loss by params and by activations."""
    shapes = jax.eval_shape(lambda: activations(loss, variables, batch, rng))
    zeros = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}

    def shifted(params, offsets):
        output, found = _run(loss, {**variables, "params": params}, batch, rng, offsets)
        return mean_loss(output), found

    run = jax.value_and_grad(shifted, argnums=(0, 1), has_aux=True)
    (value, found), (by_params, by_activations) = run(variables["params"], zeros)
    return value, found, by_params, by_activations


def _run(loss, variables, batch, rng, offsets) -> tuple[LossOutput, Activations]:
    """The loss with offsets added to what it taps: the gradient by an offset of zero is that by the activation."""
    found: Activations = {}
    outside = _trace()

    def tap(name: str, x: Array) -> Array:
        _check_tap(name, x, found)
        if _trace() != outside:
            raise ValueError(
                f"{name!r} is tapped inside of a JAX transformation (jit, scan, remat, vmap, ...) within the loss."
                " Values leave it through its results alone: tap those. Of linen modules under nn.remat, nn.scan or"
                " nn.jit leave out what lies inside, with linen_taps(keep=...)."
            )
        found[name] = x if offsets is None else x + offsets[name]
        return found[name]

    output = checked_output(loss(variables, batch, rng, tap))
    if not found:
        raise ValueError("the loss tapped nothing; call tap(name, x) on the output of each layer, or use linen_taps.")
    return output, found


def _check_tap(name: Any, x: Any, found: Activations) -> None:
    if not isinstance(name, str):
        raise TypeError(f"tap got the name {name!r}; expected a string.")
    if name in found:
        raise ValueError(f"{name!r} was tapped twice; give each use of a layer a name of its own.")
    if not _is_floating(x):
        raise TypeError(f"tap({name!r}) got {getattr(x, 'dtype', type(x).__name__)}; expected an array of real floats.")


def _is_floating(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)


def _trace() -> Any:
    return jax.extend.core.get_opaque_trace_state(convention="flax")
