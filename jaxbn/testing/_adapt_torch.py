"""torch's modules as subjects: computed by torch on the host, called back from JAX, with torch's own gradient."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._normalizer import Normalizer
from jaxbn.testing._calls import fill
from jaxbn.testing._signatures import defaults, name_of, unwrapped
from jaxbn.testing._subject import Subject

_NO_TRANSFORMS = "torch is called back on the host"
# {one of (params, batch_stats): {name: array}} as torch names them.
Arrays = dict[str, Any]


def torch(module: Any, **options: Any) -> Subject | None:
    """The subject of a class of torch modules, or of a partial of one; None for anything else.

    Inputs are given to it features first, as torch has them, but for the layers that normalize the last axes.
    """
    import torch as pytorch

    kind = unwrapped(module)
    if not (inspect.isclass(kind) and issubclass(kind, pytorch.nn.Module)):
        return None
    layer = module(**fill(module, options.get("features", 2)))
    host = _Host(layer)

    def init(key, x):
        del key
        wide = jnp.promote_types(x.dtype, jnp.float32)
        params = {name: jnp.asarray(v.detach().numpy(), wide) for name, v in layer.named_parameters()}
        batch_stats = {name: _initial(v.numpy(), wide) for name, v in layer.named_buffers()}
        return {"params": params, "batch_stats": batch_stats}

    def apply(variables, x, *, train):
        return host.call(train, variables["params"], variables["batch_stats"], x)

    stated = defaults(module)
    momentum = stated.get("momentum")
    found: dict[str, Any] = {
        "name": name_of(module),
        "epsilon": getattr(layer, "eps", None),
        "decay": None if momentum is None else 1 - momentum,
        "unbiased": True,
        "lacks": {"forward mode": _NO_TRANSFORMS, "shards": _NO_TRANSFORMS},
    }
    if "momentum" in stated and momentum is None:
        found["rule"] = "cumulative"
    return Subject(Normalizer(init, apply), **found | options)


def _initial(v: np.ndarray, wide: Any) -> jax.Array:
    # Counters are int64 in torch, which JAX has only where asked to.
    return jnp.asarray(v, wide if np.issubdtype(v.dtype, np.floating) else jnp.int32)


class _Host:
    """One torch module as a differentiable JAX function (train, params, batch_stats, x) -> (y, batch_stats)."""

    def __init__(self, layer: Any):
        self.layer = layer
        self.call = jax.custom_vjp(self._call, nondiff_argnums=(0,))
        self.call.defvjp(self._call_forward, self._call_backward)

    def _call(self, train: bool, params: Arrays, batch_stats: Arrays, x: jax.Array) -> tuple[jax.Array, Arrays]:
        self._check(train, x.shape)
        shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), (x, batch_stats))
        return jax.pure_callback(functools.partial(self._forward, train), shapes, params, batch_stats, x)

    def _check(self, train: bool, shape: tuple[int, ...]) -> None:
        """Raise here, while JAX traces, what torch raises for inputs of that shape: from a callback it is a crash."""
        params, buffers = dict(self.layer.named_parameters()), dict(self.layer.named_buffers())
        self._run(train, params, buffers, _tensor(np.zeros(shape, np.float32)))

    def _call_forward(self, train, params, batch_stats, x):
        return self._call(train, params, batch_stats, x), (params, batch_stats, x)

    def _call_backward(self, train, saved, cotangents):
        params, batch_stats, x = saved
        shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), (params, x))
        backward = functools.partial(self._backward, train)
        dparams, dx = jax.pure_callback(backward, shapes, params, batch_stats, x, cotangents[0])
        # Buffers get no gradient in torch. The zero of an integer is of type float0.
        return dparams, jax.tree.map(_no_gradient, batch_stats), dx

    def _forward(self, train, params, batch_stats, x):
        tensors = jax.tree.map(_tensor, (params, batch_stats, x))
        y, moved = self._run(train, *tensors)
        return _array(y, x), {name: _array(v, batch_stats[name]) for name, v in moved.items()}

    def _backward(self, train, params, batch_stats, x, dy):
        import torch as pytorch

        leaves = {name: _tensor(v).requires_grad_() for name, v in params.items()}
        inputs = _tensor(x).requires_grad_()
        y, _ = self._run(train, leaves, jax.tree.map(_tensor, batch_stats), inputs)
        dx, *dparams = pytorch.autograd.grad(y, [inputs, *leaves.values()], _tensor(dy))
        return {name: _array(g, params[name]) for name, g in zip(leaves, dparams, strict=True)}, _array(dx, x)

    def _run(self, train, params, batch_stats, x):
        import torch as pytorch

        moved = {name: v.clone() for name, v in batch_stats.items()}
        self.layer.train(train)
        to_torch, from_torch = _layout(self.layer, x.shape)
        y = pytorch.func.functional_call(self.layer, {**params, **moved}, (to_torch(x),))
        return from_torch(y), moved


def _layout(layer: Any, shape: tuple[int, ...]) -> tuple[Callable, Callable]:
    """Functions from [batch, ..., features] to the layout that the layer takes, and back."""
    import torch as pytorch

    last = (pytorch.nn.LayerNorm, pytorch.nn.RMSNorm)
    if isinstance(layer, last):
        return (lambda x: x), (lambda y: y)
    name = type(layer).__name__
    spatial = int(name[-2]) if name[-2:] in ("1d", "2d", "3d") else None
    batch, *positions, features = shape
    first = (batch, features, *positions)
    if spatial is None or spatial == len(positions):
        middle = first
    elif spatial == 1:
        middle = (batch, features, int(np.prod(positions)))
    else:
        middle = (batch, features, *positions, *[1] * (spatial - len(positions)))
    return (
        lambda x: pytorch.movedim(x, -1, 1).reshape(middle),
        lambda y: pytorch.movedim(y.reshape(first), 1, -1),
    )


def _no_gradient(v):
    return jnp.zeros_like(v) if jnp.issubdtype(v.dtype, jnp.floating) else np.zeros(v.shape, jax.dtypes.float0)


def _tensor(v):
    import torch as pytorch

    v = np.array(v)
    if v.dtype == jnp.bfloat16:
        return pytorch.tensor(v.astype(np.float32)).bfloat16()
    return pytorch.tensor(v)


def _array(v, like):
    v = v.detach()
    v = v.float() if str(v.dtype) == "torch.bfloat16" else v
    return np.asarray(v.numpy(), like.dtype)
