"""Microseconds per network and training step: the grid, a Flax + optax loop, and torch's eager loop.

    python -m experiments bench grid

All three train the batch-norm MLP of `benefits` (784-100-100-100-10, relu, batch 60, SGD) in one process, in turns,
so that whatever else the machine does falls on all of them; medians over the rounds, and the medians of the ratios
within rounds. The peers are written as one would by hand for a single network, and are given their batches ready on
the device, float32; the grid draws and converts its own inside its program. torch is left out if not installed.
"""

import importlib.util
import itertools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import benefits
from experiments.bench.timing import ratio
from experiments.framework.tables import Table
from experiments.training import data, loop

ROUNDS = 15
STEPS = 20  # per round
RATE = 0.01


class Row(NamedTuple):
    """What was measured of one program.

    Attributes:
      name: which.
      microseconds: per network and step: lower quartile, median, upper quartile.
      over_grid: median over the rounds of its time over the grid's.
    """

    name: str
    microseconds: tuple[float, float, float]
    over_grid: float


def measured() -> list[Row]:
    """Every program that is installed, in turns."""
    dataset = data.load("mnist5k")
    batches = draw_batches(dataset)
    programs = {"jaxbn grid": grid_round(dataset), "flax.linen + optax": flax_round(batches)}
    if importlib.util.find_spec("torch"):
        programs["torch, eager"] = torch_round(batches)
    found = measure(programs)
    grid = next(iter(found.values()))
    return [
        Row(name, tuple(float(v) for v in np.percentile(values, [25, 50, 75])), ratio(values, grid))
        for name, values in found.items()
    ]


def draw_batches(dataset: data.Dataset) -> list[tuple[np.ndarray, np.ndarray]]:
    """`STEPS` batches of float32 pixels [60, 784] and labels [60]."""
    indices = loop.batch_indices(jnp.int32(0), jnp.int32(0), STEPS, benefits.BATCH_SIZE, len(dataset.train_labels))
    return [
        (np.asarray(data.pixels(dataset.train_images[index])).reshape(len(index), -1), dataset.train_labels[index])
        for index in np.asarray(indices)
    ]


def measure(programs: dict[str, Callable[[], int]]) -> dict[str, np.ndarray]:
    """Microseconds per network and step, [rounds]; a program runs one round and returns networks times steps."""
    seconds = {name: [] for name in programs}
    for _ in range(ROUNDS + 1):
        for name, program in programs.items():
            began = time.perf_counter()
            count = program()
            seconds[name].append((time.perf_counter() - began) / count)
    return {name: 1e6 * np.array(values[1:]) for name, values in seconds.items()}  # the first round compiles


def tabulate(rows: Sequence[Row]) -> list[Table]:
    """Medians, quartiles, and how many times as long as the grid."""
    body = [
        [row.name, f"{row.microseconds[1]:.0f}", "{0:.0f} to {2:.0f}".format(*row.microseconds), f"{row.over_grid:.2f}"]
        for row in rows
    ]
    columns = ["", "median", "quartiles", "times the grid's"]
    return [Table(f"Microseconds per network and training step, {ROUNDS} rounds", columns, body)]


def grid_round(dataset: data.Dataset) -> Callable[[], int]:
    """One interval of one of the grids of `benefits`, in the preset cpu."""
    runs = benefits.grid(benefits.PRESETS["cpu"])
    schedule = loop.Schedule(STEPS, STEPS, benefits.BATCH_SIZE)
    programs = loop.compile_grid(benefits.task("relu", "batch norm"), schedule, loop.runs_per_seed(runs))
    runs = loop.stacked(runs, len(runs))
    arrays = loop.on_device(dataset)
    state = {"now": programs.start(runs, arrays)}

    def program() -> int:
        state["now"], _ = jax.block_until_ready(programs.advance(state["now"], runs, arrays, 0))
        return len(runs["seed"]) * STEPS

    return program


class FlaxNetwork(nn.Module):
    """The same network in Flax."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits [batch, 10] of images [batch, 784]."""
        for width in benefits.WIDTHS:
            x = nn.Dense(width, use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.99, epsilon=1e-3)(x)
            x = nn.relu(x)
        return nn.Dense(10)(x)


def flax_round(batches: list) -> Callable[[], int]:
    """`STEPS` steps of one network, a compiled step in a Python loop."""
    network, optimizer = FlaxNetwork(), optax.sgd(RATE)
    batches = [(jnp.asarray(x), jnp.asarray(y)) for x, y in batches]
    variables = network.init(jax.random.key(0), batches[0][0], train=False)
    state = {"now": (variables, optimizer.init(variables["params"]))}

    @jax.jit
    def step(variables, optimizer_state, x, y):
        def loss_of(params):
            given = {"params": params, "batch_stats": variables["batch_stats"]}
            logits, updated = network.apply(given, x, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), updated

        (loss, updated), gradient = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
        updates, optimizer_state = optimizer.update(gradient, optimizer_state)
        return {"params": optax.apply_updates(variables["params"], updates), **updated}, optimizer_state, loss

    def program() -> int:
        variables, optimizer_state = state["now"]
        for x, y in batches:
            variables, optimizer_state, _ = step(variables, optimizer_state, x, y)
        state["now"] = jax.block_until_ready((variables, optimizer_state))
        return STEPS

    return program


def torch_round(batches: list) -> Callable[[], int]:
    """`STEPS` steps of one network in torch's eager mode."""
    import torch

    widths = (28 * 28, *benefits.WIDTHS)
    layers = []
    for fan_in, fan_out in itertools.pairwise(widths):
        linear = torch.nn.Linear(fan_in, fan_out, bias=False)
        layers += [linear, torch.nn.BatchNorm1d(fan_out, momentum=0.01, eps=1e-3), torch.nn.ReLU()]
    network = torch.nn.Sequential(*layers, torch.nn.Linear(widths[-1], 10))
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE)
    batches = [(torch.tensor(x), torch.tensor(y, dtype=torch.long)) for x, y in batches]

    def program() -> int:
        for x, y in batches:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(x), y).backward()
            optimizer.step()
        return STEPS

    return program
