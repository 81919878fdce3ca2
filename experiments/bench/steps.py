"""Whole training steps of three networks with the batch norm of every library that is installed.

    python -m experiments bench steps

An MLP (784-100-100-100-10, batch 60), LeNet (batch 256) and ResNet-20 (32 x 32 pixels, batch 32), float32, SGD. The
libraries of JAX normalize one and the same network, in one compiled step with donated buffers, so that their rows
differ by the layer alone; torch runs its own, eagerly. Rows without normalization say what a layer costs. All in one
process, in turns; medians over the rounds of ratios within a round. On accelerators the network is a ResNet-50 on 128
images of 224 x 224, bfloat16 activations, with our layer, Flax's and none.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbn
from experiments.aot.hlo import temporary_bytes
from experiments.bench import torch_networks
from experiments.bench.compare import Candidate, compare
from experiments.bench.peers import LINEN, OURS, PEERS, installed, torch_layouts
from experiments.bench.torch_networks import CLASSES
from experiments.framework.tables import Table
from experiments.training import one_step
from experiments.training.models import Network, lenet, mlp, normal_weights
from experiments.training.resnet import resnet, small_resnet

RATE = 0.01
ROUNDS = 15
NONE = "no normalization"
HIDDEN = (100, 100, 100)


class Training(NamedTuple):
    """A network and what it is fed.

    Attributes:
      network: of a norm.
      shape: of a batch of images.
      torch_network: the same in torch, called only where torch is installed; None where it is left out.
      peers: whose layers are compared, beside none; all by default.
    """

    network: Callable[[jaxbn.Normalizer], Network]
    shape: tuple[int, ...]
    torch_network: Callable | None = None
    peers: tuple[str, ...] = tuple(PEERS)

    def draw(self) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels, of noise."""
        draws = np.random.default_rng(0)
        return draws.standard_normal(self.shape, np.float32), draws.integers(CLASSES, size=self.shape[0])


class Row(NamedTuple):
    """What was measured of one network.

    Attributes:
      name: of the network.
      seconds: median per step, by library.
      ours_over: median over the rounds of our time over a library's.
      quartiles: of our seconds.
      temporary: bytes that the compiled step allocates, by library.
    """

    name: str
    seconds: dict[str, float]
    ours_over: dict[str, float]
    quartiles: tuple[float, float]
    temporary: dict[str, int]


def measured() -> Iterator[Row]:
    """Every network of the platform that is here, one by one."""
    return map(measure, TRAININGS if jax.default_backend() == "cpu" else ON_ACCELERATORS)


def measure(name: str, rounds: int = ROUNDS) -> Row:
    """Time the steps of one of the TRAININGS in all libraries."""
    return Row(name, *compare(_candidates((TRAININGS | ON_ACCELERATORS)[name]), OURS, rounds))


def tabulate(rows: Sequence[Row]) -> list[Table]:
    """Milliseconds per step and our time over each library's."""
    body = [
        [
            f"{row.name}, {peer}",
            f"{1e3 * seconds:.2f}",
            f"{row.ours_over[peer]:.2f}",
            f"{row.temporary[peer] / 2**20:.1f}" if peer in row.temporary else "",
        ]
        for row in rows
        for peer, seconds in row.seconds.items()
    ]
    columns = ["network, norm", "milliseconds", "jaxbn / this", "temporary MiB"]
    return [Table("A training step, SGD", columns, body)]


def _candidates(training: Training) -> dict[str, Candidate]:
    peers = {name: norm for name, norm in installed().items() if name in training.peers}
    norms = {OURS: jaxbn.batch_norm(), NONE: jaxbn.identity()} | peers
    built = {name: _in_jax(training, norm) for name, norm in norms.items()}
    if training.torch_network is None:
        return built
    return built | {
        name: _in_torch(training, channels_last=last) for name, last in torch_layouts(training.shape).items()
    }


def _in_jax(training: Training, norm: jaxbn.Normalizer) -> Candidate:
    x, labels = map(jnp.asarray, training.draw())
    timed = one_step.training(training.network(norm), optax.sgd(RATE), x, labels)
    return Candidate(timed.run, temporary_bytes(timed.compiled))


def _in_torch(training: Training, *, channels_last: bool) -> Candidate:
    import torch

    order = torch.channels_last if channels_last else torch.contiguous_format
    network = training.torch_network().to(memory_format=order)
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE)
    x, labels = map(torch.tensor, training.draw())
    if x.ndim == 4:
        x = x.permute(0, 3, 1, 2).contiguous(memory_format=order)

    def run() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(x), labels).backward()
        optimizer.step()

    return Candidate(run)


TRAININGS = {
    "MLP": Training(
        lambda norm: mlp(HIDDEN, norm, use_bias=False, activation=jax.nn.relu, weights=normal_weights(0.05)),
        (60, 784),
        torch_networks.mlp,
    ),
    "LeNet": Training(
        lambda norm: lenet(norm, use_bias=False, activation=jax.nn.relu), (256, 28, 28, 1), torch_networks.lenet
    ),
    "ResNet-20": Training(lambda norm: small_resnet(20, norm), (32, 32, 32, 3), torch_networks.resnet20),
}
ON_ACCELERATORS = {
    "ResNet-50, bfloat16": Training(
        lambda norm: resnet(50, norm, dtype=jnp.bfloat16), (128, 224, 224, 3), peers=(LINEN,)
    )
}
