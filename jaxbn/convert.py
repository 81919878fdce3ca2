"""Variables and hyperparameters from and to torch, Keras, Haiku and Flax, and those of CrossQ in SBX.

| jaxbn            | torch                    | Keras             | Haiku                    | Flax           |
| ---------------- | ------------------------ | ----------------- | ------------------------ | -------------- |
| scale, bias      | weight, bias             | gamma, beta       | scale, offset            | scale, bias    |
| mean, var        | running_mean, running_var| moving_mean, moving_variance | mean_ema, var_ema | mean, var     |
| weight           | num_batches_tracked      |                   | 1 - decay ** counter     |                |
| decay            | 1 - momentum             | momentum          | decay_rate               | momentum       |
| epsilon          | eps                      | epsilon           | eps                      | epsilon        |
| unbiased=True    | always                   | never             | never                    | never          |
| debias=True      | never                    | never             | always                   | never          |

None of the packages is imported: tensors are anything that numpy can read, torch tensors included, and what comes back
are numpy arrays that own their memory. Nothing is ever unpickled. Flax's variables have the same names and need no
change. A negative variance, or arrays of one layer whose shapes differ, are refused with a ValueError both ways.
"""

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._arithmetic import at_least_float32
from jaxbn._batch_norm import batch_norm
from jaxbn._convert_crossq import arguments_from_crossq as arguments_from_crossq
from jaxbn._convert_crossq import from_crossq as from_crossq
from jaxbn._convert_crossq import to_crossq as to_crossq
from jaxbn._layers import AFFINE_NAMES, nested_names
from jaxbn._running import running_moments

Tensors = dict[str, np.ndarray]
Variables = dict[str, dict[str, jax.Array]]

V = TypeVar("V", bound=Mapping[str, Any])

_DEFAULTS = {name: p.default for name, p in inspect.signature(batch_norm).parameters.items()}
# The weight of an exponential average rounds to 1 in float32 once what is missing is below half of 2**-24.
_SETTLED = 2.0**-26


def from_torch(state: Mapping[str, Any], prefix: str = "", *, cumulative: bool = False) -> Variables:
    """Variables of one torch batch norm.

    Args:
      state: a state dict, or what `read_safetensors` gives: torch tensors or numpy arrays by name.
      prefix: of the layer's names, such as "layer1.0.bn1"; "" for the layer's own state dict.
      cumulative: the layer has momentum=None, and "weight" becomes num_batches_tracked, as decay=None wants it.

    Returns:
      {"params": {"scale", "bias"} where the layer is affine, "batch_stats": {"mean", "var"}}. The variance is the
      unbiased one that torch stores; statistics are float32 at least.

    Raises:
      ValueError: there are no running statistics under the prefix, with the prefixes that have them.
    """
    start = f"{prefix}." if prefix else ""
    if not {f"{start}running_mean", f"{start}running_var"} <= state.keys():
        raise ValueError(
            f"no running_mean and running_var under {prefix!r}; batch norms stand at {torch_prefixes(state)}."
        )
    names = {"scale": "weight", "bias": "bias"}
    params = {ours: _array(state[start + theirs]) for ours, theirs in names.items() if start + theirs in state}
    mean, var = (at_least_float32(_array(state[f"{start}running_{name}"])) for name in ("mean", "var"))
    batch_stats = {"mean": mean, "var": var}
    if cumulative:
        batch_stats["weight"] = jnp.full_like(var, float(_array(state[f"{start}num_batches_tracked"])))
    return _checked({"params": params, "batch_stats": batch_stats}, f"the torch layer {prefix!r}")


def to_torch(
    variables: Mapping[str, Any], prefix: str = "", *, debias: bool = False, num_batches_tracked: int | None = None
) -> Tensors:
    """State dict of one torch batch norm: weight, bias, running_mean, running_var, num_batches_tracked.

    Args:
      variables: {"params", "batch_stats"}. Of scale and bias a missing one becomes ones or zeros, since torch has both
        or neither.
      prefix: as in `from_torch`.
      debias: of the batch norm; torch's averages are not corrected when read, so they are here.
      num_batches_tracked: None takes "weight" where decay=None left it there, and 0 otherwise.
    """
    mean, var = running_moments(_checked(variables, "the batch norm", flat=True)["batch_stats"], debias=debias)
    params, counted = variables.get("params", {}), variables["batch_stats"].get("weight", 0)
    if num_batches_tracked is None:
        num_batches_tracked = 0 if debias else int(np.max(counted))
    state = {}
    if params:
        state["weight"] = _owned(params.get("scale", jnp.ones_like(var)))
        state["bias"] = _owned(params.get("bias", jnp.zeros_like(mean)))
    state |= {"running_mean": _owned(mean), "running_var": _owned(var)}
    state["num_batches_tracked"] = np.asarray(num_batches_tracked, np.int64)
    return {f"{prefix}.{name}" if prefix else name: value for name, value in state.items()}


def torch_prefixes(state: Mapping[str, Any]) -> list[str]:
    """Where the batch norms stand in a state dict: the prefixes that `from_torch` takes, in order."""
    return [name.removesuffix("running_mean").rstrip(".") for name in state if name.endswith("running_mean")]


def layers_from_torch(state: Mapping[str, Any], paths: Mapping[str, str]) -> dict[str, dict]:
    """Variables of many batch norms of a torch network, as a tree.

    Args:
      state: as in `from_torch`.
      paths: {prefix in torch: path in the tree, "/" between names}.

    Returns:
      {"params": tree, "batch_stats": tree}, with entries for the batch norms alone.
    """
    flat: dict[str, Any] = {}
    for prefix, path in paths.items():
        for collection, values in from_torch(state, prefix).items():
            flat |= {f"{collection}/{path}/{name}": value for name, value in values.items()}
    return {"params": {}, "batch_stats": {}} | nested_names(flat)


def layers_to_torch(variables: Mapping[str, Any], paths: Mapping[str, str], *, debias: bool = False) -> Tensors:
    """The state dict entries of many batch norms; `paths` as in `layers_from_torch`."""
    state: Tensors = {}
    for prefix, path in paths.items():
        layer = {name: _at(variables.get(name, {}), path) for name in ("params", "batch_stats")}
        state |= to_torch(layer, prefix, debias=debias)
    return state


def read_safetensors(path: str | Path) -> Tensors:
    """All tensors of a safetensors file by name, for `from_torch`; needs the package safetensors."""
    return _safetensors().load_file(path)


def write_safetensors(path: str | Path, state: Mapping[str, np.ndarray]) -> None:
    """Write tensors, such as those of `to_torch`, to a safetensors file; needs the package safetensors."""
    _safetensors().save_file({name: np.ascontiguousarray(value) for name, value in state.items()}, path)


def from_keras(weights: Mapping[str, Any]) -> Variables:
    """Variables of one Keras BatchNormalization, from `{w.name: w for w in layer.weights}`.

    Args:
      weights: moving_mean, moving_variance, and gamma and beta where the layer has them.

    Raises:
      ValueError: there are no moving statistics among them.
    """
    weights = {name.removesuffix(":0").rpartition("/")[2]: value for name, value in weights.items()}
    if not {"moving_mean", "moving_variance"} <= weights.keys():
        raise ValueError(f"no moving_mean and moving_variance among {sorted(weights)}; pass one layer's weights.")
    params = {ours: _array(weights[theirs]) for ours, theirs in _KERAS_PARAMS.items() if theirs in weights}
    mean, var = (at_least_float32(_array(weights[f"moving_{name}"])) for name in ("mean", "variance"))
    return _checked(dict(params=params, batch_stats=dict(mean=mean, var=var)), "the Keras layer")


def to_keras(variables: Mapping[str, Any], *, debias: bool = False) -> Tensors:
    """Weights of one Keras BatchNormalization, in its order: `layer.set_weights(list(weights.values()))`.

    Args:
      variables: {"params", "batch_stats"}.
      debias: of the batch norm; Keras's averages are not corrected when read, so they are here.
    """
    mean, var = running_moments(_checked(variables, "the batch norm", flat=True)["batch_stats"], debias=debias)
    params = variables.get("params", {})
    weights = {theirs: _owned(params[ours]) for ours, theirs in _KERAS_PARAMS.items() if ours in params}
    return weights | {"moving_mean": _owned(mean), "moving_variance": _owned(var)}


_SAME_SHAPE = ("scale", "bias", "mean", "var", "weight")
_KERAS_PARAMS = {"scale": "gamma", "bias": "beta"}


def from_haiku(
    params: Mapping[str, Any], state: Mapping[str, Any], name: str = "batch_norm", *, decay: float
) -> Variables:
    """Variables of one `hk.BatchNorm`, for `batch_norm(debias=True)`: Haiku corrects its averages for their start.

    Args:
      params: of the network: {module name: {"scale", "offset"}}.
      state: of the network: {module name: {"counter", "hidden", "average"}}.
      name: of the module.
      decay: its decay_rate.

    Returns:
      {"params", "batch_stats": {"mean", "var", "weight"}}, flat vectors of [features].

    Raises:
      ValueError: the state holds no averages of a module of that name, with the names that it does hold.
    """
    averages = {ours: state[key] for ours in ("mean", "var") if (key := f"{name}/~/{ours}_ema") in state}
    if len(averages) < 2:
        held = sorted(key.removesuffix("/~/mean_ema") for key in state if key.endswith("/~/mean_ema"))
        raise ValueError(f"no mean_ema and var_ema of a module {name!r} in state; there are {held}.")
    given = params.get(name, {})
    ours = {"scale": "scale", "bias": "offset"}
    batch_stats = {key: at_least_float32(_array(average["hidden"])).ravel() for key, average in averages.items()}
    weight = -math.expm1(float(_array(averages["mean"]["counter"])) * math.log(decay)) if decay else 1.0
    batch_stats["weight"] = jnp.full_like(batch_stats["var"], weight)
    found: dict[str, jax.Array] = {
        key: _array(given[theirs]).ravel() for key, theirs in ours.items() if theirs in given
    }
    return _checked({"params": found, "batch_stats": batch_stats}, f"the Haiku module {name!r}")


def to_haiku(
    variables: Mapping[str, Any],
    name: str = "batch_norm",
    *,
    decay: float,
    ndim: int,
    feature_axis: int = -1,
    debias: bool = False,
) -> tuple[dict[str, Tensors], dict[str, Tensors]]:
    """Params and state of one `hk.BatchNorm`.

    Args:
      variables: {"params", "batch_stats"}, [features] each.
      name: of the module.
      decay: its decay_rate.
      ndim: rank of its inputs: Haiku's arrays have this rank.
      feature_axis: axis of the features in the inputs.
      debias: of the batch norm. With it the counter says how many batches "weight" stands for; without it the counter
        is set to where the correction has vanished.

    Returns:
      params {name: {"scale", "offset"}} and state {name/~/mean_ema: {"counter", "hidden", "average"}, ...}.
    """
    mean, var = running_moments(_checked(variables, "the batch norm", flat=True)["batch_stats"], debias=debias)
    missing = float(1 - np.max(variables["batch_stats"]["weight"])) if debias else 0.0
    counter = round(math.log(max(missing, _SETTLED)) / math.log(decay)) if decay else 1
    shape = [1] * ndim
    shape[feature_axis] = -1
    params, ours = variables.get("params", {}), {"scale": "scale", "bias": "offset"}
    given = {theirs: _owned(params[key]).reshape(shape) for key, theirs in ours.items() if key in params}
    averages = {key: _owned(value).reshape(shape) for key, value in (("mean", mean), ("var", var))}
    state = {f"{name}/~/{key}_ema": _moving_average(value, decay, counter) for key, value in averages.items()}
    return ({name: given} if given else {}), state


def from_nnx(state: Mapping[str, Any]) -> Variables:
    """Variables of one nnx BatchNorm from its pure dict, where "scale", "bias", "mean", "var" lie side by side."""
    values = {name: jnp.asarray(value) for name, value in state.items() if value is not None}
    params: dict[str, jax.Array] = {name: values.pop(name) for name in ("scale", "bias") if name in values}
    return _checked({"params": params, "batch_stats": values}, "the nnx layer")


def to_nnx(variables: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The pure dict of one nnx BatchNorm, for `nnx.replace_by_pure_dict`."""
    _checked(variables, "the batch norm")
    return {**variables.get("params", {}), **variables["batch_stats"]}


def arguments_from_torch(*, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True) -> dict[str, Any]:
    """Arguments for `batch_norm` that do what a torch BatchNorm1d, 2d or 3d with these does; momentum is 1 - decay."""
    decay = None if momentum is None else _complement(momentum)
    arguments = dict(decay=decay, epsilon=eps, feature_axis=1, unbiased=True)
    return arguments | dict(use_scale=affine, use_bias=affine)


def arguments_to_torch(**arguments: Any) -> dict[str, Any]:
    """eps, momentum and affine for torch, from arguments of `batch_norm`; ValueError for what torch does not have.

    What is left out has `batch_norm`'s default. torch always keeps the unbiased variance, and the features along axis
    1.
    """
    given = _only(arguments, "torch", ("decay", "epsilon", "feature_axis", "unbiased", "use_scale", "use_bias"))
    decay = given["decay"]
    momentum = None if decay is None else _complement(decay)
    return dict(eps=given["epsilon"], momentum=momentum, affine=given["use_scale"] or given["use_bias"])


def arguments_from_keras(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for `batch_norm` that do what Keras's BatchNormalization does, from its `get_config()`."""
    names = {
        "momentum": "decay",
        "epsilon": "epsilon",
        "axis": "feature_axis",
        "scale": "use_scale",
        "center": "use_bias",
    }
    defaults = {"momentum": 0.99, "epsilon": 1e-3, "axis": -1, "scale": True, "center": True}
    if config.get("renorm"):
        raise ValueError("renorm=True is batch renormalization; convert its variables alone.")
    return {ours: config.get(theirs, defaults[theirs]) for theirs, ours in names.items()}


def arguments_to_keras(**arguments: Any) -> dict[str, Any]:
    """momentum, epsilon, axis, scale and center for Keras; ValueError for what Keras does not have."""
    given = _only(arguments, "Keras", ("decay", "epsilon", "feature_axis", "use_scale", "use_bias"))
    names = {
        "momentum": "decay",
        "epsilon": "epsilon",
        "axis": "feature_axis",
        "scale": "use_scale",
        "center": "use_bias",
    }
    return {theirs: given[ours] for theirs, ours in names.items()}


def arguments_from_haiku(
    *,
    create_scale: bool,
    create_offset: bool,
    decay_rate: float,
    eps: float = 1e-5,
    data_format: str = "channels_last",
    cross_replica_axis: Any = None,
) -> dict[str, Any]:
    """Arguments for `batch_norm` that do what `hk.BatchNorm` with these does."""
    feature_axis = 1 if data_format in ("channels_first", "NCHW") or data_format.startswith("NC") else -1
    arguments = dict(decay=decay_rate, epsilon=eps, feature_axis=feature_axis, axis_name=cross_replica_axis)
    return arguments | dict(use_scale=create_scale, use_bias=create_offset, debias=True)


def arguments_to_haiku(**arguments: Any) -> dict[str, Any]:
    """create_scale, create_offset, decay_rate, eps, ... for `hk.BatchNorm`; ValueError for what Haiku does not have."""
    names = ("decay", "epsilon", "feature_axis", "axis_name", "use_scale", "use_bias", "debias")
    given = _only(arguments, "Haiku", names)
    if given["decay"] is None or given["feature_axis"] not in (1, -1):
        raise ValueError("Haiku averages exponentially, and has its features along axis 1 or the last.")
    data_format = "channels_last" if given["feature_axis"] == -1 else "channels_first"
    affine = dict(create_scale=given["use_scale"], create_offset=given["use_bias"])
    moving = dict(decay_rate=given["decay"], eps=given["epsilon"], cross_replica_axis=given["axis_name"])
    return affine | moving | dict(data_format=data_format)


def arguments_from_flax(**arguments: Any) -> dict[str, Any]:
    """Arguments for `batch_norm` from those of Flax's BatchNorm: momentum is decay, axis is feature_axis.

    Flags about how Flax computes, and use_running_average, which is an argument of `apply`, are left out.
    """
    for name in ("use_running_average", "use_fast_variance", "force_float32_reductions", "name", "parent"):
        arguments.pop(name, None)
    renamed = {"momentum": "decay", "axis": "feature_axis"}
    return {renamed.get(name, name): value for name, value in arguments.items()}


def arguments_to_flax(**arguments: Any) -> dict[str, Any]:
    """Arguments for Flax's BatchNorm from those of `batch_norm`; ValueError for what Flax does not have."""
    scope = ("feature_axis", "axis_name", "axis_index_groups")
    affine = ("use_scale", "use_bias", "scale_init", "bias_init", "dtype", "param_dtype")
    given = _only(arguments, "Flax", ("decay", "epsilon", *scope, *affine))
    renamed = {"decay": "momentum", "feature_axis": "axis"}
    return {renamed.get(name, name): value for name, value in given.items() if name in arguments}


def _only(arguments, package, names) -> dict[str, Any]:
    """All arguments of `batch_norm`; ValueError where one has no counterpart and is not left at its default."""
    # Neither of the further two changes what is computed from finite batches of more than one value.
    known = (*names, "skip_nonfinite", "allow_single_value")
    unknown = arguments.keys() - _DEFAULTS.keys()
    if unknown:
        raise TypeError(f"batch_norm has no arguments {sorted(unknown)}.")
    lost = [name for name, value in arguments.items() if name not in known and value != _DEFAULTS[name]]
    if lost:
        raise ValueError(f"{package} has nothing for {', '.join(f'{name}={arguments[name]!r}' for name in lost)}.")
    return _DEFAULTS | arguments


def _checked(variables: V, layer: str, flat: bool = False) -> V:
    """The variables, if they are those of one batch norm; a ValueError says what is wrong with the layer."""
    held = {name: variables.get(name, {}) for name in AFFINE_NAMES}
    more = sorted(name for kind, names in AFFINE_NAMES.items() for name in held[kind] if name not in names)
    missing = [name for name in ("mean", "var") if name not in held["batch_stats"]]
    if more or missing:
        found = {kind: sorted(values) for kind, values in held.items()}
        raise ValueError(f"{layer} has {found}; expected the params and batch_stats of a batch norm.")
    shapes = {name: np.shape(v) for values in held.values() for name, v in values.items() if name in _SAME_SHAPE}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"{layer} has arrays of shapes {shapes}; expected one shape, that of its features.")
    if flat and len(shapes["mean"]) != 1:
        raise ValueError(f"{layer} has arrays of shapes {shapes}; expected flat vectors of [features].")
    var = held["batch_stats"]["var"]
    lowest = 0 if isinstance(var, jax.core.Tracer) else np.min(np.asarray(var), initial=0)
    if lowest < 0:
        raise ValueError(f"{layer} has a variance of {lowest:g}; expected none below 0: the file may be damaged.")
    return variables


def _complement(share):
    """1 - share, with the digits that the subtraction invents taken off, so that going there and back is exact."""
    return round(1 - share, 12)


def _moving_average(average, decay, counter):
    hidden = (average * (1 - decay**counter)).astype(average.dtype)
    return {"counter": np.asarray(counter, np.int32), "hidden": hidden, "average": average}


def _array(value) -> jax.Array:
    """A copy of any package's tensor; numpy knows no torch tensor that needs a gradient, nor torch's bfloat16."""
    if not hasattr(value, "detach"):
        return jnp.array(np.asarray(value))
    value = value.detach().cpu()
    if str(value.dtype) == "torch.bfloat16":
        return jnp.array(value.float().numpy(), jnp.bfloat16)
    return jnp.array(value.numpy())


def _owned(value) -> np.ndarray:
    # JAX lends numpy its memory read-only, about which torch warns.
    return np.array(value)


def _at(tree, path):
    for name in path.split("/"):
        tree = tree.get(name, {})
    return tree


def _safetensors():
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("reading and writing safetensors files needs the package: pip install safetensors") from error
    return safetensors.numpy
