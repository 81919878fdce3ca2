"""What batch norm does for a small MLP: Udacity's batch-norm lesson, all 24 cells of it, on real digits.

Claim: with batch norm a network trains faster, stands higher learning rates and bad initial weights, makes saturating
activations usable and ends up more accurate; each step costs more. And: a trained network must predict with
population statistics, not with those of the batch it is given.

Source: Udacity, Deep Learning Foundations, "Batch Normalization - Lesson" ("Why batch norm works" and the benefits).

Protocol: MLP 784-100-100-100-10 on pixels in [0, 1], batch 60, plain SGD; rate {0.01, 1, 2} x activation {relu,
sigmoid} x standard deviation of the normal initial weights {0.05, 5} x {plain, batch norm}. Normalized hidden layers
are dense without bias -> batch norm (decay 0.99, epsilon 0.001) -> activation, the others dense with bias ->
activation; the output layer is plain. Both arms of a seed start from the same weights and see the same batches.
The lesson trained once on all of MNIST for 50,000 steps, which is the preset `full`.

    python -m experiments run benefits

takes about five minutes on two cores (3,000 steps, 5 seeds, 5,000 digits). All criteria below were fixed before the
first full run.
"""

import functools
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbn
from experiments.framework import grid as grids
from experiments.framework import plots
from experiments.framework.display import Track
from experiments.framework.record import Record
from experiments.framework.tables import Table, spread
from experiments.framework.verdict import Verdict, verdict
from experiments.training import data, loop, models

SOURCE = "Udacity, Deep Learning Foundations: Batch Normalization - Lesson"

PRESETS = {
    "smoke": {"seeds": 2, "data": "mnist5k", "steps": 40, "interval": 20, "cost_rounds": 3},
    "cpu": {"seeds": 5, "data": "mnist5k", "steps": 3000, "interval": 50, "cost_rounds": 8},
    "full": {"seeds": 5, "data": "hub:mnist", "steps": 50_000, "interval": 250, "cost_rounds": 8},
}

WIDTHS = (100, 100, 100)
BATCH_SIZE = 60
RATES = (0.01, 1.0, 2.0)
DEVIATIONS = (0.05, 5.0)
ACTIVATIONS = {"relu": jax.nn.relu, "sigmoid": jax.nn.sigmoid}
ARMS = ("plain", "batch norm")
CELL = "activation, weights' std, rate"
LESSON = ("relu", "batch norm")  # the network that predicts one image at a time

# Test accuracy by (activation, deviation), per rate: plain, batch norm. MNIST in full, 50,000 steps, one run.
PUBLISHED = {
    ("relu", 0.05): [(0.975, 0.980), (0.098, 0.983), (0.101, 0.983)],
    ("sigmoid", 0.05): [(0.827, 0.973), (0.975, 0.981), (0.978, 0.978)],
    ("relu", 5.0): [(0.098, 0.799), (0.113, 0.921), (0.098, 0.905)],
    ("sigmoid", 5.0): [(0.227, 0.853), (0.896, 0.951), (0.907, 0.958)],
}
PUBLISHED_ONE_AT_A_TIME = {"batch": 0.05, "population": 0.97}

# Thresholds, in the units of their claims.
LEARNT = 0.9  # test accuracy that counts as having learnt, for "faster"
MATERIAL = 0.05  # gain in accuracy that counts where plain networks are said to fail
POPULATION_GAIN = 0.5  # gain in accuracy at test time: "5%" against "97%"


@functools.cache
def task(activation: str, arm: str) -> loop.Task:
    """The network of one arm, its initial weights scaled by the run's "deviation", under SGD at the run's "rate"."""
    normalized = arm == "batch norm"
    # One image at a time in training mode is a part of the lesson, hence allow_single_value.
    norm = jaxbn.batch_norm(decay=0.99, epsilon=1e-3, allow_single_value=True) if normalized else jaxbn.identity()
    build = partial(models.mlp, WIDTHS, norm, use_bias=not normalized, activation=ACTIVATIONS[activation])

    def init(run, key, x):
        return build(weights=models.normal_weights(run["deviation"])).init(key, x)

    apply = build(weights=models.normal_weights(0.0)).apply  # of which only init makes use
    return loop.Task(init, apply, lambda run: optax.sgd(run["rate"]))


def grid(settings: dict) -> list[dict]:
    """The runs of one network: every rate, deviation and seed."""
    return [
        {"seed": seed, "rate": rate, "deviation": deviation}
        for seed in range(settings["seeds"])
        for deviation in DEVIATIONS
        for rate in RATES
    ]


def run(settings: dict, record: Record, track: Track) -> None:
    """Train the four grids and measure the cost of a step."""
    dataset = data.load(settings["data"])
    schedule = loop.Schedule(settings["steps"], settings["interval"], BATCH_SIZE)
    stages = [(activation, arm) for activation in ACTIVATIONS for arm in ARMS]
    for activation, arm in stages:
        track(f"{activation}, {arm}", int(record.is_done(f"{activation}, {arm}")), 1)
    for activation, arm in stages:
        now = task(activation, arm)
        conclude = partial(one_at_a_time, now) if (activation, arm) == LESSON else lambda *_: []
        stage = f"{activation}, {arm}"
        grids.train_grid(record, stage, now, schedule, grid(settings), dataset, track, conclude)
    if not record.is_done("cost"):
        record.finish("cost", [{"kind": "cost", **step_costs(settings, schedule, dataset)}])


def one_at_a_time(trained: loop.Task, runs: list[dict], variables: dict, arrays: dict) -> list[dict]:
    """Test accuracy of the lesson's network (rate 0.01, deviation 0.05) one image at a time, both ways, per seed."""
    chosen = np.array([run["rate"] == 0.01 and run["deviation"] == 0.05 for run in runs])
    if not chosen.any():
        return []
    variables = jax.tree.map(lambda leaf: leaf[chosen], variables)
    real = int(jnp.sum(arrays["test_labels"] >= 0))
    images, labels = arrays["test_images"][:real, None], arrays["test_labels"][:real]

    @partial(jax.jit, static_argnums=1)
    @partial(jax.vmap, in_axes=(0, None))
    def correct(variables: dict, train: bool) -> jax.Array:
        def predict(image: jax.Array) -> jax.Array:
            return jnp.argmax(trained.apply(variables, data.pixels(image), train=train)[0][0])

        return jnp.mean(jax.lax.map(predict, images) == labels)

    return [{"kind": "one at a time", "batch": correct(variables, True), "population": correct(variables, False)}]


def step_costs(settings: dict, schedule: loop.Schedule, dataset: data.Dataset) -> dict:
    """Seconds per network and step of both arms (relu), one interval of steps each in turns: {arm: [rounds]}."""
    runs = loop.stacked(grid(settings), len(grid(settings)))
    arrays = loop.on_device(dataset)
    per_seed = loop.runs_per_seed(grid(settings))
    programs = {arm: loop.compile_grid(task("relu", arm), schedule, per_seed) for arm in ARMS}
    states = {arm: programs[arm].start(runs, arrays) for arm in ARMS}
    seconds = {arm: [] for arm in ARMS}
    for _ in range(settings["cost_rounds"] + 1):
        for arm in ARMS:
            began = time.perf_counter()
            states[arm], _ = jax.block_until_ready(programs[arm].advance(states[arm], runs, arrays, 0))
            seconds[arm].append((time.perf_counter() - began) / schedule.interval / len(runs["seed"]))
    return {arm: values[1:] for arm, values in seconds.items()}  # the first portion may compile


class Cells:
    """The measured curves, by cell: `accuracy(...)` is [seeds, points]."""

    def __init__(self, rows: list[dict]):
        self.stages = {(a, arm): grids.curves(rows, f"{a}, {arm}") for a in ACTIVATIONS for arm in ARMS}
        self.steps = next(iter(self.stages.values())).steps

    def accuracy(self, activation: str, arm: str, rate: float, deviation: float) -> np.ndarray:
        """Test accuracy along the training of one cell, [seeds, points]."""
        found = self.stages[activation, arm]
        chosen = [run["rate"] == rate and run["deviation"] == deviation for run in found.runs]
        return found.accuracy[chosen]

    def final(self, activation: str, arm: str, rate: float, deviation: float) -> np.ndarray:
        """Test accuracy at the end, [seeds]."""
        return self.accuracy(activation, arm, rate, deviation)[:, -1]

    def gain(self, activations: list[str], rates: list[float], deviations: list[float]) -> np.ndarray:
        """Final accuracy with batch norm minus plain, averaged over cells, [seeds]."""
        cells = [(a, r, d) for a in activations for r in rates for d in deviations]
        plain, normalized = (np.mean([self.final(a, arm, r, d) for a, r, d in cells], axis=0) for arm in ARMS)
        return normalized - plain

    def mean(self, arm: str, activations: list[str], rates: list[float], deviations: list[float]) -> float:
        """Final accuracy of one arm, averaged over cells and seeds."""
        cells = [(a, r, d) for a in activations for r in rates for d in deviations]
        return float(np.mean([self.final(a, arm, r, d) for a, r, d in cells]))

    def steps_to(self, accuracy: float, activation: str, arm: str, rate: float, deviation: float) -> np.ndarray:
        """The first measured step with at least `accuracy`, [seeds]; inf where there is none."""
        reached = self.accuracy(activation, arm, rate, deviation) >= accuracy
        return np.where(reached.any(axis=1), self.steps[reached.argmax(axis=1)], np.inf)

    def diverged(self) -> int:
        """Number of runs whose training loss was not finite at the end."""
        return sum(int(np.isnan(found.loss[:, -1]).sum()) for found in self.stages.values())


def judge(settings: dict, rows: list[dict]) -> list[Verdict]:
    """One verdict per claim of the lesson."""
    cells = Cells(rows)
    return [
        judge_speed(cells),
        judge_gain(
            cells, "Batch norm allows higher learning rates.", list(ACTIVATIONS), [1.0, 2.0], [0.05],
            where="rates 1 and 2, both activations, deviation 0.05",
        ),
        judge_gain(
            cells, "Batch norm makes bad initial weights trainable.", list(ACTIVATIONS), list(RATES), [5.0],
            where="deviation 5, both activations, all rates",
        ),
        judge_gain(
            cells, "Batch norm makes saturating activations usable.", ["sigmoid"], list(RATES), [0.05],
            where="sigmoid, all rates, deviation 0.05",
        ),
        judge_best(cells),
        judge_cost(rows),
        judge_test_time(rows),
    ]  # fmt: skip


def judge_speed(cells: Cells) -> Verdict:
    """Steps to 90%, in the cells where both arms get there."""
    ratios, names = [], []
    for activation in ACTIVATIONS:
        for rate in RATES:
            plain, normalized = (cells.steps_to(LEARNT, activation, arm, rate, 0.05) for arm in ARMS)
            if np.isfinite([plain, normalized]).all():
                ratios.append(plain / normalized)
                names.append(f"{activation} at {rate:g}: {np.median(plain):.0f} against {np.median(normalized):.0f}")
    seeds = cells.final("relu", "plain", RATES[0], 0.05).shape
    effects = np.exp(np.mean(np.log(ratios), axis=0)) if ratios else np.full(seeds, np.nan)
    return verdict(
        "With batch norm a network learns in fewer steps.",
        effects,
        ratio=True,
        threshold=1.0,
        unit="times as many steps without",
        criterion=f"Steps to {LEARNT:.0%} test accuracy, plain over batch norm, geometric mean over the cells of"
        " deviation 0.05 in which every run of both arms gets there; supported above 1.",
        sentence=f"Steps to {LEARNT:.0%}, plain against batch norm (medians): "
        + ("; ".join(names) if names else "no cell in which both arms get there")
        + ".",
    )


def judge_gain(cells: Cells, claim: str, activations, rates, deviations, *, where: str) -> Verdict:
    """The gain in final accuracy over some cells."""
    plain, normalized = (cells.mean(arm, activations, rates, deviations) for arm in ARMS)
    return verdict(
        claim,
        cells.gain(activations, rates, deviations),
        threshold=MATERIAL,
        unit="test accuracy gained",
        criterion=f"Final test accuracy, batch norm minus plain, mean over the cells ({where}); supported above"
        f" {MATERIAL}.",
        sentence=f"Mean final accuracy {normalized:.3f} against {plain:.3f} plain ({where}).",
    )


def judge_best(cells: Cells) -> Verdict:
    """The best cell of each arm."""
    every = [(a, r, d) for a in ACTIVATIONS for r in RATES for d in DEVIATIONS]
    finals = {arm: np.array([cells.final(a, arm, r, d) for a, r, d in every]) for arm in ARMS}
    best = {arm: int(values.mean(axis=1).argmax()) for arm, values in finals.items()}
    plain, normalized = (finals[arm][best[arm]] for arm in ARMS)
    names = {arm: "{}, rate {:g}, deviation {:g}".format(*every[cell]) for arm, cell in best.items()}
    return verdict(
        "Batch norm gives a better final result.",
        normalized - plain,
        threshold=0.0,
        unit="test accuracy gained",
        criterion="Final test accuracy of the best of the 12 cells of each arm (by the mean over seeds), batch norm"
        " minus plain; supported above 0.",
        sentence=f"Best cells: {normalized.mean():.4f} ({names['batch norm']}) against {plain.mean():.4f}"
        f" plain ({names['plain']}).",
    )


def judge_cost(rows: list[dict]) -> Verdict:
    """Time per step."""
    row = next(row for row in rows if row.get("kind") == "cost")
    plain, normalized = (np.array(row[arm]) for arm in ARMS)
    return verdict(
        "A step with batch norm costs more.",
        normalized / plain,
        ratio=True,
        threshold=1.0,
        unit="times the seconds per step",
        criterion="Seconds per network and step (relu grid), batch norm over plain, measured in turns in one process;"
        " interval over the rounds; supported above 1.",
        sentence=f"Median {np.median(normalized) * 1e6:.0f} against {np.median(plain) * 1e6:.0f} microseconds per"
        " network and step on the machine of config.json.",
    )


def test_time(rows: list[dict]) -> dict[str, np.ndarray]:
    """Accuracy one image at a time of the lesson's network, {kind: [seeds]}."""
    found = [row for row in rows if row.get("kind") == "one at a time"]  # one row per part of the grid
    return {kind: np.concatenate([row[kind] for row in found]) for kind in ("batch", "population")}


def judge_test_time(rows: list[dict]) -> Verdict:
    """Batch statistics of one image against population statistics."""
    found = test_time(rows)
    return verdict(
        "At test time a network needs population statistics.",
        found["population"] - found["batch"],
        threshold=POPULATION_GAIN,
        unit="test accuracy gained",
        criterion="Test accuracy one image at a time (relu, rate 0.01, deviation 0.05), population minus batch"
        f" statistics; supported above {POPULATION_GAIN}.",
        sentence=f"One image at a time: {found['population'].mean():.3f} with population statistics,"
        f" {found['batch'].mean():.3f} with those of the image alone (all hidden units then equal their bias).",
    )


def tabulate(settings: dict, rows: list[dict]) -> list[Table]:
    """Ours beside the lesson's: final accuracy, steps to 90%, one image at a time."""
    cells = Cells(rows)
    return [accuracy_table(settings, cells), speed_table(cells), test_time_table(rows)]


def accuracy_table(settings: dict, cells: Cells) -> Table:
    """Final test accuracy of the 24 cells."""
    body = []
    for (activation, deviation), published in PUBLISHED.items():
        for rate, theirs in zip(RATES, published, strict=True):
            ours = [cells.final(activation, arm, rate, deviation) for arm in ARMS]
            name = f"{activation}, {deviation:g}, {rate:g}"
            body.append([name, *map(spread, ours), *(f"{value:.3f}" for value in theirs)])
    return Table(
        "Final test accuracy",
        [CELL, *ARMS, "published plain", "published batch norm"],
        body,
        f"Ours: mean of {settings['seeds']} seeds ± standard deviation, {settings['data']}, {settings['steps']:,}"
        f" steps; {cells.diverged()} of {24 * settings['seeds']} runs ended with a loss that is not finite."
        " Published: one run each on MNIST in full, 50,000 steps.",
    )


def speed_table(cells: Cells) -> Table:
    """Steps to 90% in the 12 pairs of cells."""
    body = []
    for activation, deviation in PUBLISHED:
        for rate in RATES:
            steps = [cells.steps_to(LEARNT, activation, arm, rate, deviation) for arm in ARMS]
            name = f"{activation}, {deviation:g}, {rate:g}"
            body.append([name, *(in_words(values) for values in steps)])
    return Table(
        f"Steps to {LEARNT:.0%} test accuracy",
        [CELL, *ARMS],
        body,
        f"Median over the runs that get there, and how many do; measured every {cells.steps[0]} steps.",
    )


def in_words(steps: np.ndarray) -> str:
    """Median and count of the runs that got there."""
    reached = steps[np.isfinite(steps)]
    if not len(reached):
        return "never"
    return f"{np.median(reached):.0f}" + ("" if len(reached) == len(steps) else f" ({len(reached)}/{len(steps)})")


def test_time_table(rows: list[dict]) -> Table:
    """One image at a time."""
    found = test_time(rows)
    names = {"batch": "statistics of the image alone", "population": "population statistics"}
    return Table(
        "Test accuracy, one image at a time",
        ["prediction with", "ours", "published"],
        [[name, spread(found[kind]), f"{PUBLISHED_ONE_AT_A_TIME[kind]:.2f}"] for kind, name in names.items()],
        "relu, rate 0.01, deviation 0.05. Published: 200 images, after 2,000 steps.",
    )


def draw(settings: dict, rows: list[dict], directory: Path) -> list[plots.Picture]:
    """Test accuracy along training in every cell."""
    cells = Cells(rows)
    title = "How well does an MLP learn digits, with and without batch norm?"
    drawn, axes = plots.figure(title, len(PUBLISHED), len(RATES), size=(3.6, 2.2))
    for line, (activation, deviation) in zip(axes, PUBLISHED, strict=True):
        for ax, rate in zip(line, RATES, strict=True):
            for arm in ARMS:
                found = cells.accuracy(activation, arm, rate, deviation)
                plots.band(ax, cells.steps, found, label=arm, color=plots.COLORS[arm])
            ax.set(xscale="log", ylim=(0, 1.02))
            ax.set_title(f"{activation}, weights' std {deviation:g}, rate {rate:g}", fontsize=9)
            ax.label_outer()
        line[0].set_ylabel("test accuracy")
    for ax in axes[-1]:
        ax.set_xlabel("training step (log scale)")
    axes[0, 2].legend(loc="center right", fontsize=9, frameon=False)
    caption = (
        f"Test accuracy along training in the 12 pairs of cells. Line: mean of {settings['seeds']} seeds, band: their"
        f" range; {settings['data']}."
    )
    drawn.supxlabel(caption, fontsize=9)
    return [plots.save(drawn, directory, "accuracy.png", caption)]
