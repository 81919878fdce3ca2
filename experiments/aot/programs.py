"""The programs whose cost is counted: one layer, a chain of convolutions, a ResNet's train step.

Each is compiled for a mesh with one axis, "data", over which statistics are shared (`shard_map`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from experiments.bench.peers import Activation, followed_by, linen
from experiments.training import conv_chain
from experiments.training.models import Network
from experiments.training.resnet import resnet
from jaxbn import training

# Of one device: 103 MB of float32, twice what an H100 caches (where reading again seems cheap, XLA fuses less).
LAYER = (32, 56, 56, 256)
CHAIN = (128, 56, 56, 64)
CHAIN_LENGTH = 6
LOOP = (32, 56, 56, 128)  # fewer channels a TPU pads
IMAGES_PER_CHIP = 32
IMAGE = (224, 224, 3)

Arm = Callable[[str | None, Activation | None], jaxbn.Normalizer]  # of an axis name and an activation that follows


def masked(norm: jaxbn.Normalizer) -> jaxbn.Normalizer:
    """A norm for which every eighth example is padding."""

    def apply(variables: dict, x: jax.Array, **options: Any) -> tuple[jax.Array, dict]:
        counts = jnp.arange(x.shape[0]) % 8 > 0
        return norm.apply(variables, x, where=counts.reshape(-1, *(1,) * (x.ndim - 1)), **options)

    return norm._replace(apply=apply)


ARMS: dict[str, Arm] = {
    "none": lambda axis_name, activation: followed_by(jaxbn.identity(), activation),
    "jaxbn": lambda axis_name, activation: followed_by(jaxbn.batch_norm(axis_name=axis_name), activation),
    "jaxbn, fused": lambda axis_name, activation: jaxbn.batch_norm(axis_name=axis_name, activation=activation),
    "jaxbn, masked": lambda axis_name, activation: masked(jaxbn.batch_norm(axis_name=axis_name, activation=activation)),
    "flax": lambda axis_name, activation: followed_by(linen(axis_name=axis_name), activation),
    "flax, exact variance": lambda axis_name, activation: followed_by(
        linen(axis_name=axis_name, exact=True), activation
    ),
}


def compile_layer(
    norm: jaxbn.Normalizer, mesh: Mesh, *, output: bool, shape: tuple[int, ...] = LAYER
) -> jax.stages.Compiled:
    """One layer, forward and backward: gradients of <y, dy> by x and parameters, and the running statistics.

    Args:
      norm: whose y = norm(x).
      mesh: with one axis, "data".
      output: whether y is wanted too, as by a layer above.
      shape: of x and of dy on one device, float32.
    """
    variables = norm.init(jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))

    def layer(params: Any, x: jax.Array, dy: jax.Array) -> tuple:
        def forward(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
            return norm.apply({**variables, "params": params}, x, train=True)

        y, backward, batch_stats = jax.vjp(forward, params, x, has_aux=True)
        return backward(dy), batch_stats, y if output else None

    sharded = jax.shard_map(
        layer, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=((P(), P("data")), P(), P("data"))
    )
    x = _sharded(shape, mesh)
    return jax.jit(sharded).lower(_whole(variables["params"], mesh), x, x).compile()


def compile_chain(norm: jaxbn.Normalizer, mesh: Mesh, shape: tuple[int, ...] = CHAIN) -> jax.stages.Compiled:
    """Six times a 3 x 3 convolution and the norm with its activation; gradients of <y, dy> by x and parameters.

    Args:
      norm: follows each convolution.
      mesh: with one axis, "data".
      shape: of x, dy and each activation on one device, float32.
    """
    gradient = conv_chain.gradient_of(partial(conv_chain.written_out, norm))
    sharded = jax.shard_map(
        gradient, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=((P("data"), P()), P())
    )
    x = _sharded(shape, mesh)
    units = [conv_chain.unit_shapes(norm, shape)] * CHAIN_LENGTH
    return jax.jit(sharded).lower(x, _whole(units, mesh), x).compile()


def compile_loop(
    chain: conv_chain.Chain, norm: jaxbn.Normalizer, mesh: Mesh, shape: tuple[int, ...] = LOOP
) -> jax.stages.Compiled:
    """Gradients of a chain of `experiments.training.conv_chain`, the same on every device.

    Args:
      chain: chain(norm, x, units) -> (y, moved statistics).
      norm: of its units.
      mesh: whose devices take the whole batch each.
      shape: of an activation, float32.
    """
    x, units = _whole(conv_chain.arguments(norm, shape), mesh)
    return conv_chain.compile_gradient(partial(chain, norm), x, units)


def compile_step(
    norm: jaxbn.Normalizer, mesh: Mesh, parallel: str = "shard_map", depth: int = 50, image: tuple[int, ...] = IMAGE
) -> jax.stages.Compiled:
    """A train step of a ResNet, bfloat16 activations, momentum SGD: "jit" or "shard_map"."""
    step, arguments = train_step(norm, mesh, parallel, depth, image)
    return step.lower(*arguments).compile()


def train_step(
    norm: jaxbn.Normalizer, mesh: Mesh, parallel: str, depth: int, image: tuple[int, ...]
) -> tuple[training.Step, tuple]:
    """The step that `compile_step` compiles, and the shapes of its arguments."""
    network = resnet(depth, norm, dtype=jnp.bfloat16)
    optimizer = optax.sgd(0.1, momentum=0.9)
    build = training.jit_step if parallel == "jit" else training.shard_map_step
    batch = {
        "image": _sharded((IMAGES_PER_CHIP, *image), mesh, jnp.bfloat16),
        "label": _sharded((IMAGES_PER_CHIP,), mesh, jnp.int32),
    }

    def start(key: jax.Array) -> training.TrainState:
        variables = network.init(key, jax.ShapeDtypeStruct((2, *image), jnp.bfloat16))
        return training.init_state(variables, optimizer)

    state = _whole(jax.eval_shape(start, jax.random.key(0)), mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return build(loss_of(network), optimizer, mesh=mesh), (state, batch, key)


def loss_of(network: Network) -> Callable[[dict, dict, jax.Array], training.LossOutput]:
    """Cross-entropy of the labels."""

    def loss(variables: dict, batch: dict, rng: jax.Array) -> training.LossOutput:
        del rng
        logits, batch_stats = network.apply(variables, batch["image"], train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return training.LossOutput(jnp.sum(losses), losses.size, batch_stats)

    return loss


def _sharded(shape: tuple[int, ...], mesh: Mesh, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.ShapeDtypeStruct:
    """An array of which each device holds `shape`."""
    return jax.ShapeDtypeStruct((mesh.size * shape[0], *shape[1:]), dtype, sharding=NamedSharding(mesh, P("data")))


def _whole(tree: Any, mesh: Mesh) -> Any:
    """Arrays of which each device holds all."""
    place = partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, P()))
    return jax.tree.map(lambda leaf: place(leaf.shape, leaf.dtype), tree)
