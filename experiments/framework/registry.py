"""The experiments and benchmarks by name; a module is imported only when it is asked for.

An experiment is a file of experiments/ with an `Experiment` named EXPERIMENT; to add one, put its name below. A
benchmark is a module as `experiments.bench.command` describes.
"""

import dataclasses
import importlib
import inspect
from types import ModuleType
from typing import NamedTuple

from experiments.errors import UserError
from experiments.framework.experiment import Experiment, Settings

EXPERIMENTS = (
    "benefits",
    "deep_conv",
    "chain",
    "placement",
    "reparameterization",
    "whitening",
    "through_statistics",
    "effective_rate",
    "affine_only",
    "mean_field",
    "rank",
    "landscape",
    "loss_surface",
    "gradient_flow",
    "covariate_shift",
    "large_rates",
    "spectrum",
    "lenet",
    "population",
    "depth",
    "batch_size",
    "noise",
    "uncertainty",
    "rivals",
    "recurrent",
    "dcgan",
    "cost",
    "test_time",
)


class Entry(NamedTuple):
    """A benchmark: its module, and what it measures."""

    module: str
    measures: str


BENCHMARKS: dict[str, Entry] = {
    "operation": Entry("experiments.bench.operation", "One layer: forward, backward, evaluation; every library."),
    "steps": Entry(
        "experiments.bench.steps", "Training steps of an MLP, LeNet and ResNet-20 with every library's layer."
    ),
    "accuracy": Entry("experiments.bench.accuracy", "One layer against float64 on hard inputs; every library."),
    "memory": Entry("experiments.bench.memory", "What is kept for the backward pass, and under a checkpoint policy."),
    "compile": Entry(
        "experiments.bench.compile", "Time to lower and compile, and size, of one layer, twenty, and ResNet-50."
    ),
    "grid": Entry("experiments.bench.grid", "Training a grid of networks: jaxbn, Flax + optax, torch."),
}


def load(name: str) -> Experiment:
    """The experiment of that name; UserError with the known names if there is none."""
    if name not in EXPERIMENTS:
        raise UserError(f"there is no experiment {name!r}; choose one of: {', '.join(EXPERIMENTS)}")
    return importlib.import_module(f"experiments.{name}").EXPERIMENT


def protocol(name: str) -> list[str]:
    """How the experiment of that name goes, in paragraphs: what its file says of itself, but for the first of them."""
    said = inspect.getdoc(importlib.import_module(f"experiments.{name}")) or ""
    return said.split("\n\n")[1:]


def load_benchmark(name: str) -> ModuleType:
    """The benchmark of that name; UserError with the known names if there is none."""
    if name not in BENCHMARKS:
        raise UserError(f"there is no benchmark {name!r}; choose one of: {', '.join(BENCHMARKS)}")
    return importlib.import_module(BENCHMARKS[name].module)


def settings_of(
    experiment: Experiment, name: str, preset: str, seeds: int | None = None, data: str | None = None
) -> Settings:
    """The settings of one preset, with other seeds or data where given; UserError if that cannot be."""
    if preset not in experiment.settings:
        raise UserError(f"{name} has no preset {preset!r}; choose one of: {', '.join(experiment.settings)}")
    settings = experiment.settings[preset]
    if data is not None and settings.data is None:
        raise UserError(f"{name} uses no data: leave out --data {data}")
    given = {"seeds": seeds, "data": data}
    return dataclasses.replace(settings, **{key: value for key, value in given.items() if value is not None})
