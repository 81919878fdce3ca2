"""Scale and bias: how they start, and how they are applied."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._arithmetic import at_least_float32
from jaxbn._padding import silenced

Initializer = Callable[..., jax.Array]
Activation = Callable[[jax.Array], jax.Array]
Shapes = dict[str, tuple[int, ...]]


class Affine(NamedTuple):
    """How scale and bias start; a field that is None stands for a parameter that is not used.

    Attributes:
      scale_init: scale_init(key, shape, dtype).
      bias_init: bias_init(key, shape, dtype).
      dtype: of both.
    """

    scale_init: Initializer | None
    bias_init: Initializer | None
    dtype: jax.typing.DTypeLike = jnp.float32

    def init(self, key: jax.Array, shape: tuple[int, ...]) -> dict[str, jax.Array]:
        """Return {"scale", "bias"} of that shape, each where it is used."""
        starts = {"scale": self.scale_init, "bias": self.bias_init}
        keys = jax.random.split(key)
        return {n: start(k, shape, self.dtype) for k, (n, start) in zip(keys, starts.items(), strict=True) if start}

    def shapes(self, shape: tuple[int, ...]) -> Shapes:
        """Return the shape of each parameter in use."""
        starts = {"scale": self.scale_init, "bias": self.bias_init}
        return {name: shape for name, start in starts.items() if start is not None}


def affine_of(use_scale: bool, use_bias: bool, scale_init: Initializer, bias_init: Initializer, dtype) -> Affine:
    """Affine, from the arguments that every normalizer has."""
    return Affine(scale_init if use_scale else None, bias_init if use_bias else None, dtype)


@partial(jax.checkpoint, prevent_cse=False, static_argnums=(4, 5))
def scale_shift(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    residual: jax.Array | None,
    activation: Activation | None,
    dtype: jnp.dtype,
) -> jax.Array:
    """activation(scale * x + bias + residual) in float32 at least, rounded once; the backward pass keeps the arguments.

    Args:
      x: the standardized array.
      scale: broadcastable to x with as many axes; None is 1.
      bias: as scale; None is 0.
      residual: of x's shape; None is 0.
      activation: elementwise; None is the identity.
      dtype: of the result.
    """
    y = at_least_float32(x)
    y = y if scale is None else scale * y
    y = y if bias is None else y + bias
    y = y if residual is None else y + at_least_float32(residual)
    return (y if activation is None else activation(y)).astype(dtype)


def before_activation(x, mean, gain, offset, residual, weights, axes) -> jax.Array:
    """(x - mean) * gain + offset + residual, float32 at least; vectors [features]."""
    spread = partial(jnp.expand_dims, axis=axes)
    y = deviations(x, mean, weights, axes) * spread(gain) + spread(offset)
    return y if residual is None else y + at_least_float32(residual)


def deviations(x, mean, weights, axes) -> jax.Array:
    """X minus its mean as one float; what rounding that lost is made good by vectors."""
    c = at_least_float32(x) - jnp.expand_dims(mean, axes)
    # Padding may hold anything, and a NaN in y would come back in every gradient: times a cotangent of 0 it is NaN.
    return silenced(c, weights)
