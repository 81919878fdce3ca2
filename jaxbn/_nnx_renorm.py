"""Batch renormalization as a Flax nnx module, with Flax's names for arguments."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from jaxbn._module_norm import arguments_of, moves_statistics
from jaxbn._running import init_batch_stats
from jaxbn._shell import chosen_mode, floating, widened, with_mask
from jaxbn.variants._renorm import Limit, batch_renorm, paper_d_max, paper_r_max

Initializer = Callable[..., Any]


class BatchRenorm(nnx.Module):
    """`jaxbn.batch_renorm` as a module (Ioffe 2017), with the arguments of `flax.nnx.BatchNorm` and its variables.

    Beside "mean" and "var" it holds "step": int32 [], how many batches moved them. CrossQ's layer (Bhatt et al. 2024)
    is r_max=3.0, d_max=5.0, warmup_steps=100_000.

    Args:
      num_features: the size of x along `axis`; a tuple where `axis` is several.
      use_running_average: normalize by the running statistics, and leave them alone; `train()` and `eval()` set it.
      axis: the axis or axes *kept*, one scale and bias for each feature along them.
      momentum: decay of the running statistics: new = momentum * old + (1 - momentum) * batch (torch's is 1 minus
        this). None averages all batches equally.
      epsilon: added to the variances, inside the square root.
      dtype: of the output; None promotes x, scale and bias, as Flax does.
      param_dtype: of scale and bias.
      use_bias: learn a bias.
      use_scale: learn a scale.
      bias_init: bias_init(key, shape, dtype); may carry metadata, as under `nnx.with_partitioning`.
      scale_init: as bias_init.
      axis_name: named axis, or tuple of them, whose shards share statistics (shard_map, pmap, vmap).
      axis_index_groups: groups of indices on `axis_name` that share mean and var.
      rngs: its "params" stream makes the keys, scale's first.
      r_max: largest correction of the scale, at least 1: a number, or a function of the step.
      d_max: largest correction of the mean, at least 0: a number, or a function of the step.
      warmup_steps: steps of plain batch norm at the start, whatever the limits say.
      activation: elementwise function applied last.
      skip_nonfinite: a batch whose moments are not finite leaves the running statistics alone.
      allow_single_value: train even where each feature sees one value only.
    """

    dtype: Any
    use_running_average: bool | None

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        use_running_average: bool | None = False,
        axis: int | Sequence[int] = -1,
        momentum: float | None = 0.99,
        epsilon: float = 1e-3,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = jax.nn.initializers.zeros,
        scale_init: Initializer = jax.nn.initializers.ones,
        axis_name: Hashable | tuple[Hashable, ...] | None = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        rngs: nnx.Rngs,
        r_max: Limit = paper_r_max,
        d_max: Limit = paper_d_max,
        warmup_steps: int = 0,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        skip_nonfinite: bool = True,
        allow_single_value: bool = False,
    ):
        fields: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("self", "rngs", *_INITIALIZERS)}
        shape = tuple(num_features) if isinstance(num_features, Sequence) else (num_features,)

        def param(used, init):
            return nnx.Param(init(rngs.params(), shape, param_dtype)) if used else nnx.data(None)

        self.scale = param(use_scale, scale_init)
        self.bias = param(use_bias, bias_init)
        start = init_batch_stats(shape, decay=momentum) | {"step": jnp.zeros((), jnp.int32)}
        for name, value in start.items():
            setattr(self, name, nnx.BatchStat(value))
        for name, value in fields.items():
            # Lists would be taken for parts of the graph.
            setattr(self, name, nnx.static(_hashable(value)))
        batch_renorm(**arguments_of(self, batch_renorm))  # ValueError where arguments are out of range.

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        **arguments: Any,
    ) -> jax.Array:
        """Normalize x, moving the running statistics unless use_running_average.

        Args:
          x: [...], of any rank; integers are promoted as in Flax.
          use_running_average: for this call, in place of the attribute.
          mask: broadcastable to x: true where a value counts in the statistics.
          **arguments: of `batch_renorm`'s apply: weights, residual, step, ...

        Returns:
          y of x's shape.

        Raises:
          ValueError: use_running_average is None here and in the module; and as `jaxbn.batch_renorm` raises.
        """
        chosen = chosen_mode(use_running_average, self.use_running_average)
        x = floating(x)
        params = {n: v[...] for n in ("scale", "bias") if (v := getattr(self, n)) is not None}
        stats = {name: getattr(self, name) for name in ("mean", "var", "weight", "step") if hasattr(self, name)}
        held = {name: variable.get_value() for name, variable in stats.items()}
        held = widened({n: v for n, v in held.items() if n != "step"}, x.dtype) | {"step": held["step"]}
        dtype = dtypes.canonicalize_dtype(x, *params.values(), dtype=self.dtype)
        norm = batch_renorm(**arguments_of(self, batch_renorm) | {"dtype": dtype})
        variables = {"params": params, "batch_stats": held}
        y, moved = norm.apply(variables, x, train=not chosen, **with_mask(arguments, mask))
        if moves_statistics(chosen, arguments):
            for name, variable in stats.items():
                variable.set_value(moved[name])
        return y

    def set_view(self, use_running_average: bool | None = None) -> dict[str, Any]:
        """Called by `nnx.view` to set the mode of a view of the module.

        Args:
          use_running_average: normalize by the running statistics, and leave them alone.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
        return {}  # Flax 0.12.4 asks for the arguments that were not used.


_INITIALIZERS = ("scale_init", "bias_init")


def _hashable(value: Any) -> Any:
    return tuple(_hashable(v) for v in value) if isinstance(value, list) else value
