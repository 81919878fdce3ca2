"""Flax nnx modules: `BatchNorm`, which drops in for Flax's own, and `Norm`, which lifts any Normalizer.

Beside them `BatchRenorm`, batch renormalization with Flax's names for arguments; `replace_norms`, which puts other
normalizers into a finished model; and `normalizer_of`, the Normalizer that a module stands for.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn import dtypes

from jaxbn._module_norm import Chosen, Make, made_for
from jaxbn._module_norm import normalizer_of as normalizer_of
from jaxbn._nnx_renorm import BatchRenorm as BatchRenorm
from jaxbn._normalizer import Normalizer, OneDrawNormalizer
from jaxbn._record import running_part
from jaxbn._running import init_batch_stats
from jaxbn._shell import apply_batch_norm, as_where, chosen_mode, floating, widened, with_mask
from jaxbn.variants._frozen import PathFilter

Initializer = Callable[..., Any]
Shaped = jax.Array | jax.ShapeDtypeStruct


class BatchNorm(nnx.BatchNorm):
    """`flax.nnx.BatchNorm` on jaxbn's statistics: same arguments, defaults, variables, initial values and dtypes.

    It is a subclass, so that filters and code which look for Flax's class find it. What differs from Flax:

    - Statistics are exact and float32 at least: far from zero too, and pooled by count over shards whose masks let
      different numbers of values through. `use_fast_variance` is accepted and changes nothing.
    - A feature that saw nothing, or a batch that is not finite, leaves its running statistics alone.
    - Training on one value per feature warns once in a process: y is the bias, whatever x is.
    - Running statistics are those of all groups of `axis_index_groups`, the same on every shard; Flax's differ.
    - Running statistics are never rounded to `dtype` before they normalize, and take complex x.
    - With several axes kept, `num_features` is the tuple of their sizes, in the order of x's axes.

    Args:
      num_features: the size of x along `axis`; a tuple where `axis` is several.
      use_running_average: normalize by the running statistics, and leave them alone; `train()` and `eval()` set it.
      axis: the axis or axes *kept*, one scale and bias for each feature along them.
      momentum: decay of the running statistics: new = momentum * old + (1 - momentum) * batch (torch's is 1 minus
        this). None averages all batches equally.
      epsilon: added to the variance, inside the square root.
      dtype: of the output; None promotes x, scale, bias and the statistics, as Flax does.
      param_dtype: of scale and bias.
      use_bias: learn a bias.
      use_scale: learn a scale.
      bias_init: bias_init(key, shape, dtype); may carry metadata, as under `nnx.with_partitioning`.
      scale_init: as bias_init.
      axis_name: named axis, or tuple of them, whose shards share statistics (shard_map, pmap, vmap).
      axis_index_groups: groups of indices on `axis_name` that share mean and var.
      use_fast_variance: accepted, without effect.
      promote_dtype: promote_dtype((x, mean, var, scale, bias), dtype=dtype) -> the five in the dtype of the
        computation; what it makes of mean and var is not used.
      rngs: its "params" stream makes the keys, scale's first.
      bias_metadata: metadata of the bias variable, such as its sharding.
      scale_metadata: as bias_metadata.
      group_size: ghost batches of this many examples; see `jaxbn.batch_norm` for this and what follows.
      pool_axis_name: named axis, or tuple of them, whose shards have the running statistics in common and nothing else.
      unbiased: keep the unbiased variance in the running statistics, as torch does.
      debias: running averages that start at zero and are corrected when read, with a third variable "weight".
      activation: elementwise function applied last, fused into the backward pass.
      skip_nonfinite: a batch whose moments are not finite leaves the running statistics alone.
      allow_single_value: what training on one value per feature does: None warns and goes on, as Flax's layer goes on;
        True goes on in silence; False raises a ValueError.
    """

    # Flax's constructor is not called: it knows a single kept axis and float averages only.
    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        use_running_average: bool | None = False,
        axis: int | Sequence[int] = -1,
        momentum: float | None = 0.99,
        epsilon: float = 1e-5,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = jax.nn.initializers.zeros,
        scale_init: Initializer = jax.nn.initializers.ones,
        axis_name: Hashable | tuple[Hashable, ...] | None = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., tuple] = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        group_size: int | None = None,
        pool_axis_name: Hashable | tuple[Hashable, ...] | None = None,
        unbiased: bool = False,
        debias: bool = False,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        skip_nonfinite: bool = True,
        allow_single_value: bool | None = None,
    ):
        shape = tuple(num_features) if isinstance(num_features, Sequence) else (num_features,)
        for name, value in init_batch_stats(shape, decay=momentum, debias=debias).items():
            setattr(self, name, nnx.BatchStat(value))

        def param(used, init, metadata):
            return nnx.Param(init(rngs.params(), shape, param_dtype), **metadata) if used else nnx.data(None)

        self.scale = param(use_scale, scale_init, scale_metadata)
        self.bias = param(use_bias, bias_init, bias_metadata)
        fields: dict[str, Any] = dict(
            num_features=num_features,
            use_running_average=use_running_average,
            axis=axis,
            momentum=momentum,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            group_size=group_size,
            pool_axis_name=pool_axis_name,
            unbiased=unbiased,
            debias=debias,
            activation=activation,
            skip_nonfinite=skip_nonfinite,
            allow_single_value=allow_single_value,
        )
        # Several of these have wider types than Flax's class declares for the attributes.
        for name, value in fields.items():
            setattr(self, name, value)

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
        """Normalize x: by the batch and moving the running statistics, or by these with use_running_average.

        Args:
          x: [...], of any rank; integers are promoted as in Flax.
          use_running_average: for this call, in place of the attribute.
          mask: broadcastable to x: true where a value counts in the statistics.
          weights: real, broadcastable to x: how much each value counts.
          residual: of x's shape, added before the activation.
          update: move the running statistics by x, whatever normalizes it; None is not use_running_average.

        Returns:
          y of x's shape.

        Raises:
          ValueError: use_running_average is None here and in the module; and as `jaxbn.batch_norm` raises.
        """
        use_running_average = chosen_mode(use_running_average, self.use_running_average)
        update = not use_running_average if update is None else update
        variables = {name: getattr(self, name) for name in ("mean", "var", "weight") if hasattr(self, name)}
        stats = {name: variable.get_value() for name, variable in variables.items()}
        x, params, dtype = self._promoted(x, stats)
        y, moved = apply_batch_norm(
            self,
            {"params": params, "batch_stats": widened(stats, x.dtype)},
            x,
            train=not use_running_average,
            overrides={"dtype": dtype},
            update=update,
            where=as_where(mask),
            weights=weights,
            residual=residual,
        )
        if update:
            jax.tree.map(_assign, variables, moved, is_leaf=_is_variable)
        return y

    def _promoted(self, x, stats):
        scale, bias = (None if v is None else v[...] for v in (self.scale, self.bias))
        plain = running_part(stats)
        arrays = (x, plain["mean"], plain["var"], scale, bias)
        promoted, _, _, scale, bias = self.promote_dtype(arrays, dtype=self.dtype)
        params = {name: v for name, v in (("scale", scale), ("bias", bias)) if v is not None}
        dtype = dtypes.canonicalize_dtype(promoted, scale, bias, dtype=self.dtype)
        # float32 is what x is computed in anyway, and the backward pass keeps x: let it keep the narrow one.
        x = floating(x)
        if jnp.result_type(promoted) != jnp.promote_types(x.dtype, jnp.float32):
            x = floating(promoted)
        return x, params, dtype


class Norm(nnx.Module):
    """Any Normalizer as a module: `params` a tree of nnx.Param, `batch_stats` a tree of nnx.BatchStat.

    Args:
      norm: the Normalizer.
      x: what it will normalize: an array or a `jax.ShapeDtypeStruct`, of which only shape and dtype count; or the
        number of features, which stands for float32 of shape [1, features].
      use_running_average: as in `BatchNorm`: True calls it with train=False; `train()` and `eval()` set it.
      rngs: its "params" stream makes the initial params. Where it has a stream named `rng_collection`, the normalizer
        gets a key from it as `rng` in each call. Each layer has a fork of its own; but layers of
        `stochastic_batch_norm` have copies, so that those which are called equally often draw the same.
      rng_collection: name of that stream.
    """

    def __init__(
        self,
        norm: Normalizer,
        x: Shaped | int,
        *,
        use_running_average: bool | None = False,
        rngs: nnx.Rngs,
        rng_collection: str = "norm",
    ):
        shape, dtype = ((1, x), jnp.float32) if isinstance(x, int | np.integer) else (x.shape, x.dtype)
        variables = norm.init(rngs.params(), jax.ShapeDtypeStruct(shape, dtype))
        self.norm = nnx.static(norm)
        self.params = nnx.data(jax.tree.map(nnx.Param, variables["params"]))
        self.batch_stats = nnx.data(jax.tree.map(nnx.BatchStat, variables["batch_stats"]))
        self.use_running_average = use_running_average
        self.rngs = _stream(norm, rngs[rng_collection]) if rng_collection in rngs else nnx.data(None)

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        update: bool | None = None,
        **arguments: Any,
    ) -> jax.Array:
        """Normalize x, moving `batch_stats` unless use_running_average.

        Args:
          x: what the normalizer takes.
          use_running_average: for this call, in place of the attribute.
          mask: another name for the normalizer's `where`, as `BatchNorm` has it.
          update: move `batch_stats` by x, whatever normalizes it; None is not use_running_average.
          **arguments: for the normalizer's apply: where, weights, rng, residual, condition, step, ...

        Raises:
          ValueError: use_running_average is None here and in the module; mask beside where; and what the normalizer
            raises.
        """
        use_running_average = chosen_mode(use_running_average, self.use_running_average)
        arguments = with_mask(arguments, mask)
        if "rng" not in arguments and self.rngs is not None:
            arguments["rng"] = self.rngs()
        trees = {"params": self.params, "batch_stats": self.batch_stats}
        variables = jax.tree.map(lambda variable: variable.get_value(), trees, is_leaf=_is_variable)
        update = not use_running_average if update is None else update
        y, moved = self.norm.apply(variables, x, train=not use_running_average, update=update, **arguments)
        if update:
            jax.tree.map(_assign, self.batch_stats, moved, is_leaf=_is_variable)
        return y

    def set_view(self, use_running_average: bool | None = None) -> dict[str, Any]:
        """Called by `nnx.view` to set the mode of a view of the module.

        Args:
          use_running_average: normalize by the running statistics, and leave them alone.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
        return {}  # Flax 0.12.4 asks for the arguments that were not used.


def _stream(norm: Normalizer, stream: nnx.RngStream) -> nnx.RngStream:
    """The stream of a layer's own; for a `OneDrawNormalizer` one that gives every layer the same keys."""
    if isinstance(norm, OneDrawNormalizer):
        return nnx.RngStream(stream.key[...], tag=stream.tag)
    return stream.fork()


def _is_variable(node) -> bool:
    return isinstance(node, nnx.Variable)


def _assign(variable, value):
    # Assignment to [...] would keep the old dtype, and so lose the imaginary part of the first complex mean.
    variable.set_value(value)


def replace_norms(
    model: nnx.Module,
    make: Make,
    where: PathFilter = "",
    *,
    kind: type[nnx.Module] | tuple[type[nnx.Module], ...] = (nnx.BatchNorm, BatchRenorm, Norm),
    rngs: nnx.Rngs | None = None,
) -> nnx.Module:
    """A copy of a model in which each batch norm is another normalizer, in a `Norm` of the same mode.

        private = jaxbn.nnx.replace_norms(model, jaxbn.group_norm(8))
        still = jaxbn.nnx.replace_norms(model, jaxbn.frozen, "backbone")

    Variables of the same name and shape are taken over: all of them by `frozen`, scale and bias by `group_norm`. The
    model itself stays as it is, and the copy shares no variables with it. A norm used in several
    places stays one, and has the path at which it is met first.

    Args:
      model: the model, or a norm alone.
      make: the Normalizer for all of them; or a function that takes the one that stood there (see `normalizer_of`) and
        returns the new one, such as `jaxbn.frozen`.
      where: which of them, by path: a regular expression that is searched for in "blocks/0/norm", or a function of that
        path. All by default.
      kind: classes of the modules that are replaced.
      rngs: its "params" stream makes what is not taken over, and its "norm" stream is the new norms'; see `Norm`. None
        is `nnx.Rngs(0)`.

    Raises:
      ValueError: no norm that `where` chooses, or one of which nothing says how many features it has.
      TypeError: make gives no Normalizer, or is a function and a module stands for no Normalizer.
    """
    chosen, rngs = Chosen(where), nnx.Rngs(0) if rngs is None else rngs

    def visit(path, node):
        if not isinstance(node, kind) or not chosen(path):
            return node
        return _in_place_of(node, made_for(node, make), rngs)

    replaced = nnx.recursive_map(visit, nnx.clone(model))
    chosen.check()
    return replaced


def _in_place_of(old: nnx.Module, norm: Normalizer, rngs: nnx.Rngs) -> Norm:
    held = _own_variables(old)
    mode = getattr(old, "use_running_average", None)
    new = Norm(norm, _features(old, held), use_running_average=mode, rngs=rngs)
    for name, variable in _own_variables(new).items():
        if name in held and held[name].shape == variable.shape:
            variable.set_value(held[name].get_value())
    return new


def _own_variables(module: nnx.Module) -> dict[str, nnx.Variable]:
    """Params and statistics by the last name on their path."""
    leaves = nnx.iter_graph(module)
    return {str(path[-1]): v for path, v in leaves if isinstance(v, nnx.Param | nnx.BatchStat)}


def _features(module: nnx.Module, held: dict[str, nnx.Variable]) -> int:
    sizes = {v.shape for v in held.values() if v.ndim}
    features = getattr(module, "num_features", next(iter(sizes))[-1] if len(sizes) == 1 else sizes)
    if not isinstance(features, int | np.integer):
        raise ValueError(
            f"a {type(module).__name__} with features of shape {features} cannot be replaced; expected one axis of"
            " features. Leave it out with where=, and put a module of your own in its place."
        )
    return int(features)
