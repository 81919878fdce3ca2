"""torch's batch norm as a subject: computed by torch on the host, called back from JAX, with torch's own gradient."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._normalizer import Normalizer
from jaxbn.testing.subject import Subject

_NO_MODES = "called back on the host"


def torch_subject(module: Any, **options: Any) -> Subject | None:
    """Subject of a class of torch's batch norm modules, or None for anything else."""
    import torch

    made = module.func if isinstance(module, functools.partial) else module
    if not (inspect.isclass(made) and issubclass(made, torch.nn.modules.batchnorm._BatchNorm)):
        return None
    layer = module(options.get("features", 2))
    settings = dict(momentum=layer.momentum, eps=layer.eps)

    def init(key, x):
        del key
        shape = (x.shape[-1],)
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        ones, zeros = jnp.ones(shape, dtype), jnp.zeros(shape, dtype)
        return {"params": {"weight": ones, "bias": zeros}, "batch_stats": {"mean": zeros, "var": ones}}

    def apply(variables, x, *, train):
        params, stats = variables["params"], variables["batch_stats"]
        run = functools.partial(_normalize, settings=tuple(settings.items()), train=train)
        y, mean, var = run(x, params["weight"], params["bias"], stats["mean"], stats["var"])
        return y, {"mean": mean, "var": var} if train else stats

    decay = None if layer.momentum is None else 1 - layer.momentum
    found = {"name": made.__name__, "epsilon": layer.eps, "decay": decay, "unbiased": True}
    lacks = {"forward mode": _NO_MODES, "shards": _NO_MODES}
    return Subject(Normalizer(init, apply), **found | {"lacks": lacks} | options)


def _normalize(x, weight, bias, mean, var, *, settings, train):
    return _callback(settings, train, x, weight, bias, mean, var)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _callback(settings, train, x, weight, bias, mean, var):
    shapes = tuple(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in (x, mean, var))
    return jax.pure_callback(functools.partial(_forward, settings, train), shapes, x, weight, bias, mean, var)


def _callback_forward(settings, train, *arguments):
    return _callback(settings, train, *arguments), arguments


def _callback_backward(settings, train, arguments, cotangents):
    shapes = tuple(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in arguments[:3])
    gradient = functools.partial(_backward, settings, train)
    gradients = jax.pure_callback(gradient, shapes, *arguments, cotangents[0])
    return *gradients, jnp.zeros_like(arguments[3]), jnp.zeros_like(arguments[4])


_callback.defvjp(_callback_forward, _callback_backward)


def _forward(settings, train, *arguments):
    y, mean, var = _run(settings, train, *map(_tensor, arguments))
    return tuple(_array(v, like) for v, like in zip((y, mean, var), (arguments[0], *arguments[3:]), strict=True))


def _backward(settings, train, x, weight, bias, mean, var, dy):
    import torch

    leaves = [_tensor(v).requires_grad_() for v in (x, weight, bias)]
    y, _, _ = _run(settings, train, *leaves, _tensor(mean), _tensor(var))
    gradients = torch.autograd.grad(y, leaves, _tensor(dy))
    return tuple(_array(g, like) for g, like in zip(gradients, (x, weight, bias), strict=True))


def _run(settings, train, x, weight, bias, mean, var):
    import torch

    mean, var = mean.clone(), var.clone()
    channels_first = torch.movedim(x, -1, 1)
    y = torch.nn.functional.batch_norm(channels_first, mean, var, weight, bias, training=train, **dict(settings))
    return torch.movedim(y, 1, -1), mean, var


def _tensor(v):
    import torch

    v = np.asarray(v)
    if v.dtype == jnp.bfloat16:
        return torch.tensor(v.astype(np.float32)).bfloat16()
    return torch.tensor(v)


def _array(v, like):
    v = v.detach()
    v = v.float() if str(v.dtype) == "torch.bfloat16" else v
    return np.asarray(v.numpy(), like.dtype)
