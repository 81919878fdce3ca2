"""The table of experiments and benchmarks; a module is imported only when it is asked for.

An experiment is one module with these names:

- `PRESETS`: `{"smoke": settings, "cpu": settings, "full": settings}`, each a flat, JSON-able dict with at
  least `"seeds"` (an int), and `"data"` (a data set's name) if the experiment reads data;
- `SOURCE`: where the claim comes from, in a line;
- `run(settings, record, track)`: computes and appends rows to the record, stage by stage;
- `judge(settings, rows) -> list[Verdict]`;
- `tabulate(settings, rows) -> list[Table]`;
- `draw(settings, rows, directory) -> list[Picture]`.

The last three are pure functions of the rows, so that a finished run is judged and drawn again without
training.
A benchmark is one module as `experiments.bench.command` describes.
"""

import importlib
from types import ModuleType
from typing import NamedTuple

from experiments.errors import UserError


class Entry(NamedTuple):
    """One line of the table."""

    module: str
    claim: str


EXPERIMENTS: dict[str, Entry] = {
    "benefits": Entry(
        "experiments.benefits",
        "Batch norm trains an MLP faster, at higher rates, from bad weights and with saturating activations.",
    ),
    "deep_conv": Entry(
        "experiments.deep_conv",
        "Twenty layers that learn nothing plain reach over 95% of MNIST in 800 steps with batch norm.",
    ),
    "chain": Entry(
        "experiments.chain",
        "In a deep product of weights a gradient step misses its first-order forecast; normalizing mends it.",
    ),
}

BENCHMARKS: dict[str, Entry] = {
    "operation": Entry("experiments.bench.operation", "One layer: forward, backward, evaluation; every library."),
    "steps": Entry(
        "experiments.bench.steps", "Training steps of an MLP, LeNet and ResNet-20 with every library's layer."
    ),
    "accuracy": Entry("experiments.bench.accuracy", "One layer against float64 on hard inputs; every library."),
    "memory": Entry("experiments.bench.memory", "What is kept for the backward pass, and under a checkpoint policy."),
    "grid": Entry("experiments.bench.grid", "Training a grid of networks: jaxbn, Flax + optax, torch."),
}


def load(table: dict[str, Entry], name: str, kind: str = "experiment") -> ModuleType:
    """Import the module called `name` in `table`; UserError with the known names if there is none."""
    if name not in table:
        raise UserError(f"there is no {kind} {name!r}; choose one of: {', '.join(table)}")
    return importlib.import_module(table[name].module)


def settings_of(module: ModuleType, name: str, preset: str) -> dict:
    """A copy of the settings of one preset; UserError with the known presets if there is none."""
    if preset not in module.PRESETS:
        raise UserError(f"{name} has no preset {preset!r}; choose one of: {', '.join(module.PRESETS)}")
    return dict(module.PRESETS[preset])
