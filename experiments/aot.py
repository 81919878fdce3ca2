"""What a ResNet-50 train step costs on many TPU chips, compiled ahead of time on a machine without one.

    python -m experiments bench --aot v5e:16x16

compiles it for 256 chips with jaxbn, with Flax's BatchNorm and without normalization, and prints what each sends,
reads, writes and keeps. Needs the package libtpu; no TPU. Each compilation takes minutes.
"""

import contextlib
import os
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from experiments.collectives import collectives
from experiments.errors import UserError
from experiments.models import Network
from experiments.resnet import resnet
from jaxbn import training

IMAGES_PER_CHIP = 32
IMAGE = (224, 224, 3)
GIB = 2**30


class Cost(NamedTuple):
    """What one chip does in one step, from the compiled program.

    Attributes:
      all_reduces: on the path that normally runs.
      rare: all-reduces in loops that run where statistics are badly conditioned.
      payload: bytes of the results of `all_reduces`, parameters' gradients included.
      accessed: bytes read and written, as XLA counts them, rare loops included once.
      temporary: bytes of buffers that live during the step only.
    """

    all_reduces: int
    rare: int
    payload: int
    accessed: float
    temporary: int


def flax_batch_norm(*, axis_name: str | None, exact: bool = False) -> jaxbn.Normalizer:
    """Flax's layer, its variance the mean of squares minus the squared mean, or of deviations (exact)."""
    layer = nn.BatchNorm(momentum=0.99, axis_name=axis_name, use_fast_variance=not exact)

    def init(key, x):
        variables = layer.clone(axis_name=None).init(key, jnp.zeros(x.shape, x.dtype), use_running_average=True)
        return {"params": variables["params"], "batch_stats": variables["batch_stats"]}

    def apply(variables, x, *, train):
        y, moved = layer.apply(variables, x, use_running_average=not train, mutable=["batch_stats"])
        return y.astype(x.dtype), moved["batch_stats"]

    return jaxbn.Normalizer(init, apply)


ARMS: dict[str, Callable[[str | None], jaxbn.Normalizer]] = {
    "none": lambda axis_name: jaxbn.identity(),
    "jaxbn": lambda axis_name: jaxbn.batch_norm(axis_name=axis_name),
    "flax": lambda axis_name: flax_batch_norm(axis_name=axis_name),
    "flax, exact variance": lambda axis_name: flax_batch_norm(axis_name=axis_name, exact=True),
}


def main(topology: str, arms: tuple[str, ...] = ("none", "jaxbn", "flax"), spreads: tuple[str, ...] = ("shard_map",)):
    """Compile and print one line for each arm and spread."""
    mesh = mesh_of(topology)
    images = IMAGES_PER_CHIP * mesh.size
    print(f"ResNet-50, {images} images of 224 x 224 on {mesh.size} chips ({topology}), bfloat16 activations, SGD")
    print(
        f"{'norm':22}{'spread':11}{'all-reduces':>12}{'rare':>6}{'payload MiB':>13}{'accessed GiB':>14}"
        f"{'temporary GiB':>15}"
    )
    for arm in arms:
        for spread in spreads:
            cost = cost_of(compile_step(ARMS[arm](_axis_name(spread)), mesh, spread))
            print(
                f"{arm:22}{spread:11}{cost.all_reduces:12}{cost.rare:6}{cost.payload / 2**20:13.1f}"
                f"{cost.accessed / GIB:14.2f}{cost.temporary / GIB:15.3f}",
                flush=True,
            )


def _axis_name(spread):
    return "data" if spread == "shard_map" else None


def mesh_of(topology: str) -> Mesh:
    """A mesh with one axis, "data", of the chips of a TPU topology such as "v5e:16x16"; UserError without libtpu."""
    # libtpu would ask the metadata server of a cloud machine which TPU this is, and guard the chip that it has not got.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise UserError("compiling for TPUs needs the package libtpu (no TPU): pip install libtpu") from None
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # jaxlib has no kind of its own for this
        raise UserError(f"--aot {topology!r} is no topology that libtpu knows, such as v5e:16x16 ({error})") from None
    return Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))


def compile_step(norm: jaxbn.Normalizer, mesh: Mesh, spread: str, depth: int = 50, image: tuple = IMAGE):
    """A train step of a ResNet, compiled for the mesh: "jit" or "shard_map"."""
    network = resnet(depth, norm, dtype=jnp.bfloat16)
    optimizer = optax.sgd(0.1, momentum=0.9)
    build = training.jit_step if spread == "jit" else training.shard_map_step
    step = build(loss_of(network), optimizer, mesh=mesh)
    whole, parts = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    images = IMAGES_PER_CHIP * mesh.size
    batch = {
        "image": jax.ShapeDtypeStruct((images, *image), jnp.bfloat16, sharding=parts),
        "label": jax.ShapeDtypeStruct((images,), jnp.int32, sharding=parts),
    }

    def start(key):
        variables = network.init(key, jax.ShapeDtypeStruct((2, *image), jnp.bfloat16))
        return training.init_state(variables, optimizer)

    state = jax.tree.map(
        lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=whole), jax.eval_shape(start, jax.random.key(0))
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    return step.lower(state, batch, key).compile()


def loss_of(network: Network) -> training.Loss:
    """Cross-entropy of the labels."""

    def loss(variables, batch, rng):
        del rng
        logits, batch_stats = network.apply(variables, batch["image"], train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return training.Outcome(jnp.sum(losses), losses.size, batch_stats)

    return loss


def cost_of(compiled: jax.stages.Compiled) -> Cost:
    """Read the cost of a compiled step."""
    sent = [c for c in collectives(compiled.as_text()) if c.kind == "all-reduce"]
    normal = [c for c in sent if not c.in_loop]
    accessed = float("nan")
    with contextlib.suppress(KeyError, TypeError):
        accessed = compiled.cost_analysis()["bytes accessed"]
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return Cost(len(normal), len(sent) - len(normal), sum(c.bytes for c in normal), accessed, temporary)
