"""Does batch norm let a network of 21 layers learn at all? The exercise of Udacity's batch-norm lesson.

Claim: a network of 19 convolutions and two dense layers, which learns next to nothing plain, reaches 97% with batch
norm in the same 800 steps.

Source: Udacity, Deep Learning Foundations, "Batch Normalization - Exercises" and their solution.

Protocol: convolution i (1 to 19) has 4 i filters of 3 x 3, stride 2 if 3 divides i, zero padding; then dense 100 and
dense 10; ReLU; Glorot-uniform weights; batch 64; 800 steps of Adam at 0.002 on the cross-entropy of a sigmoid per
class, averaged over the classes. With batch norm (decay 0.99, epsilon 0.001) the convolutions and the dense layer of
100 lose their bias and are normalized before the activation; the output layer is the same in both. Both arms of a
seed start from the same weights and see the same batches. The exercise trained once on all of MNIST, which is the
preset `full`.

The loss is the exercise's own and an unusual choice for exclusive classes. The preset `softmax` is `cpu` with the
usual one in its place: it was run first, and asks whether the claim hangs on that choice.

    python -m experiments run deep_conv

takes about eight minutes on two cores (800 steps, 3 seeds, 5,000 digits). The criteria were fixed before the first
full run.
"""

import functools
from pathlib import Path

import optax

import jaxbn
from experiments.framework import grid as grids
from experiments.framework import plots
from experiments.framework.display import Track
from experiments.framework.record import Record
from experiments.framework.tables import Table, spread
from experiments.framework.verdict import Verdict, verdict
from experiments.training import data, loop, models

SOURCE = "Udacity, Deep Learning Foundations: Batch Normalization - Exercises"

PRESETS = {
    "smoke": {"seeds": 2, "data": "mnist5k", "depth": 4, "steps": 8, "interval": 4, "loss": "sigmoid"},
    "cpu": {"seeds": 3, "data": "mnist5k", "depth": 19, "steps": 800, "interval": 50, "loss": "sigmoid"},
    "full": {"seeds": 5, "data": "hub:mnist", "depth": 19, "steps": 800, "interval": 50, "loss": "sigmoid"},
    "softmax": {"seeds": 3, "data": "mnist5k", "depth": 19, "steps": 800, "interval": 50, "loss": "softmax"},
}

LOSSES = {"sigmoid": loop.sigmoid_loss, "softmax": loop.softmax_loss}
BATCH_SIZE = 64
RATE = 0.002
ARMS = ("plain", "batch norm")
PUBLISHED = {"plain": 0.122, "batch norm": 0.975}  # test accuracy after 800 steps, MNIST in full, one run

# Thresholds, in test accuracy.
MATERIAL_GAIN = 0.5  # published: 0.85
GOOD = 0.95  # "over 95%"


@functools.cache
def task(arm: str, depth: int, loss: str) -> loop.Task:
    """The network of one arm under Adam."""
    normalized = arm == "batch norm"
    norm = jaxbn.batch_norm(decay=0.99, epsilon=1e-3) if normalized else jaxbn.identity()
    network = models.deep_conv(depth, norm, use_bias=not normalized)
    return loop.Task(
        lambda run, key, x: network.init(key, x), network.apply, lambda run: optax.adam(RATE), LOSSES[loss]
    )


def run(settings: dict, record: Record, track: Track) -> None:
    """Train both arms."""
    dataset = data.load(settings["data"])
    runs = [{"seed": seed} for seed in range(settings["seeds"])]
    for arm in ARMS:
        track(arm, int(record.is_done(arm)), 1)
    schedule = loop.Schedule(settings["steps"], settings["interval"], BATCH_SIZE)
    for arm in ARMS:
        trained = task(arm, settings["depth"], settings["loss"])
        grids.train_grid(record, arm, trained, schedule, runs, dataset, track)


def judge(settings: dict, rows: list[dict]) -> list[Verdict]:
    """The gain, and how far batch norm gets."""
    plain, normalized = (grids.curves(rows, arm).accuracy[:, -1] for arm in ARMS)
    found = (
        f"Final test accuracy {normalized.mean():.3f} with batch norm, {plain.mean():.3f} plain"
        f" ({settings['loss']} loss)."
    )
    return [
        verdict(
            "Batch norm makes a deep network trainable that is not so plain.",
            normalized - plain,
            threshold=MATERIAL_GAIN,
            unit="test accuracy gained",
            criterion=f"Test accuracy after the last step, batch norm minus plain; supported above {MATERIAL_GAIN}.",
            sentence=found,
        ),
        verdict(
            f"With batch norm it gets over {GOOD:.0%}.",
            normalized,
            threshold=GOOD,
            unit="test accuracy",
            criterion=f"Test accuracy after the last step with batch norm; supported above {GOOD}.",
            sentence=found,
        ),
    ]


def tabulate(settings: dict, rows: list[dict]) -> list[Table]:
    """Ours beside the published figures."""
    body = []
    for arm in ARMS:
        found = grids.curves(rows, arm)
        halfway = found.accuracy[:, len(found.steps) // 2 - 1]
        body.append([arm, spread(halfway), spread(found.accuracy[:, -1]), f"{PUBLISHED[arm]:.3f}"])
    steps = grids.curves(rows, ARMS[0]).steps
    return [
        Table(
            f"Test accuracy of {settings['depth']} convolutions and 2 dense layers, {settings['loss']} loss",
            ["network", f"step {steps[len(steps) // 2 - 1]}", f"step {steps[-1]}", "published, step 800"],
            body,
            f"Ours: mean of {settings['seeds']} seeds ± standard deviation, {settings['data']}. Published: one run on"
            " MNIST in full, 55,000 digits, sigmoid loss.",
        )
    ]


def draw(settings: dict, rows: list[dict], directory: Path) -> list[plots.Picture]:
    """Test accuracy and training loss along training."""
    drawn, axes = plots.figure(
        f"Does a network of {settings['depth'] + 2} layers learn digits, with and without batch norm?",
        1,
        2,
        size=(5, 3.6),
    )
    for arm in ARMS:
        found = grids.curves(rows, arm)
        style = {"label": arm, "color": plots.COLORS[arm]}
        plots.band(axes[0, 0], found.steps, found.accuracy, **style)
        plots.band(axes[0, 1], found.steps, found.loss, **style)
        if settings["depth"] == 19:
            axes[0, 0].axhline(PUBLISHED[arm], color=plots.COLORS[arm], linestyle=":", linewidth=1)
    axes[0, 0].set(xlabel="training step", ylabel="test accuracy", ylim=(0, 1.02), title="Accuracy on the test set")
    axes[0, 1].set(
        xlabel="training step", ylabel=f"cross-entropy, {settings['loss']} (nats)", yscale="log", title="Training loss"
    )
    axes[0, 1].legend(frameon=False)
    axes[0, 0].legend(frameon=False, loc="center right")
    caption = f"Line: mean of {settings['seeds']} seeds, band: their range ({settings['data']}). Dotted: published."
    drawn.supxlabel(caption, fontsize=9)
    return [plots.save(drawn, directory, "accuracy.png", caption)]
