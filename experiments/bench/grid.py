"""Microseconds per network and training step: the grid, a Flax + optax loop, and torch's eager loop.

    python -m experiments bench grid

All three train an MLP with batch norm (784-100-100-100-10, relu, batch 60, SGD) in one process, in turns, so that
whatever else the machine does falls on all of them; medians over the rounds, and the medians of the ratios within
rounds. The peers are written as one would by hand for a single network, and are given their batches ready on the
device, float32; the grid draws and converts its own inside its program. torch is left out if not installed.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbn
from experiments.bench import torch_networks
from experiments.framework.tables import Table
from experiments.framework.timing import interleaved, ratio
from experiments.training import data, loop
from experiments.training.models import mlp, normal_weights

ROUNDS = 15
STEPS = 20  # a call
BATCH_SIZE = 60
WIDTHS = (100, 100, 100)
RATE = 0.01  # of the peers' single network
# Five seeds of six networks each, which differ in the deviation of their first weights and in their rate.
RUNS = [
    {"seed": seed, "std": std, "rate": rate} for seed, std, rate in product(range(5), (0.05, 5.0), (0.01, 1.0, 2.0))
]


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


class Trainer(NamedTuple):
    """A way to train.

    Attributes:
      run: trains for STEPS steps, and waits.
      networks: how many at once.
    """

    run: Callable[[], object]
    networks: int = 1


def measured() -> list[Row]:
    """Every way that is installed, in turns."""
    dataset = data.load("mnist5k")
    batches = draw_batches(dataset)
    trainers = {"jaxbn grid": train_grid(dataset), "flax.linen + optax": train_flax(batches)}
    if importlib.util.find_spec("torch"):
        trainers["torch, eager"] = train_torch(batches)
    return measure(trainers, ROUNDS)


def measure(trainers: dict[str, Trainer], rounds: int) -> list[Row]:
    """Time some ways to train, the grid first."""
    found = interleaved({name: trainer.run for name, trainer in trainers.items()}, rounds)
    each = {name: 1e6 * found[name] / trainer.networks / STEPS for name, trainer in trainers.items()}
    grid = next(iter(each.values()))
    rows = []
    for name, values in each.items():
        lower, middle, upper = (float(v) for v in np.percentile(values, [25, 50, 75]))
        rows.append(Row(name, (lower, middle, upper), ratio(values, grid)))
    return rows


def tabulate(rows: Sequence[Row]) -> list[Table]:
    """Medians, quartiles, and how many times as long as the grid."""
    body = [
        [row.name, f"{row.microseconds[1]:.0f}", "{0:.0f} to {2:.0f}".format(*row.microseconds), f"{row.over_grid:.2f}"]
        for row in rows
    ]
    columns = ["", "median", "quartiles", "times the grid's"]
    return [Table(f"Microseconds per network and training step, {ROUNDS} rounds", columns, body)]


def draw_batches(dataset: data.Dataset) -> list[tuple[np.ndarray, np.ndarray]]:
    """`STEPS` batches of float32 pixels [60, 784] and labels [60]."""
    indices = loop.batch_indices(jnp.int32(0), jnp.int32(0), STEPS, BATCH_SIZE, len(dataset.train_labels))
    return [
        (np.asarray(data.pixels(dataset.train_images[index])).reshape(len(index), -1), dataset.train_labels[index])
        for index in np.asarray(indices)
    ]


def grid_task() -> loop.Task:
    """The network, its first weights scaled by the run's "std", under SGD at the run's "rate"."""
    build = partial(mlp, WIDTHS, jaxbn.batch_norm(epsilon=1e-3), use_bias=False, activation=jax.nn.relu)

    def init(run: dict, key: jax.Array, x: jax.Array) -> dict:
        return build(weights=normal_weights(run["std"])).init(key, x)

    return loop.Task(init, build(weights=normal_weights(0.0)).apply, lambda run: optax.sgd(run["rate"]))


def train_grid(dataset: data.Dataset) -> Trainer:
    """All of RUNS in one compiled program."""
    schedule = loop.Schedule(STEPS, STEPS, BATCH_SIZE)
    programs = loop.compile_grid(grid_task(), schedule, loop.runs_per_seed(RUNS))
    runs, arrays = loop.stacked(RUNS, len(RUNS)), loop.on_device(dataset)
    held = {"states": programs.start(runs, arrays)}

    def run() -> None:
        held["states"], _ = jax.block_until_ready(programs.advance(held["states"], runs, arrays, 0))

    return Trainer(run, len(RUNS))


class FlaxNetwork(nn.Module):
    """The same network in Flax."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits [batch, 10] of images [batch, 784]."""
        for width in WIDTHS:
            x = nn.Dense(width, use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.99, epsilon=1e-3)(x)
            x = nn.relu(x)
        return nn.Dense(10)(x)


def train_flax(batches: list[tuple[np.ndarray, np.ndarray]]) -> Trainer:
    """One network, a compiled step in a Python loop."""
    network, optimizer = FlaxNetwork(), optax.sgd(RATE)
    on_device = [(jnp.asarray(x), jnp.asarray(y)) for x, y in batches]
    variables = network.init(jax.random.key(0), on_device[0][0], train=False)
    held = {"state": (variables, optimizer.init(variables["params"]))}

    @jax.jit
    def step(variables: dict, optimizer_state: optax.OptState, x: jax.Array, y: jax.Array) -> tuple:
        def loss_of(params: dict) -> tuple[jax.Array, Mapping]:
            given = {"params": params, "batch_stats": variables["batch_stats"]}
            logits, updated = network.apply(given, x, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), updated

        (loss, updated), gradient = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
        updates, optimizer_state = optimizer.update(gradient, optimizer_state)
        return {"params": optax.apply_updates(variables["params"], updates), **updated}, optimizer_state, loss

    def run() -> None:
        variables, optimizer_state = held["state"]
        for x, y in on_device:
            variables, optimizer_state, _ = step(variables, optimizer_state, x, y)
        held["state"] = jax.block_until_ready((variables, optimizer_state))

    return Trainer(run)


def train_torch(batches: list[tuple[np.ndarray, np.ndarray]]) -> Trainer:
    """One network in torch's eager mode."""
    import torch

    network = torch_networks.mlp((28 * 28, *WIDTHS))
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE)
    tensors = [(torch.tensor(x), torch.tensor(y, dtype=torch.long)) for x, y in batches]

    def run() -> None:
        for x, y in tensors:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(x), y).backward()
            optimizer.step()

    return Trainer(run)
