"""Trained networks learn a small data set further, with running statistics that stand still or move.

A run is a dict of numbers: "seed"; "frozen", 1 where statistics stand still in training; "of_target", 1 where they
become those of the small data set first; "exact", 1 where they become those at the end, before anything is measured;
and what the optimizer takes. All train in one compiled program a batch size.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxbn
from experiments.training import adaptation, loop
from experiments.training.dataset import Dataset


class FineTuning(NamedTuple):
    """What the runs have in common; made once for all batch sizes, so that nothing is compiled twice.

    Attributes:
      begin: begin(runs, variables, arrays) -> the states before the first step; leaves [runs, ...].
      task: the training.
      finish: finish(runs, states, arrays) -> the states after the last step, as they are evaluated.
    """

    begin: Callable
    task: loop.Task
    finish: Callable


def fine_tuning(
    build: adaptation.Build, norm: jaxbn.Normalizer, optimizer: Callable[[dict], optax.GradientTransformation]
) -> FineTuning:
    """Fine-tuning of networks build(norm), whose batch_stats are a list of layers, by optimizer(run)."""

    def by_all(variables: dict, arrays: dict, wanted: jax.Array) -> dict:
        """The variables with the statistics of all images that are trained on, if they are wanted."""
        images, _ = loop.take(arrays, jnp.arange(len(arrays["train_labels"])))
        found = adaptation.adapted(build, norm, variables, images, jnp.ones(len(images), bool), 0)
        return jax.tree.map(partial(jnp.where, wanted > 0), found, variables)

    @jax.jit
    @partial(jax.vmap, in_axes=(0, 0, None))
    def begin(run: dict, variables: dict, arrays: dict) -> dict:
        variables = adaptation.freeze(by_all(variables, arrays, run["of_target"]), run["frozen"])
        return {"variables": variables, "optimizer": optimizer(run).init(variables["params"])}

    @jax.jit
    @partial(jax.vmap, in_axes=(0, 0, None))
    def finish(run: dict, state: dict, arrays: dict) -> dict:
        measured = by_all(adaptation.melt(state["variables"]), arrays, run["exact"])
        return {**state, "variables": adaptation.freeze(measured, run["frozen"])}

    return FineTuning(begin, loop.Task(None, build(adaptation.freezable(norm)).apply, optimizer), finish)


def train(
    tuning: FineTuning, variables: dict, dataset: Dataset, runs: Sequence[dict], *, stage: str, epochs: int, batch: int
) -> list[dict]:
    """Fine-tune a network for each run; the rows that `experiments.framework.grid.train_grid` would record.

    Args:
      tuning: what they have in common.
      variables: of the trained networks, leaves [networks, ...]; a run takes that of its seed, counted around.
      dataset: the small one.
      runs: dicts of numbers, seed after seed.
      stage: a name for the rows.
      epochs: over the small data set.
      batch: examples a step.
    """
    arrays, per_seed, numbers = loop.on_device(dataset), loop.runs_per_seed(runs), loop.stacked(runs, len(runs))
    steps = epochs * len(dataset.train_labels) // batch
    advance = loop.compile_grid(tuning.task, loop.Schedule(steps, steps, batch, mapped=False), per_seed).advance
    # The schedule plays no part in evaluation, which is compiled once for all batch sizes.
    evaluate = loop.compile_grid(tuning.task, loop.Schedule(1, 1, 1, mapped=False), per_seed).evaluate
    which = numbers["seed"] % len(jax.tree.leaves(variables)[0])
    states = tuning.begin(numbers, jax.tree.map(lambda leaf: jnp.asarray(leaf)[which], variables), arrays)
    states, loss = advance(states, numbers, arrays, 0)
    states = tuning.finish(numbers, states, arrays)
    found = jax.device_get({"loss": loss, **evaluate(states, numbers, arrays)})
    return [{"stage": stage, "runs": list(runs)}, {"stage": stage, "first": 0, "step": steps, **found}]
