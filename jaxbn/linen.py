"""Flax linen modules: `BatchNorm`, which drops in for Flax's own, and `Norm`, which lifts any Normalizer.

Beside them `BatchRenorm`, batch renormalization with Flax's names for arguments; `replace_norms`, which puts other
normalizers into a finished network; and `normalizer_of`, the Normalizer that a module stands for.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import dtypes

from jaxbn._linen_renorm import BatchRenorm as BatchRenorm
from jaxbn._linen_variables import declared
from jaxbn._module_norm import Chosen, Make, made_for
from jaxbn._module_norm import normalizer_of as normalizer_of
from jaxbn._normalizer import Normalizer, OneDrawNormalizer
from jaxbn._shell import apply_batch_norm, as_where, floating, widened, with_mask
from jaxbn.variants._frozen import PathFilter

# Arguments while variables are initialized, which happens outside of any named axis and often on one example.
_INITIALIZING = dict.fromkeys(("axis_name", "axis_index_groups", "group_size", "pool_axis_name")) | {
    "allow_single_value": True
}


class BatchNorm(nn.BatchNorm):
    """`flax.linen.BatchNorm` on jaxbn's statistics: same arguments, defaults, variables, initial values and dtypes.

    It is a subclass, so that code which looks for Flax's class finds it. What differs from Flax:

    - Statistics are exact and float32 at least: far from zero too, and pooled by count over shards whose masks let
      different numbers of values through. `use_fast_variance` and `force_float32_reductions` are accepted and change
      nothing.
    - A feature that saw nothing, or a batch that is not finite, leaves its running statistics alone.
    - Training on one value per feature warns once in a process: y is the bias, whatever x is.
    - Running statistics are those of all groups of `axis_index_groups`, the same on every shard; Flax's differ.
    - Running statistics are as wide as x from the start: complex for complex x, float64 for float64 x.

    While variables are initialized no axis need be bound, and the batch is one shard and one group.

    Attributes:
      use_running_average: normalize by the running statistics, and leave them alone; here or in the call, not both.
      axis: the axis or axes *kept*, one scale and bias for each feature along them.
      momentum: decay of the running statistics: new = momentum * old + (1 - momentum) * batch (torch's is 1 minus
        this). None averages all batches equally.
      epsilon: added to the variance, inside the square root.
      dtype: of the output; None promotes x, scale and bias, as Flax does.
      param_dtype: of scale and bias.
      use_bias: learn a bias.
      use_scale: learn a scale.
      bias_init: bias_init(key, shape, dtype); may return a boxed value, as under `nn.with_partitioning`.
      scale_init: as bias_init.
      axis_name: named axis, or tuple of them, whose shards share statistics (shard_map, pmap, vmap).
      axis_index_groups: groups of indices on `axis_name` that share mean and var.
      use_fast_variance: accepted, without effect.
      force_float32_reductions: accepted, without effect.
      group_size: ghost batches of this many examples; see `jaxbn.batch_norm` for this and what follows.
      pool_axis_name: named axis, or tuple of them, whose shards have the running statistics in common and nothing else.
      unbiased: keep the unbiased variance in the running statistics, as torch does.
      debias: running averages that start at zero and are corrected when read, with a third variable "weight".
      activation: elementwise function applied last, fused into the backward pass.
      skip_nonfinite: a batch whose moments are not finite leaves the running statistics alone.
      allow_single_value: what training on one value per feature does: None warns and goes on, as Flax's layer goes on;
        True goes on in silence; False raises a ValueError.
    """

    group_size: int | None = None
    pool_axis_name: Any = None
    unbiased: bool = False
    debias: bool = False
    activation: Callable[[jax.Array], jax.Array] | None = None
    skip_nonfinite: bool = True
    allow_single_value: bool | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        weights: jax.Array | None = None,
        residual: jax.Array | None = None,
        update: bool | None = None,
    ) -> jax.Array:
        """Normalize x: by the batch and moving "batch_stats", or by "batch_stats" with use_running_average.

        Args:
          x: [...], of any rank; integers are promoted as in Flax.
          use_running_average: as the attribute; one of the two must be given, and only one.
          mask: broadcastable to x: true where a value counts in the statistics.
          weights: real, broadcastable to x: how much each value counts.
          residual: of x's shape, added before the activation.
          update: move "batch_stats" by x, whatever normalizes it; None is not use_running_average.

        Returns:
          y of x's shape.

        Raises:
          ValueError: use_running_average given twice or not at all; and as `jaxbn.batch_norm` raises.
          flax.errors.ModifyScopeVariableError: "batch_stats" would move and is not among the mutable collections.
        """
        use_running_average = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        x = floating(x)
        params, stats = declared(self, x, self.debias)
        dtype = dtypes.canonicalize_dtype(x, *params.values(), dtype=self.dtype)
        overrides = {"dtype": dtype} | (_INITIALIZING if self.is_initializing() else {})
        variables = {"params": params, "batch_stats": widened({n: v.value for n, v in stats.items()}, x.dtype)}
        update = not use_running_average if update is None else update
        y, moved = apply_batch_norm(
            self,
            variables,
            x,
            train=not use_running_average,
            overrides=overrides,
            update=update,
            where=as_where(mask),
            weights=weights,
            residual=residual,
        )
        if update and not self.is_initializing():
            for name, value in moved.items():
                stats[name].value = value
        return y


class Norm(nn.Module):
    """Any Normalizer as a module: its params in "params", its statistics in "batch_stats", under its own names.

    Variables are made from the first x. While they are initialized y is what the normalizer gives with its initial
    statistics (train=False), so that no named axis need be bound and a batch of one will do.

    Attributes:
      norm: the Normalizer.
      use_running_average: as in `BatchNorm`; True calls it with train=False.
      rng_collection: name of the stream of random keys. Where `apply` was given one of that name, the normalizer gets
        a key from it as `rng`: each layer its own, but `stochastic_batch_norm` the same in all layers of the network
        (except inside `nn.jit`, which makes keys of its own: pass `rng` there).
    """

    norm: Normalizer
    use_running_average: bool | None = None
    rng_collection: str = "norm"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        update: bool | None = None,
        **arguments: Any,
    ) -> jax.Array:
        """Normalize x, moving "batch_stats" unless use_running_average.

        Args:
          x: what the normalizer takes.
          use_running_average: as the attribute; one of the two must be given, and only one.
          mask: another name for the normalizer's `where`, as `BatchNorm` has it.
          update: move "batch_stats" by x, whatever normalizes it; None is not use_running_average.
          **arguments: for the normalizer's apply: where, weights, rng, residual, condition, step, ...

        Raises:
          ValueError: use_running_average given twice or not at all; mask beside where; and what the normalizer raises.
          flax.errors.ModifyScopeVariableError: "batch_stats" would move and is not among the mutable collections.
        """
        use_running_average = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        arguments = with_mask(arguments, mask)
        params, stats = self._variables(x)
        if "rng" not in arguments and self.has_rng(self.rng_collection):
            arguments["rng"] = self._rng()
        variables = {"params": params, "batch_stats": {name: v.value for name, v in stats.items()}}
        train = not (use_running_average or self.is_initializing())
        update = train if update is None or self.is_initializing() else update
        y, moved = self.norm.apply(variables, x, train=train, update=update, **arguments)
        if update:
            for name, value in moved.items():
                stats[name].value = value
        return y

    def _rng(self):
        if isinstance(self.norm, OneDrawNormalizer) and self.scope is not None:
            # The key that apply was given, before the paths of modules are folded into it.
            return self.scope.rngs[self.rng_collection].rng
        return self.make_rng(self.rng_collection)

    def _variables(self, x):
        # One key for all of them: variables that belong together start together. Without a stream it is only traced.
        key = self.make_rng("params") if self.has_rng("params") else jax.random.key(0)
        start = partial(self.norm.init, key, jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)))
        names = jax.eval_shape(start)
        params = {n: self.param(n, lambda _, n=n: start()["params"][n]) for n in names["params"]}
        stats = {
            n: self.variable("batch_stats", n, lambda n=n: start()["batch_stats"][n]) for n in names["batch_stats"]
        }
        return params, stats


class _InPlace(Norm):
    """Stands where another norm stood, and is not replaced once more."""


@contextlib.contextmanager
def replace_norms(
    make: Make,
    where: PathFilter = "",
    *,
    kind: type[nn.Module] | tuple[type[nn.Module], ...] = (nn.BatchNorm, BatchRenorm, Norm),
) -> Iterator[None]:
    """Within this context other normalizers stand in the place of a linen network's batch norms.

        def loss(params, batch_stats, x):
            with jaxbn.linen.replace_norms(jaxbn.group_norm(8)):
                y = network.apply({"params": params, "batch_stats": batch_stats}, x, train=True)

    Variables stand where those of the replaced norm stood. A checkpoint fits where names and shapes are the same, as
    all are for `frozen`, and scale and bias for `group_norm`; `network.init` in the same context makes others. Modules
    are replaced while they are traced: enter the context inside of a function that is jitted, not around its call.

    Args:
      make: the Normalizer for all of them; or a function that takes the one that stood there (see `normalizer_of`) and
        returns the new one, such as `jaxbn.frozen`.
      where: which of them, by path: a regular expression that is searched for in "Block_0/BatchNorm_1", or a function
        of that path. All by default.
      kind: classes of the modules that are replaced. One without modes, such as `nn.LayerNorm`, is called with
        train=False.

    Raises:
      ValueError: at the end, where no norm was called that `where` chooses.
      TypeError: make gives no Normalizer, or is a function and a module stands for no Normalizer.
    """
    chosen = Chosen(where)

    def interceptor(call, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, kind) or isinstance(module, _InPlace):
            return call(*args, **kwargs)
        return (
            _call_in_place(module, made_for(module, make), *args, **kwargs)
            if chosen(module.path)
            else call(*args, **kwargs)
        )

    with nn.intercept_methods(interceptor):
        yield
    chosen.check(" A function that was jitted before calls none: enter the context inside of it.")


def _call_in_place(module, norm, x, use_running_average=None, **arguments):
    in_module = getattr(module, "use_running_average", True)
    use_running_average = nn.merge_param("use_running_average", in_module, use_running_average)
    # The scope as it was before anything was read: a module may be called more than once.
    return _InPlace(norm, parent=module.scope.rewound())(x, use_running_average, **arguments)
