"""To and from the plain affine map: batch norm folded into a neighbouring kernel, or inserted without an effect.

At test time y = gain * (x - mean) + bias with gain = scale / sqrt(var + epsilon), which a linear layer before or after
it can take in (Jacob et al. 2018, section 3.2). Mean-only batch norm has a gain of 1. Kernels are laid out as in Flax:
[*spatial, inputs, outputs].
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._arithmetic import at_least_float32
from jaxbn._inputs import canonical_axes
from jaxbn._layers import AFFINE_NAMES, find_layers, flat_names, nested_names
from jaxbn._moments import Moments
from jaxbn._running import running_moments

# Paddings that repeat or leave out values, and never insert a zero that batch norm has not seen.
_PADDINGS_WITHOUT_ZEROS = ("VALID", "CIRCULAR", "REFLECT")


class Preceding(NamedTuple):
    """A dense, convolution or transposed-convolution layer whose output is normalized.

    Attributes:
      layer: its path in params, "/" between names.
      output_axis: axis or axes of its kernel that are the normalized features: the last, also for grouped and depthwise
        convolutions; -2 for `nn.ConvTranspose(transpose_kernel=True)`.
    """

    layer: str
    output_axis: int | tuple[int, ...] = -1


class Following(NamedTuple):
    """A dense or convolution layer whose input is normalized, with nothing in between.

    Attributes:
      layer: its path in params, "/" between names.
      padding: as given to the layer; "SAME", Flax's default, is refused where the kernel is wider than 1.
      feature_group_count: as given to the layer; the number of inputs for a depthwise convolution.
    """

    layer: str
    padding: str | int | tuple = "SAME"
    feature_group_count: int = 1


def fold_preceding(
    kernel: jax.Array,
    bias: jax.Array | None,
    norm: Mapping[str, Any],
    *,
    epsilon: float,
    output_axis: int | tuple[int, ...] = -1,
    debias: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Kernel and bias of the one layer that does what a linear layer followed by batch norm at test time does.

    kernel' = kernel * gain, bias' = (bias - mean) * gain + norm's bias. An `activation` of the norm is not part of it.

    Args:
      kernel: of any rank, its output features along `output_axis`.
      bias: [features], or None for zeros.
      norm: {"params", "batch_stats"} of the batch norm, [features] each.
      epsilon: of the batch norm.
      output_axis: axis or axes of the kernel that are the features.
      debias: of the batch norm.

    Returns:
      Kernel and bias, in the kernel's dtype.

    Raises:
      ValueError: the kernel has other features along output_axis than the batch norm, or the normalizer is not one
        affine map of each feature at test time, as virtual and conditional batch norm are not.
    """
    mean, gain, shift = _affine(norm, epsilon, debias)
    axes = canonical_axes(output_axis, kernel.ndim, "output_axis")
    features = tuple(kernel.shape[axis] for axis in axes)
    if features != mean.shape:
        raise ValueError(
            f"kernel of shape {kernel.shape} has features of shape {features} along output_axis={output_axis}; the"
            f" batch norm has {mean.shape}. A transposed convolution with transpose_kernel=True has them along -2."
        )
    others = [axis for axis in range(kernel.ndim) if axis not in axes]
    bias = (-mean if bias is None else at_least_float32(bias) - mean) * gain + shift
    return (kernel * jnp.expand_dims(gain, others)).astype(kernel.dtype), bias.astype(kernel.dtype)


def fold_following(
    kernel: jax.Array,
    bias: jax.Array | None,
    norm: Mapping[str, Any],
    *,
    epsilon: float,
    padding: str | int | tuple = "SAME",
    feature_group_count: int = 1,
    debias: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Kernel and bias of the one layer that does what batch norm at test time followed by a linear layer does.

    kernel' = gain * kernel, bias' = bias + sum over taps and inputs of (norm's bias - mean * gain) * kernel. A zero
    that the convolution pads with stands for a normalized zero: no bias can make up for it, since only some of the
    outputs see it. The same holds for transposed convolutions, whose outputs see different taps.

    Args:
      kernel: [*spatial, inputs / feature_group_count, outputs].
      bias: [outputs], or None for zeros.
      norm: {"params", "batch_stats"} of the batch norm, [inputs] each.
      epsilon: of the batch norm.
      padding: of the layer, as Flax takes it.
      feature_group_count: of the layer.
      debias: of the batch norm.

    Returns:
      Kernel and bias, in the kernel's dtype.

    Raises:
      ValueError: the layer pads with zeros, the features do not fit, or the normalizer is not one affine map of each
        feature at test time.
    """
    mean, gain, shift = _affine(norm, epsilon, debias)
    _check_padding(kernel, padding)
    inputs, outputs = kernel.shape[-2] * feature_group_count, kernel.shape[-1]
    if mean.shape != (inputs,) or outputs % feature_group_count:
        raise ValueError(
            f"kernel of shape {kernel.shape} with feature_group_count={feature_group_count} takes {inputs} inputs; the"
            f" batch norm has features of shape {mean.shape}."
        )
    gain, offset = (_by_group(v, feature_group_count, kernel) for v in (gain, shift - mean * gain))
    added = jnp.sum(at_least_float32(kernel) * offset, range(kernel.ndim - 1))
    bias = added if bias is None else bias + added
    return (kernel * gain).astype(kernel.dtype), bias.astype(kernel.dtype)


def fold_variables(
    variables: Mapping[str, Any],
    pairs: Mapping[str, str | Preceding | Following],
    *,
    epsilon: float,
    debias: bool = False,
) -> dict:
    """Variables of the same linen network without its batch norms, for use at test time.

    The batch norms' entries are gone and every layer that took one in has a bias: the network to apply them to has
    `use_bias=True` there and no batch norm (`jaxbn.identity(activation=...)` in its place, with the norm's activation).

    Args:
      variables: {"params", "batch_stats", ...}.
      pairs: {path of a batch norm: the layer to fold it into}; a plain path stands for `Preceding(path)`. They are
        folded in order, and a layer may take in one before and one after it.
      epsilon: of the batch norms.
      debias: of the batch norms.

    Returns:
      A new dict; arrays that are not concerned are the same. A boxed kernel, such as a partitioned one, stays boxed.

    Raises:
      ValueError: a path that is not there, with those that are; and as `fold_preceding` and `fold_following`.
    """
    flat: dict[str, dict[str, Any]] = {"params": {}, "batch_stats": {}}
    flat |= {name: flat_names(tree) for name, tree in variables.items()}
    layers = sorted(find_layers(variables.get("batch_stats", {}), ("mean",)))
    for path, layer in pairs.items():
        layer = Preceding(layer) if isinstance(layer, str) else layer
        if path not in layers:
            raise ValueError(f"no batch norm at {path!r}; there are {layers}.")
        norm = {name: _pop_layer(flat[name], path) for name in ("params", "batch_stats")}
        _fold_one(flat["params"], path, layer, norm, epsilon, debias)
    return {name: nested_names(tree) for name, tree in flat.items()}


def unfold(mean: jax.Array, var: jax.Array, *, epsilon: float) -> dict[str, dict[str, jax.Array]]:
    """Variables of a batch norm that leaves a network's function as it is: scale = sqrt(var + epsilon), bias = mean.

    Args:
      mean: of the pre-activation to normalize, [features].
      var: likewise, biased.
      epsilon: of the batch norm.

    Returns:
      {"params": {"scale", "bias"}, "batch_stats": {"mean", "var"}}.
    """
    mean, var = jnp.asarray(mean), jnp.asarray(var)
    params = {"scale": jnp.sqrt(var + epsilon), "bias": mean}
    return {"params": params, "batch_stats": {"mean": mean, "var": var}}


def unfold_variables(
    variables: Mapping[str, Any],
    moments: Mapping[str, Moments] | None = None,
    *,
    epsilon: float,
    paths: Iterable[str] | None = None,
) -> dict:
    """Variables of a linen network whose batch norms have no effect, so that inserting them changes no output.

    With fresh batch norms and moments=None every one becomes the identity, on which `input_moments` sees what the
    network without them computes; a second call with those moments then normalizes what it normalizes.

    Args:
      variables: {"params", "batch_stats", ...} of the network with its batch norms; the other params as trained.
      moments: {path: Moments of the layer's input}; None takes the running statistics that are there.
      epsilon: of the batch norms.
      paths: the batch norms concerned; None is those in `moments`, or all.

    Raises:
      ValueError: a path at which there is no batch norm, with those that there are.
    """
    layers = find_layers(variables.get("batch_stats", {}))
    sources = {path: (s["mean"], s["var"]) for path, s in layers.items()}
    if moments is not None:
        # Mean-only batch norm is measured too, but has no scale to insert it with.
        mean_only = find_layers(variables.get("batch_stats", {}), ("mean",)).keys() - layers.keys()
        sources = {path: (m.mean, m.var) for path, m in moments.items() if path not in mean_only}
    flat = {name: flat_names(tree) for name, tree in variables.items()}
    for path in sources if paths is None else paths:
        if path not in layers or path not in sources:
            raise ValueError(f"no batch norm at {path!r}; there are {sorted(layers.keys() & sources.keys())}.")
        _unfold_one(flat, path, *sources[path], epsilon)
    return {name: nested_names(tree) for name, tree in flat.items()}


def _affine(norm, epsilon, debias):
    """Mean, gain and bias of y = gain * (x - mean) + bias, [features] each, float32 at least."""
    norm = {name: {n: _unboxed(v) for n, v in norm.get(name, {}).items()} for name in AFFINE_NAMES}
    _check_affine(norm)
    stats, params = norm["batch_stats"], norm["params"]
    if "var" in stats:
        mean, var = (at_least_float32(jnp.asarray(v)) for v in running_moments(stats, debias=debias))
        gain = lax.rsqrt(var + epsilon) * params.get("scale", 1)
    else:
        mean = at_least_float32(jnp.asarray(stats["mean"]))
        gain = jnp.ones_like(mean) * params.get("scale", 1)
    return mean, gain, jnp.broadcast_to(params.get("bias", 0), mean.shape)


def _check_affine(norm):
    more = sorted(
        {f"{kind}/{name}" for kind, known in AFFINE_NAMES.items() for name in norm[kind] if name not in known}
    )
    features = jnp.shape(norm["batch_stats"]["mean"])
    wrong = {name: jnp.shape(v) for name, v in norm["params"].items() if jnp.shape(v) != features}
    if more or wrong:
        found = f"has {', '.join(more)}" if more else f"has params of shapes {wrong} beside a mean of shape {features}"
        raise ValueError(
            f"the normalizer {found}: at test time it is not one affine map of each feature, as batch norm, renorm,"
            " mean-only and stochastic batch norm are, and cannot be folded."
        )


def _unboxed(value):
    """The array of a boxed value, such as a partitioned one; any other value as it is."""
    (leaf,) = jax.tree.leaves(value)
    return leaf


def _check_padding(kernel, padding):
    spatial = kernel.shape[:-2]
    if isinstance(padding, str):
        # SAME and CAUSAL pad a kernel of size 1 with nothing.
        pads = padding not in _PADDINGS_WITHOUT_ZEROS and any(size > 1 for size in spatial)
    else:
        pads = any(jax.tree.leaves(padding))
    if pads:
        raise ValueError(
            f"a convolution with kernel {kernel.shape} and padding={padding!r} pads its input with zeros, which batch"
            " norm before it does not see: no kernel and bias give the same outputs at the border. Fold the norm into"
            f" the layer before it, or say which of {_PADDINGS_WITHOUT_ZEROS} the layer uses."
        )


def _by_group(v, groups, kernel):
    """[inputs] as [inputs / groups, outputs], with the kernel's rank: what each output's group sees of v."""
    seen = jnp.repeat(v.reshape(groups, -1).T, kernel.shape[-1] // groups, axis=1)
    return jnp.expand_dims(seen, range(kernel.ndim - 2))


def _pop_layer(flat, path):
    prefix = f"{path}/" if path else ""
    names = [name for name in flat if name.startswith(prefix) and "/" not in name[len(prefix) :]]
    return {name[len(prefix) :]: flat.pop(name) for name in names}


def _fold_one(params, path, layer, norm, epsilon, debias):
    names = [f"{layer.layer}/{name}" for name in ("kernel", "bias")]
    if names[0] not in params:
        kernels = sorted(name.removesuffix("/kernel") for name in params if name.endswith("/kernel"))
        raise ValueError(f"no kernel at {layer.layer!r}; there are {kernels}.")
    boxes = [params.get(name) for name in names]
    kernel, bias = (None if box is None else _unboxed(box) for box in boxes)
    where, how = layer._asdict(), dict(epsilon=epsilon, debias=debias)
    del where["layer"]
    fold: Callable[..., tuple] = fold_preceding if isinstance(layer, Preceding) else fold_following
    try:
        folded = fold(kernel, bias, norm, **where, **how)
    except ValueError as error:
        raise ValueError(f"{path!r} cannot be folded into {layer.layer!r}: {error}") from error
    for name, box, value in zip(names, boxes, folded, strict=True):
        params[name] = value if box is None else jax.tree.unflatten(jax.tree.structure(box), [value])


def _unfold_one(flat, path, mean, var, epsilon):
    prefix = f"{path}/" if path else ""
    for collection, values in unfold(mean, var, epsilon=epsilon).items():
        for name, value in values.items():
            box = flat[collection].get(prefix + name)
            if box is None:
                raise ValueError(
                    f"the batch norm at {path!r} has no {name}; it needs scale and bias to have no effect."
                )
            like = value.astype(_unboxed(box).dtype)
            flat[collection][prefix + name] = jax.tree.unflatten(jax.tree.structure(box), [like])
