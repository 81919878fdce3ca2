"""Whole training steps of three networks with the batch norm of every library that is installed.

    python -m experiments bench steps

An MLP (784-100-100-100-10, batch 60), LeNet (batch 256) and ResNet-20 (32 x 32 pixels, batch 32), float32, SGD. The
libraries of JAX normalize one and the same network, in one compiled step with donated buffers, so that their rows
differ by the layer alone; torch runs its own, eagerly. Rows without normalization say what a layer costs. All in one
process, in turns; medians over the rounds of ratios within a round.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbn
from experiments.bench.peer_layers import OURS, installed
from experiments.bench.peers import Program, torch_layouts
from experiments.bench.timing import interleaved, ratio
from experiments.framework.tables import Table
from experiments.training.models import Network, lenet, mlp, normal_weights
from experiments.training.resnet import small_resnet

RATE = 0.01
CLASSES = 10
ROUNDS = 15
NONE = "no normalization"
HIDDEN = (100, 100, 100)


class Example(NamedTuple):
    """A network and what it is fed.

    Attributes:
      network: of a norm.
      shape: of a batch of images.
      torch_network: the same in torch, of whether there is a norm; called only where torch is installed.
    """

    network: Callable[[jaxbn.Normalizer], Network]
    shape: tuple[int, ...]
    torch_network: Callable

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
    """Every network, one by one."""
    return map(measure, EXAMPLES)


def measure(name: str, rounds: int = ROUNDS) -> Row:
    """Time the steps of one of the EXAMPLES in all libraries."""
    programs = _programs(EXAMPLES[name])
    found = interleaved({name: program.run for name, program in programs.items()}, rounds)
    jax.clear_caches()
    return Row(
        name,
        {peer: float(np.median(values)) for peer, values in found.items()},
        {peer: ratio(found[OURS], values) for peer, values in found.items()},
        tuple(float(v) for v in np.percentile(found[OURS], [25, 75])),
        {peer: program.temporary for peer, program in programs.items() if program.temporary is not None},
    )


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
    return [Table("A training step, float32, SGD", columns, body)]


def _programs(example) -> dict[str, Program]:
    norms = {OURS: jaxbn.batch_norm(), NONE: jaxbn.identity()} | installed()
    built = {name: _in_jax(example, norm) for name, norm in norms.items()}
    return built | {name: _in_torch(example, channels_last=last) for name, last in torch_layouts(example.shape).items()}


def _in_jax(example, norm) -> Program:
    network, optimizer = example.network(norm), optax.sgd(RATE)
    x, labels = map(jnp.asarray, example.draw())
    variables = network.init(jax.random.key(0), x)

    def step(state, x, labels):
        params, batch_stats, optimizer_state = state

        def loss(params):
            logits, moved = network.apply({"params": params, "batch_stats": batch_stats}, x, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), moved

        gradients, batch_stats = jax.grad(loss, has_aux=True)(params)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state)
        return optax.apply_updates(params, updates), batch_stats, optimizer_state

    state = variables["params"], variables["batch_stats"], optimizer.init(variables["params"])
    compiled = jax.jit(step, donate_argnums=0).lower(state, x, labels).compile()
    held = {"state": jax.tree.map(jnp.copy, state)}  # equal arrays may share a buffer, which is donated once

    def run():
        held["state"] = jax.block_until_ready(compiled(held["state"], x, labels))

    return Program(run, compiled.memory_analysis().temp_size_in_bytes)


def _in_torch(example, *, channels_last) -> Program:
    import torch

    order = torch.channels_last if channels_last else torch.contiguous_format
    network = example.torch_network().to(memory_format=order)
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE)
    x, labels = map(torch.tensor, example.draw())
    if x.ndim == 4:
        x = x.permute(0, 3, 1, 2).contiguous(memory_format=order)

    def run():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(x), labels).backward()
        optimizer.step()

    return Program(run)


def _torch_mlp():
    import torch.nn as nn

    widths = (784, *HIDDEN)
    layers = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs, momentum=0.01), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))


def _torch_lenet():
    import torch.nn as nn

    def after(layer, norm):
        return [layer, norm(layer.weight.shape[0], momentum=0.01), nn.ReLU()]

    return nn.Sequential(
        *after(nn.Conv2d(1, 6, 5, padding=2, bias=False), nn.BatchNorm2d),
        nn.AvgPool2d(2),
        *after(nn.Conv2d(6, 16, 5, bias=False), nn.BatchNorm2d),
        nn.AvgPool2d(2),
        nn.Flatten(),
        *after(nn.Linear(400, 120, bias=False), nn.BatchNorm1d),
        *after(nn.Linear(120, 84, bias=False), nn.BatchNorm1d),
        nn.Linear(84, CLASSES),
    )


def _torch_resnet20():
    import torch
    import torch.nn as nn

    def unit(inputs, outputs, stride):
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs, momentum=0.01))

    class Block(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.stride = 1 if inputs == outputs else 2
            self.first, self.second = unit(inputs, outputs, self.stride), unit(outputs, outputs, 1)

        def forward(self, x):
            y = self.second(torch.relu(self.first(x)))
            shortcut = x[:, :, :: self.stride, :: self.stride]
            missing = y.shape[1] - x.shape[1]
            return torch.relu(y + nn.functional.pad(shortcut, (0, 0, 0, 0, 0, missing)))

    widths = (16, 16, 16, 16, 32, 32, 32, 64, 64, 64)
    blocks = [Block(inputs, outputs) for inputs, outputs in itertools.pairwise(widths)]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES)
    return nn.Sequential(unit(3, 16, 1), nn.ReLU(), *blocks, *head)


EXAMPLES = {
    "MLP": Example(
        lambda norm: mlp(HIDDEN, norm, use_bias=False, activation=jax.nn.relu, weights=normal_weights(0.05)),
        (60, 784),
        _torch_mlp,
    ),
    "LeNet": Example(lambda norm: lenet(norm, use_bias=False, activation=jax.nn.relu), (256, 28, 28, 1), _torch_lenet),
    "ResNet-20": Example(lambda norm: small_resnet(20, norm), (32, 32, 32, 3), _torch_resnet20),
}
