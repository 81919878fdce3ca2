"""Batch renormalization as a Flax linen module, with Flax's names for arguments."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import dtypes

from jaxbn._linen_variables import declared
from jaxbn._module_norm import arguments_of, moves_statistics
from jaxbn._normalizer import Normalizer
from jaxbn._shell import floating, widened, with_mask
from jaxbn.variants._renorm import Limit, batch_renorm, paper_d_max, paper_r_max

# While variables are initialized: no bound axis, one example will do, and no correction by initial statistics.
_INITIALIZING = dict(axis_name=None, axis_index_groups=None, allow_single_value=True, r_max=1.0, d_max=0.0)


class BatchRenorm(nn.Module):
    """`jaxbn.batch_renorm` as a module (Ioffe 2017), with the arguments of `flax.linen.BatchNorm` and its variables.

    "batch_stats" holds "step" beside "mean" and "var": int32 [], how many batches moved them. CrossQ's layer (Bhatt et
    al. 2024) is r_max=3.0, d_max=5.0, warmup_steps=100_000; `jaxbn.convert.from_crossq` reads its checkpoints.

    Attributes:
      use_running_average: normalize by the running statistics, and leave them alone; here or in the call, not both.
      axis: the axis or axes *kept*, one scale and bias for each feature along them.
      momentum: decay of the running statistics: new = momentum * old + (1 - momentum) * batch (torch's is 1 minus
        this). None averages all batches equally.
      epsilon: added to the variances, inside the square root.
      dtype: of the output; None promotes x, scale and bias, as Flax does.
      param_dtype: of scale and bias.
      use_bias: learn a bias.
      use_scale: learn a scale.
      bias_init: bias_init(key, shape, dtype); may return a boxed value, as under `nn.with_partitioning`.
      scale_init: as bias_init.
      axis_name: named axis, or tuple of them, whose shards share statistics (shard_map, pmap, vmap).
      axis_index_groups: groups of indices on `axis_name` that share mean and var.
      r_max: largest correction of the scale, at least 1: a number, or a function of the step.
      d_max: largest correction of the mean, at least 0: a number, or a function of the step.
      warmup_steps: steps of plain batch norm at the start, whatever the limits say.
      activation: elementwise function applied last.
      skip_nonfinite: a batch whose moments are not finite leaves the running statistics alone.
      allow_single_value: train even where each feature sees one value only.
    """

    use_running_average: bool | None = None
    axis: int | tuple[int, ...] = -1
    momentum: float | None = 0.99
    epsilon: float = 1e-3
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Callable[..., Any] = jax.nn.initializers.zeros
    scale_init: Callable[..., Any] = jax.nn.initializers.ones
    axis_name: Any = None
    axis_index_groups: Any = None
    r_max: Limit = paper_r_max
    d_max: Limit = paper_d_max
    warmup_steps: int = 0
    activation: Callable[[jax.Array], jax.Array] | None = None
    skip_nonfinite: bool = True
    allow_single_value: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        **arguments: Any,
    ) -> jax.Array:
        """Normalize x, moving "batch_stats" unless use_running_average.

        Args:
          x: [...], of any rank; integers are promoted as in Flax.
          use_running_average: as the attribute; one of the two must be given, and only one.
          mask: broadcastable to x: true where a value counts in the statistics.
          **arguments: of `batch_renorm`'s apply: weights, residual, step, ...

        Returns:
          y of x's shape.

        Raises:
          ValueError: use_running_average given twice or not at all; and as `jaxbn.batch_renorm` raises.
          flax.errors.ModifyScopeVariableError: training without "batch_stats" among the mutable collections.
        """
        use_running_average = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        x = floating(x)
        params, stats = declared(self, x)
        stats["step"] = self.variable("batch_stats", "step", lambda: jnp.zeros((), jnp.int32))
        norm = self._norm(x, params)
        held = {name: variable.value for name, variable in stats.items()}
        held = widened({n: v for n, v in held.items() if n != "step"}, x.dtype) | {"step": held["step"]}
        variables = {"params": params, "batch_stats": held}
        y, moved = norm.apply(variables, x, train=not use_running_average, **with_mask(arguments, mask))
        if moves_statistics(use_running_average, arguments) and not self.is_initializing():
            for name, value in moved.items():
                stats[name].value = value
        return y

    def _norm(self, x, params) -> Normalizer:
        dtype = dtypes.canonicalize_dtype(x, *params.values(), dtype=self.dtype)
        overrides = {"dtype": dtype} | (_INITIALIZING if self.is_initializing() else {})
        return batch_renorm(**arguments_of(self, batch_renorm) | overrides)
