"""A batch-normalized LSTM as pure functions, one time step a call."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._affine import Initializer
from jaxbn._axis_group import varying_axes
from jaxbn._factory import Made, normalizer_factory
from jaxbn._inputs import inexact, stats_dtype
from jaxbn.variants._recurrent import recurrent_batch_norm


class _Functions(NamedTuple):
    init: Callable[..., dict]
    initial_carry: Callable[..., "LSTMCarry"]
    apply: Callable[..., tuple["LSTMCarry", jax.Array, dict]]


@jax.tree_util.register_static
class RecurrentCell(Made, _Functions):
    """A recurrent cell with running statistics, for `lax.scan`; two made with equal hyperparameters are equal.

    Attributes:
      init: init(key, x) -> {"params", "batch_stats"}; x is [batch, inputs], an array or a ShapeDtypeStruct.
      initial_carry: initial_carry(x) -> carry at the first step, zeros; x as for `init`. Inside shard_map pass the
        array itself, so that the carry varies over the mesh axes over which x does.
      apply: apply(variables, carry, x, *, train, where=None) -> (carry, y, batch_stats). `where` is boolean [batch]:
        False marks padding, which neither counts in the statistics nor moves the carry.
    """


class LSTMCarry(NamedTuple):
    """Where a sequence stands: hidden [batch, features], cell [batch, features], float32 at least, step int32 []."""

    hidden: jax.Array
    cell: jax.Array
    step: jax.Array


@normalizer_factory(options_of=recurrent_batch_norm)
def batch_norm_lstm(
    features: int,
    max_length: int,
    *,
    kernel_init: Initializer = jax.nn.initializers.orthogonal(),  # noqa: B008
    recurrent_init: Initializer = jax.nn.initializers.orthogonal(),  # noqa: B008
    bias_init: Initializer = jax.nn.initializers.zeros,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    **options: Any,
) -> RecurrentCell:
    """BN-LSTM (Cooijmans et al. 2016, equations 6 to 8).

        f, i, o, g = split(BN(h @ recurrent_kernel) + BN(x @ input_kernel) + bias)
        cell = sigmoid(f) * cell + sigmoid(i) * tanh(g)          h = sigmoid(o) * tanh(BN(cell))

    Each BN has its own scale, which starts at 0.1, and statistics per time step; that of the cell a bias too.

    Args:
      features: of the hidden state.
      max_length: time steps to keep statistics for.
      kernel_init: of the input kernel, orthogonal, as in the paper.
      recurrent_init: of the recurrent kernel, orthogonal; the paper's sequential MNIST takes the identity.
      bias_init: of the gates' bias, zeros.
      param_dtype: of kernels, scales and biases.
      **options: of `batch_norm`, for all three: decay, epsilon, axis_name, ...

    Returns:
      A RecurrentCell with params {"input": {"kernel", "scale"}, "recurrent": {"kernel", "scale"}, "cell": {"scale",
      "bias"}, "bias"} and batch_stats {"input", "recurrent", "cell"}, each as of `recurrent_batch_norm`.

    Raises:
      ValueError: features or max_length below 1; as `batch_norm`; and from apply, x that is not [batch, inputs].
    """
    if features < 1:
        raise ValueError(f"features={features}; expected at least 1.")
    options = dict(param_dtype=param_dtype) | options
    without_bias = recurrent_batch_norm(max_length, use_bias=False, **options)
    norms = {"input": without_bias, "recurrent": without_bias, "cell": recurrent_batch_norm(max_length, **options)}

    def init(key, x):
        _check(x)
        *keys, input_key, recurrent_key, bias_key = jax.random.split(key, len(norms) + 3)
        wide = {name: jax.ShapeDtypeStruct((x.shape[0], n), x.dtype) for name, n in _sizes().items()}
        started = {name: norms[name].init(k, wide[name]) for name, k in zip(norms, keys, strict=True)}
        params: dict[str, Any] = {name: dict(variables["params"]) for name, variables in started.items()}
        params["input"]["kernel"] = kernel_init(input_key, (x.shape[-1], 4 * features), param_dtype)
        params["recurrent"]["kernel"] = recurrent_init(recurrent_key, (features, 4 * features), param_dtype)
        params["bias"] = bias_init(bias_key, (4 * features,), param_dtype)
        return {"params": params, "batch_stats": {name: v["batch_stats"] for name, v in started.items()}}

    def initial_carry(x):
        hidden = jnp.zeros((x.shape[0], features), x.dtype)
        # Inside shard_map the initial carry has to vary over the same mesh axes as the carries that follow it.
        axes = tuple(varying_axes(x)) if isinstance(x, jax.Array) else ()
        hidden = jax.lax.pcast(hidden, axes, to="varying") if axes else hidden
        return LSTMCarry(hidden, hidden.astype(stats_dtype(x)), jnp.zeros((), jnp.int32))

    def apply(variables, carry, x, *, train, where=None):
        x = inexact(x)
        _check(x)
        params, moved = variables["params"], {}
        mask = None if where is None else where[:, None]
        # A NaN in the padding, times the cotangent 0, would be NaN in the gradient of the kernel.
        x = x if mask is None else jnp.where(mask, x, 0)

        def normalized(name, v):
            own = {n: value for n, value in params[name].items() if n != "kernel"}
            here = {"params": own, "batch_stats": variables["batch_stats"][name]}
            y, moved[name] = norms[name].apply(here, v, train=train, step=carry.step, where=mask)
            return y

        recurrent = normalized("recurrent", carry.hidden @ params["recurrent"]["kernel"].astype(x.dtype))
        gates = recurrent + normalized("input", x @ params["input"]["kernel"].astype(x.dtype))
        forget, enter, out, value = jnp.split(gates.astype(carry.cell.dtype) + params["bias"][None], 4, axis=-1)
        cell = jax.nn.sigmoid(forget) * carry.cell + jax.nn.sigmoid(enter) * jnp.tanh(value)
        hidden = (jax.nn.sigmoid(out) * jnp.tanh(normalized("cell", cell))).astype(x.dtype)
        if mask is not None:
            hidden, cell = jnp.where(mask, hidden, carry.hidden), jnp.where(mask, cell, carry.cell)
        return LSTMCarry(hidden, cell, carry.step + 1), hidden, moved

    def _sizes():
        return {"input": 4 * features, "recurrent": 4 * features, "cell": features}

    return RecurrentCell(init, initial_carry, apply)


def _check(x):
    if len(x.shape) != 2:
        raise ValueError(f"x has shape {x.shape}; the cell takes one time step at a time: [batch, inputs].")
