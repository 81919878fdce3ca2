"""The libraries that are compared. Those of JAX give their layer as a Normalizer, so that one network runs with each.

All have a decay of 0.99, scale and bias, float32 parameters and statistics, and put out the dtype of their input.
"""

import importlib.util
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import jaxbn

Activation = Callable[[jax.Array], jax.Array]

DECAY = 0.99


def linen(*, axis_name: str | None = None, exact: bool = False) -> jaxbn.Normalizer:
    """Flax's layer, its variance the mean of squares minus the squared mean, or of squared deviations (exact)."""
    layer = nn.BatchNorm(momentum=DECAY, axis_name=axis_name, use_fast_variance=not exact)

    def init(key, x):
        variables = layer.clone(axis_name=None).init(key, jnp.zeros(x.shape, x.dtype), use_running_average=True)
        return {"params": variables["params"], "batch_stats": variables["batch_stats"]}

    def apply(variables, x, *, train):
        y, moved = layer.apply(variables, x, use_running_average=not train, mutable=["batch_stats"])
        return y.astype(x.dtype), moved["batch_stats"]

    return jaxbn.Normalizer(init, apply)


def flax_nnx() -> jaxbn.Normalizer:
    """The layer of nnx, split into what is trained and what is not."""

    def layer(features):
        return nnx.BatchNorm(features, momentum=DECAY, rngs=nnx.Rngs(0))

    def init(key, x):
        del key
        module = layer(x.shape[-1])
        return {"params": nnx.state(module, nnx.Param), "batch_stats": nnx.state(module, nnx.BatchStat)}

    def apply(variables, x, *, train):
        graph = nnx.graphdef(nnx.eval_shape(partial(layer, x.shape[-1])))
        module = nnx.merge(graph, variables["params"], variables["batch_stats"], copy=True)
        y = module(x, use_running_average=not train)
        return y.astype(x.dtype), nnx.state(module, nnx.BatchStat)

    return jaxbn.Normalizer(init, apply)


def haiku() -> jaxbn.Normalizer:
    """Haiku's layer, with scale and offset, as functions."""
    import haiku as hk

    layer = hk.transform_with_state(lambda x, train: hk.BatchNorm(True, True, DECAY)(x, is_training=train))

    def init(key, x):
        params, state = layer.init(key, jnp.zeros(x.shape), True)
        return {"params": params, "batch_stats": state}

    def apply(variables, x, *, train):
        y, state = layer.apply(variables["params"], variables["batch_stats"], None, x, train)
        return y.astype(x.dtype), state

    return jaxbn.Normalizer(init, apply)


def equinox() -> jaxbn.Normalizer:
    """Equinox's layer, which sees one vector of features: vmapped over examples and pixels, all named."""
    import equinox as eqx

    def make(ndim, features):
        names = tuple(f"axis{number}" for number in range(ndim - 1))
        return eqx.nn.make_with_state(eqx.nn.BatchNorm)(features, names, mode="batch", momentum=DECAY), names

    def init(key, x):
        del key
        (layer, state), _ = make(len(x.shape), x.shape[-1])
        return {"params": eqx.filter(layer, eqx.is_inexact_array), "batch_stats": state}

    def apply(variables, x, *, train):
        (layer, _), names = make(x.ndim, x.shape[-1])
        layer = eqx.combine(variables["params"], eqx.nn.inference_mode(layer, not train))
        for name in reversed(names):
            layer = jax.vmap(layer, axis_name=name, in_axes=(0, None), out_axes=(0, None))
        y, state = layer(x, variables["batch_stats"])
        return y.astype(x.dtype), state

    return jaxbn.Normalizer(init, apply)


def followed_by(norm: jaxbn.Normalizer, activation: Activation | None) -> jaxbn.Normalizer:
    """The norm, then the activation."""
    if activation is None:
        return norm

    def apply(variables, x, *, train):
        y, batch_stats = norm.apply(variables, x, train=train)
        return activation(y), batch_stats

    return jaxbn.Normalizer(norm.init, apply)


OURS, FUSED, LINEN = "jaxbn", "jaxbn, fused", "flax.linen"
# Our layer and Flax's, each with a relu.
WITH_RELU: dict[str, Callable[[], jaxbn.Normalizer]] = {
    OURS: lambda: followed_by(jaxbn.batch_norm(), jax.nn.relu),
    "jaxbn, relu fused": lambda: jaxbn.batch_norm(activation=jax.nn.relu),
    LINEN: lambda: followed_by(linen(), jax.nn.relu),
}
# The package that has to be installed, and the layer.
PEERS: dict[str, tuple[str, Callable[[], jaxbn.Normalizer]]] = {
    LINEN: ("flax", linen),
    "flax.linen, exact variance": ("flax", partial(linen, exact=True)),
    "flax.nnx": ("flax", flax_nnx),
    "haiku": ("haiku", haiku),
    "equinox": ("equinox", equinox),
}


def installed() -> dict[str, jaxbn.Normalizer]:
    """The layer of each of the PEERS whose package is here."""
    return {name: make() for name, (package, make) in PEERS.items() if importlib.util.find_spec(package)}


def torch_layouts(shape: tuple[int, ...]) -> dict[str, bool]:
    """By name, whether channels come last in memory: for images both, else the first; none where torch is missing."""
    if not importlib.util.find_spec("torch"):
        return {}
    return {"torch NCHW": False} | ({"torch NHWC": True} if len(shape) == 4 else {})
