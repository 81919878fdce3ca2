"""What the linen and nnx modules share: the normalizer their fields stand for, and Flax's conventions for arguments."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._batch_norm import batch_norm
from jaxbn._checks import SingleValueError
from jaxbn._module_norm import arguments_of
from jaxbn._record import is_recorded

_warned: set[str] = set()


def apply_batch_norm(
    module: Any, variables: dict, x: jax.Array, *, train: bool, overrides: dict[str, Any], **arguments: Any
) -> tuple[jax.Array, dict]:
    """Call `batch_norm` as the fields of a `BatchNorm` module say, linen's or nnx's.

    Args:
      module: the module. Where its `allow_single_value` is None, training on one value per feature warns once in a
        process and gives the bias, as Flax's layers do in silence.
      variables: {"params", "batch_stats"}.
      x: the array to be normalized, as `batch_norm` takes it.
      train: whether to normalize by the batch.
      overrides: arguments of `batch_norm` that go before the fields.
      **arguments: of its apply.
    """
    fields, allow = arguments_of(module, batch_norm), overrides.get("allow_single_value", module.allow_single_value)
    try:
        norm = batch_norm(**fields | overrides | {"allow_single_value": bool(allow)})
        return norm.apply(variables, x, train=train, **arguments)
    except SingleValueError as error:
        if allow is not None:
            raise
        _warn_once(f"{error} (The Flax layers go on, as Flax's own do; allow_single_value=False refuses.)")
    norm = batch_norm(**fields | overrides | {"allow_single_value": True})
    return norm.apply(variables, x, train=train, **arguments)


def floating(x: jax.typing.ArrayLike) -> jax.Array:
    """`x` as an array, integers as floats: Flax promotes them, jaxbn's functions refuse them."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.promote_types(x.dtype, jnp.float32))


def widened(batch_stats: dict[str, jax.Array], dtype: jax.typing.DTypeLike) -> dict[str, jax.Array]:
    """Running statistics wide enough for an `x` of that dtype: at least float32, with a complex mean for complex x."""
    mean = jnp.promote_types(dtype, jnp.float32)
    real = jnp.finfo(mean).dtype
    # A leaf of a record has a dtype and an astype as arrays have.
    leaves = {name: v if is_recorded(v) else jnp.asarray(v) for name, v in batch_stats.items()}
    return {n: v.astype(jnp.promote_types(v.dtype, mean if n == "mean" else real)) for n, v in leaves.items()}


def as_where(mask: jax.typing.ArrayLike | None) -> jax.Array | None:
    """Flax's mask, which may hold numbers, as the booleans that `where` takes."""
    return None if mask is None else jnp.asarray(mask, bool)


def with_mask(arguments: dict[str, Any], mask: jax.typing.ArrayLike | None) -> dict[str, Any]:
    """Arguments with `mask` under the name `where`; ValueError where both are given."""
    if mask is None:
        return arguments
    if arguments.get("where") is not None:
        raise ValueError("mask and where are two names for one argument; pass one of them.")
    return arguments | {"where": as_where(mask)}


def chosen_mode(in_call: bool | None, in_module: bool | None) -> bool:
    """`use_running_average` of a call of an nnx module: what the call says, else what the module says."""
    chosen = in_module if in_call is None else in_call
    if chosen is None:
        raise ValueError(
            "use_running_average is None in the module and in the call; pass it to either, or call the model's train()"
            " or eval() first."
        )
    return chosen


def _warn_once(message: str) -> None:
    if "single value" not in _warned:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        _warned.add("single value")
