"""Conditional batch normalization: scale and bias chosen by what the example is."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._affine import Activation, Initializer, scale_shift
from jaxbn._batch_norm import batch_norm
from jaxbn._factory import normalizer_factory
from jaxbn._inputs import combined_weights, feature_shape, inexact, reduced_axes, stats_dtype
from jaxbn._normalizer import Normalizer
from jaxbn._padding import silenced


@normalizer_factory(options_of=batch_norm)
def conditional_batch_norm(
    num_classes: int | None = None,
    *,
    condition_size: int | None = None,
    scale_init: Initializer = jax.nn.initializers.ones,
    bias_init: Initializer = jax.nn.initializers.zeros,
    kernel_init: Initializer = jax.nn.initializers.zeros,
    feature_axis: int = -1,
    dtype: jax.typing.DTypeLike | None = None,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    activation: Activation | None = None,
    **options: Any,
) -> Normalizer:
    """Conditional batch norm: y = scale(condition) * (x - mean) / sqrt(var + epsilon) + bias(condition).

    The statistics are those of batch norm, over all examples. `apply` takes `condition`, one entry for each example of
    x's first axis; and `residual`, an array of x's shape added before the activation. Either

    - classes (Dumoulin, Shlens and Kudlur 2017, equation 5): num_classes rows of scales and biases, and `condition` is
      int [batch], the row of each example (NaN where it is out of range); or
    - vectors (de Vries et al. 2017): `condition` is [batch, condition_size] and scale(condition) = scale +
      condition @ scale_kernel, bias(condition) = bias + condition @ bias_kernel.

    Args:
      num_classes: how many classes there are.
      condition_size: length of the vectors, in place of num_classes.
      scale_init: scale_init(key, shape, dtype), ones.
      bias_init: bias_init(key, shape, dtype), zeros.
      kernel_init: of scale_kernel and bias_kernel: zeros, so that training starts at plain batch norm.
      feature_axis: the axis of the features, any but the first.
      dtype: of the output; None is the input's.
      param_dtype: of the parameters.
      activation: elementwise function applied last.
      **options: of `batch_norm`.

    Returns:
      A Normalizer with batch norm's batch_stats and params {"scale", "bias"} of shape [num_classes, features]; or
      {"scale", "bias"} of shape [features] and {"scale_kernel", "bias_kernel"} of shape [condition_size, features].

    Raises:
      ValueError: both or neither of num_classes and condition_size, or one below 1; as `batch_norm`; and from apply, no
        condition or one of the wrong shape.
      TypeError: classes that are not integers.
    """
    given = [size for size in (num_classes, condition_size) if size is not None]
    if len(given) != 1 or given[0] < 1:
        raise ValueError(f"num_classes={num_classes}, condition_size={condition_size}; expected one, of at least 1.")
    if {"use_scale", "use_bias"} & set(options):
        raise ValueError("use_scale and use_bias do not apply: both are what the condition chooses; use batch_norm.")
    shared = dict(feature_axis=feature_axis, use_scale=False, use_bias=False) | options
    batch_norm(**shared)

    def init(key, x):
        shape = feature_shape(x, feature_axis)
        if 0 in (a % len(x.shape) for a in (feature_axis,)):
            raise ValueError(f"feature_axis={feature_axis} is the first axis of x, {x.shape}: that is the examples'.")
        rows = shape if num_classes is None else (num_classes, *shape)
        *keys, norm_key = jax.random.split(key, 5)
        params = {"scale": scale_init(keys[0], rows, param_dtype), "bias": bias_init(keys[1], rows, param_dtype)}
        if condition_size is not None:
            kernels = zip(("scale_kernel", "bias_kernel"), keys[2:], strict=True)
            params |= {name: kernel_init(k, (condition_size, *shape), param_dtype) for name, k in kernels}
        return {"params": params, "batch_stats": batch_norm(**shared).init(norm_key, x)["batch_stats"]}

    def apply(variables, x, *, train, condition=None, where=None, weights=None, rng=None, residual=None):
        x = inexact(x)
        params, batch_stats = _checked_params(variables, x), variables["batch_stats"]
        choose = _row if num_classes is not None else _linear
        scale, bias = (choose(params, name, _checked_condition(condition, x)) for name in ("scale", "bias"))
        standardize = batch_norm(dtype=stats_dtype(x), **shared).apply
        batch = dict(where=where, weights=weights, rng=rng)
        xhat, batch_stats = standardize({"params": {}, "batch_stats": batch_stats}, x, train=train, **batch)
        # [batch, features] as [batch, 1, ..., features]: one scale and bias for each example.
        positions = reduced_axes(x.ndim, (0, feature_axis))
        scale, bias = (jnp.expand_dims(v, positions) for v in (scale, bias))
        residual = silenced(residual, combined_weights(x, where, weights))
        return scale_shift(xhat, scale, bias, residual, activation, jnp.dtype(dtype or x.dtype)), batch_stats

    def _checked_params(variables, x):
        params, shape = variables.get("params", {}), feature_shape(x, feature_axis)
        rows = shape if num_classes is None else (num_classes, *shape)
        shapes = dict.fromkeys(("scale", "bias"), rows)
        if condition_size is not None:
            shapes |= dict.fromkeys(("scale_kernel", "bias_kernel"), (condition_size, *shape))
        if {name: jnp.shape(v) for name, v in params.items()} != shapes:
            found = {name: jnp.shape(v) for name, v in params.items()}
            raise ValueError(f"params has {found}; x of shape {x.shape} wants {shapes}: what init makes of it.")
        return params

    def _checked_condition(condition, x):
        shape = (x.shape[0],) if num_classes is not None else (x.shape[0], condition_size)
        if condition is None or jnp.shape(condition) != shape:
            raise ValueError(
                f"condition has shape {None if condition is None else jnp.shape(condition)}; x of shape {x.shape} wants"
                f" condition= of shape {shape}, one entry an example."
            )
        condition = jnp.asarray(condition)
        if num_classes is not None and not jnp.issubdtype(condition.dtype, jnp.integer):
            raise TypeError(f"condition has dtype {condition.dtype}; expected the classes as integers.")
        return condition

    return Normalizer(init, apply)


def _row(params, name, condition):
    # A negative index would count from the end. Moved past the end it gives NaN, as every class out of range does.
    rows = params[name]
    index = jnp.where(condition < 0, len(rows), condition)
    return rows.at[index].get(mode="fill", fill_value=jnp.nan)


def _linear(params, name, condition):
    kernel = params[f"{name}_kernel"]
    return params[name][None] + jnp.matmul(condition, kernel, precision="highest").astype(kernel.dtype)
