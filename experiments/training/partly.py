"""Training some of the params while the rest stays as it was drawn, whatever they are by the same compiled program.

Which params move is data: marks, a tree like the params with 1 where a number moves and 0 where not.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.training import loop


def mark(params: Any, chosen: Callable[[str], bool]) -> Any:
    """Marks of the leaves of which chosen(path) is true; a path is as in "stem/norm/scale"."""

    def one(path: tuple, leaf: np.ndarray) -> np.ndarray:
        return np.full(leaf.shape, chosen(jax.tree_util.keystr(path, simple=True, separator="/")), np.float32)

    return jax.tree_util.tree_map_with_path(one, params)


def mark_at_random(params: Any, chosen: Callable[[str], bool], per_filter: int, seed: int) -> Any:
    """Marks of some weights, drawn at random, of each filter of the kernels that are chosen: [..., filters]."""
    draw = np.random.default_rng(seed)

    def one(marks: np.ndarray) -> np.ndarray:
        if not marks.any():
            return marks
        rank = draw.random(marks.shape).reshape(-1, marks.shape[-1]).argsort(0).argsort(0)
        return (rank < per_filter).reshape(marks.shape).astype(np.float32)

    return jax.tree.map(one, mark(params, chosen))


def moving(marks: Any) -> optax.GradientTransformation:
    """Sets the updates of what is not marked to 0."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda update, mark: update * mark, updates, marks))


def train(
    task: loop.Task,
    schedule: loop.Schedule,
    arrays: dict,
    stage: str,
    runs: Sequence[dict],
    start: Callable[[int], Any],
    further: Callable[[int, Any], dict],
) -> list[dict]:
    """Train runs one after the other; the rows that `experiments.framework.grid.train_grid` would record.

    Args:
      task: its optimizer finds in a run also what `further` returns.
      schedule: of the training.
      arrays: of `loop.on_device`.
      stage: a name for the rows.
      runs: dicts of numbers.
      start: start(seed) -> the state of a run before its first step, as of `loop.init_run`.
      further: further(seed, params) -> what else a run has, such as marks: trees of arrays.
    """
    programs = loop.compile_grid(task, schedule)
    rows: list[dict] = [{"stage": stage, "runs": list(runs)}]
    for number, run in enumerate(runs):
        state = start(run["seed"])
        more = further(run["seed"], state["variables"]["params"])
        states, more = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], (state, more))
        one = {**loop.stacked([run], 1), **more}
        for step in range(0, schedule.steps, schedule.interval):
            states, loss = programs.advance(states, one, arrays, step)
            found = jax.device_get({"loss": loss, **programs.evaluate(states, one, arrays)})
            rows.append({"stage": stage, "first": number, "step": step + schedule.interval, **found})
    return rows
