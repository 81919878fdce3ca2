"""What an experiment is made of. A file of experiments/ defines one `Experiment`; everything else is done here."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import xarray as xr
from matplotlib.figure import Figure

from experiments.framework.claim import Claim
from experiments.framework.tables import Table
from experiments.training.loop import Task

# What batch norm is and what it does at the start; why it trains faster; when it helps, and what it costs.
THEMES = WHAT_IT_IS, WHY_FASTER, WHEN_IT_HELPS = ("what it is", "why it trains faster", "when it helps")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The size of an experiment; an experiment with more to set derives its own class.

    Attributes:
      seeds: number of independent repetitions.
      data: name of the data set; None if none is used.
      steps: of training.
      interval: steps between two measurements.
      first_seed: the seeds are this and the next ones; a pilot has others than the run that is judged.
    """

    seeds: int
    data: str | None = None
    steps: int = 0
    interval: int = 0
    first_seed: int = 0

    @property
    def every_seed(self) -> range:
        """The seeds of the repetitions."""
        return range(self.first_seed, self.first_seed + self.seeds)


@dataclass(frozen=True)
class Search:
    """The same search for every arm: the value of one axis that is best on validation, then fresh seeds for the result.

    Every program and every cell of the other axes tries the same values with the same seeds. Where the best of one
    lies at an end of the values, all get one value more there, at the distance of the last two, `extensions` times at
    most.

    Attributes:
      axis: what is chosen: an entry of a run, such as "rate".
      values: tried first, in rising order.
      seeds: runs of each value; they are not used again.
      on: the metric by whose mean over seeds is chosen; larger is better. A run that diverged counts as the worst.
      extensions: how often values may be added.
      shared: axes along which the choice is shared: it is made at the first value and holds for all others.
      together: whether the runs of all values train together; else value after value, which saves compiling where the
        runs of one value are many: then they are as many as those of the result.
      least_steps: with fewer steps of training, as to see whether everything runs, nothing is searched and all take the
        first value. It saves half of what is compiled.
      given: given(cell) -> the value that the result has in a cell {axis: value} where the source fixes it, else None.
      then_on_all: whether the networks of the result train on the validation part too, once all is chosen. Their
        validation accuracy is then one on training examples.
    """

    axis: str
    values: tuple[float, ...]
    seeds: int = 2
    on: str = "validation_accuracy"
    extensions: int = 2
    shared: tuple[str, ...] = ()
    together: bool = True
    least_steps: int = 0
    given: Callable[[Mapping[str, Any]], float | None] | None = None
    then_on_all: bool = False


@dataclass(frozen=True)
class Grid:
    """Networks that are trained: every combination of the programs' axes is compiled once, all its runs train together.

    Attributes:
      task: task(settings, **program) -> what the runs of one program have in common; see `experiments.training.loop`.
      batch_size: examples a step.
      programs: axes of which every combination is a program of its own: {"arm": ("plain", "batch norm")}.
      runs: axes of numbers that vary within a program: {"rate": (0.01, 1.0)}; "seed" comes by itself. An axis may have
        names instead, each for some numbers of a run: {"arm": {"plain": {"normalize": 0}, "batch norm": ...}}.
      search: chooses the value of one further number of a run; None if nothing is chosen.
      conclude: conclude(trained) -> {name: (names of further axes, values [runs, ...])}; see `Trained`.
      most_seeds: most_seeds(settings, **program) -> how many of the settings' seeds a program takes at most, the first
        ones; None: all take all.
    """

    task: Callable[..., Task]
    batch_size: int
    programs: Mapping[str, tuple]
    runs: Mapping[str, tuple[float, ...] | Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    search: Search | None = None
    conclude: "Callable[[Trained], Mapping[str, tuple[tuple[str, ...], Any]]] | None" = None
    most_seeds: Callable[..., int] | None = None


@dataclass(frozen=True)
class Trained:
    """Networks at the end of their training.

    Attributes:
      program: the values of the programs' axes.
      task: what the networks have in common.
      runs: the numbers of each.
      variables: theirs; every leaf has a leading axis [runs].
      arrays: the data set on the device, as `experiments.training.loop.on_device` has it.
      settings: of the experiment.
    """

    program: Mapping[str, Any]
    task: Task
    runs: Sequence[Mapping[str, float]]
    variables: Mapping[str, Any]
    arrays: Mapping[str, Any]
    settings: Any = None


@dataclass(frozen=True)
class Stage:
    """A part of an experiment that is kept as a whole once it is done.

    Attributes:
      name: by which a later process knows that it is done.
      measure: measure() -> named arrays with named axes.
    """

    name: str
    measure: Callable[[], xr.Dataset]


@dataclass(frozen=True)
class Drawn:
    """A picture: the figure, its file's name, a caption that says what is to be seen, and the question above it."""

    file: str
    figure: Figure
    caption: str
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A question put to data.

    Attributes:
      title: what is claimed, in a line, for the list of experiments.
      question: what a reader wants to know.
      source: where the claims come from; printed.
      settings: by preset: "smoke" (seconds), "cpu" (minutes on two cores), "full" (the source's own).
      claims: fixed before the run.
      grid: networks to train, if any.
      stages: stages(settings) -> what is measured beyond the grid, in order.
      differs: what differs from the source's protocol, in a sentence or two.
      tables: table(settings, results) -> Table.
      pictures: picture(settings, results) -> Drawn; the first one answers the question.
      theme: under which the report groups it: one of `THEMES`, or another.
      answer: {preset: what was found, in two sentences that a student understands}, for each result that is there.
      surprise: what nobody would have expected before the run, in one or two plain sentences, if there was something.
      citation: the source in full, as one cites it; `source` where not given.
      reader_questions: {what readers ask: the answer in two sentences}, for what this experiment settles.
    """

    title: str
    question: str
    source: str
    settings: Mapping[str, Settings]
    claims: Sequence[Claim]
    grid: Grid | None = None
    stages: Callable[[Any], Iterable[Stage]] | None = None
    differs: str = ""
    tables: Sequence[Callable[[Any, xr.Dataset], Table]] = ()
    pictures: Sequence[Callable[[Any, xr.Dataset], Drawn]] = ()
    theme: str = ""
    answer: Mapping[str, str] = field(default_factory=dict)
    surprise: str = ""
    citation: str = ""
    reader_questions: Mapping[str, str] = field(default_factory=dict)
