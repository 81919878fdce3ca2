"""The variables of a batch norm in linen: scale and bias, and running statistics under Flax's names."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxbn._inputs import canonical_axes
from jaxbn._running import init_batch_stats


def declared(module: nn.Module, x: jax.Array, debias: bool = False) -> tuple[dict[str, Any], dict[str, nn.Variable]]:
    """Params, and the variables of "batch_stats", as wide as x; made where the module is initialized.

    Args:
      module: a bound module with the attributes of `flax.linen.BatchNorm`, within its `nn.compact` method.
      x: what it normalizes.
      debias: whether "weight" stands beside "mean" and "var".
    """
    shape = tuple(x.shape[axis] for axis in canonical_axes(module.axis, x.ndim))
    start = partial(
        init_batch_stats, shape, jnp.promote_types(x.dtype, jnp.float32), decay=module.momentum, debias=debias
    )
    names = jax.eval_shape(start)
    stats = {name: module.variable("batch_stats", name, lambda n=name: start()[n]) for name in names}
    used = {"scale": (module.use_scale, module.scale_init), "bias": (module.use_bias, module.bias_init)}
    params = {n: module.param(n, init, shape, module.param_dtype) for n, (use, init) in used.items() if use}
    return params, stats
