"""What does batch norm cost, and is training shorter all the same?

Protocol, one step. An MLP 784-100-100-100-10 (batch 60, the lesson's), LeNet (64) and a residual network of 8 layers
(32), SGD on digits, each step one compiled program with donated buffers: without norm; with batch norm; and with
the scale and shift of batch norm alone, its statistics constants (`jaxbn.frozen`), which is the control that takes away
measuring the batch and going back through it. Also predictions at test time. All programs of a network run in turns in
one process, in an order drawn anew each round; what is judged is the ratio within a round, n = 50 rounds.

Protocol, batch size. Steps of LeNet at batches of 8 to 2,048, likewise in turns: examples per second, and the memory
that the compiled program asks for beside its arguments, which is counted, not timed.

Protocol, training. The MLP (weights of deviation 0.05, decay 0.99 as in the lesson) learns the digits without and with
batch norm, each at the rate that is best on validation, by the same search. Time to an accuracy: steps to it on test
(measured every 20 steps) times the median seconds of a step of one such network, so n = 10 seeds.

A first run, with 20 rounds and seeds 0 to 9, claimed in one sentence that it is the statistics that cost and that scale
and shift are nearly free, and judged it by scale and shift alone. They made a step 1.07 times as long, and the
statistics on top of them 1.04 times. So there are two claims now, and it was measured again, with 50 rounds and seeds
from 100 on.

`python -m experiments run cost` takes about four minutes on two cores, and wants a machine with nothing else to do. The
rounds share a process and its compiled programs: another process may lie differently in memory.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from matplotlib.axes import Axes

import jaxbn
from experiments.aot.hlo import temporary_bytes
from experiments.framework.claim import Claim, Compared
from experiments.framework.experiment import WHEN_IT_HELPS, Experiment, Grid, Search, Settings, Stage
from experiments.framework.pictures import COLORS, lines, panels
from experiments.framework.results import first_step_with
from experiments.framework.tables import table_of
from experiments.framework.timing import interleaved
from experiments.training import data, loop, models, one_step, resnet

ARMS = PLAIN, NORMALIZED = "plain", "batch norm"
AFFINE = "scale and shift only"
NORM = jaxbn.batch_norm(decay=0.99, epsilon=1e-3)
NORMS = {PLAIN: jaxbn.identity(), AFFINE: jaxbn.frozen(NORM), NORMALIZED: NORM}
COLOR = {PLAIN: COLORS[PLAIN], AFFINE: "#8c8c8c", NORMALIZED: COLORS[NORMALIZED]}
HIDDEN, BATCH_SIZE, DEVIATION = (100, 100, 100), 60, 0.05  # of the lesson
STEP, PREDICTION = "step", "prediction"
LEVELS = (0.8, 0.85, 0.9)  # test accuracies to which time is taken
LESSON = "Udacity, Deep Learning Foundations: Batch Normalization - Lesson"
PLAYBOOK = "Godbole et al. 2023, Deep Learning Tuning Playbook (as remembered)"
# Steps per second of the lesson's first two networks, on one unknown machine: 42 and 93 seconds for 50,000 steps.
PUBLISHED = xr.DataArray([[1183.34, 533.50]], {"network": ["MLP"], "norm": list(ARMS)})


@dataclass(frozen=True, kw_only=True)
class Sizes(Settings):
    """And how often is timed, which networks, and the batches of LeNet."""

    rounds: int = 50
    networks: tuple[str, ...] = ("MLP", "LeNet", "ResNet-8")
    batches: tuple[int, ...] = (8, 32, 128, 512, 2048)


def mlp(norm: jaxbn.Normalizer, use_bias: bool) -> models.Network:
    """The lesson's."""
    weights = models.normal_weights(DEVIATION)
    return models.mlp(HIDDEN, norm, use_bias=use_bias, activation=jax.nn.relu, weights=weights)


def lenet(norm: jaxbn.Normalizer, use_bias: bool) -> models.Network:
    """LeNet with ReLU."""
    return models.lenet(norm, use_bias=use_bias, activation=jax.nn.relu)


# Of each network its batch size, and how it is built of a norm and whether its layers have a bias beside it.
NETWORKS: Mapping[str, tuple[int, Callable]] = {
    "MLP": (BATCH_SIZE, mlp),
    "LeNet": (64, lenet),
    "ResNet-8": (32, lambda norm, use_bias: resnet.small_resnet(8, norm)),
}


def task(settings: Sizes, arm: str) -> loop.Task:
    """Training the MLP of one arm at the run's "rate"."""
    network = mlp(NORMS[arm], use_bias=arm == PLAIN)
    return loop.Task(lambda run, key, x: network.init(key, x), network.apply, lambda run: optax.sgd(run["rate"]))


def built(network: str, norm: str) -> models.Network:
    """A network with one of the NORMS."""
    return NETWORKS[network][1](NORMS[norm], norm == PLAIN)


def examples(settings: Sizes, count: int) -> tuple[jax.Array, jax.Array]:
    """Digits (float32) and their labels; some come again where there are too few."""
    dataset = data.load(settings.data)
    index = np.resize(data.spread(len(dataset.train_labels), len(dataset.train_labels)), count)
    return data.pixels(jnp.asarray(dataset.train_images[index])), jnp.asarray(dataset.train_labels[index])


def steps(settings: Sizes) -> xr.Dataset:
    """`seconds` of a step and of a prediction, [network, mode, norm, round], in turns within each network."""
    found = []
    for name in settings.networks:
        x, labels = examples(settings, NETWORKS[name][0])
        networks = {norm: built(name, norm) for norm in NORMS}
        timed = {f"{STEP} {norm}": one_step.training(of, optax.sgd(0.01), x, labels) for norm, of in networks.items()}
        timed |= {f"{PREDICTION} {norm}": one_step.prediction(of, x) for norm, of in networks.items()}
        turns = interleaved({program: one.run for program, one in timed.items()}, settings.rounds)
        found.append([[turns[f"{mode} {norm}"] for norm in NORMS] for mode in (STEP, PREDICTION)])
    axes = {"network": list(settings.networks), "mode": [STEP, PREDICTION], "norm": list(NORMS)}
    return xr.Dataset({"seconds": ((*axes, "round"), np.array(found))}, axes)


def by_batch(settings: Sizes) -> xr.Dataset:
    """LeNet's examples per second of training [batch, norm, round], and the bytes of memory of a step [batch, norm]."""
    networks = {norm: built("LeNet", norm) for norm in ARMS}
    timed = {
        f"{batch} {norm}": one_step.training(network, optax.sgd(0.01), *examples(settings, batch))
        for batch in settings.batches
        for norm, network in networks.items()
    }
    turns = interleaved({program: one.run for program, one in timed.items()}, settings.rounds)
    rate = [[batch / turns[f"{batch} {norm}"] for norm in ARMS] for batch in settings.batches]
    memory = [[temporary_bytes(timed[f"{batch} {norm}"].compiled) for norm in ARMS] for batch in settings.batches]
    axes = {"batch": list(settings.batches), "norm": list(ARMS)}
    return xr.Dataset({"examples": ((*axes, "round"), rate), "memory": (tuple(axes), memory)}, axes)


def seconds(r: xr.Dataset, mode: str = STEP) -> xr.DataArray:
    """Of a step or of a prediction, [network, norm, round]."""
    return r.seconds.sel(mode=mode, norm=list(NORMS), drop=True)


def examples_per_second(r: xr.Dataset) -> xr.DataArray:
    """Of LeNet's training, [batch, norm, round]."""
    return r.examples.sel(norm=list(ARMS)).rename("rate")


def memory(r: xr.Dataset) -> xr.DataArray:
    """MiB that a step of LeNet asks for, [batch, norm]."""
    return r.memory.sel(norm=list(ARMS)) / 2**20


def over_plain(r: xr.Dataset) -> xr.DataArray:
    """Seconds over those without norm, within a round: [network, mode, norm, round]."""
    both = r.seconds.sel(mode=[STEP, PREDICTION], norm=list(NORMS))
    return both / both.sel(norm=PLAIN)


def by_statistics(r: xr.Dataset) -> xr.DataArray:
    """The factor by which statistics lengthen a step that has scale and shift, [network, round]."""
    return Compared(seconds, NORMALIZED, AFFINE, "norm", ratio=True)(r)


def by_affine(r: xr.Dataset) -> xr.DataArray:
    """The factor by which scale and shift lengthen a step, [network, round]."""
    return Compared(seconds, AFFINE, PLAIN, "norm", ratio=True)(r)


def both_factors(r: xr.Dataset) -> str:
    """What both come to over all networks, in a sentence."""
    affine, statistics = (float(np.exp(np.log(factor(r)).mean())) for factor in (by_affine, by_statistics))
    return f"Scale and shift make a step {affine:.3f} times as long, and statistics make that {statistics:.3f} times."


def parts_of_time(r: xr.Dataset) -> xr.DataArray:
    """Seconds over those of another norm, and the geometric mean of all networks, [network, mode, over, round]."""
    both = r.seconds.sel(mode=[STEP, PREDICTION])
    pairs = [(NORMALIZED, PLAIN), (AFFINE, PLAIN), (NORMALIZED, AFFINE)]
    over = xr.concat([both.sel(norm=a, drop=True) / both.sel(norm=b, drop=True) for a, b in pairs], "over")
    over = over.assign_coords(over=[f"{a} over {b}" for a, b in pairs])
    mean = np.exp(np.log(over).mean("network")).expand_dims(network=["geometric mean"])
    return xr.concat([over, mean], "network")


def step_seconds(r: xr.Dataset) -> xr.DataArray:
    """The median seconds of a step of the MLP, [arm]."""
    return seconds(r).sel(network="MLP", drop=True).sel(norm=list(ARMS)).median("round").rename(norm="arm")


def time_to_learn(r: xr.Dataset) -> xr.DataArray:
    """Seconds to each of LEVELS, [accuracy, arm, seed]; nan for a run that does not get there."""
    found = [first_step_with(r.test_accuracy, level).expand_dims(accuracy=[level]) for level in LEVELS]
    return xr.concat(found, "accuracy") * step_seconds(r)


def more_examples(r: xr.Dataset, larger: int, smaller: int) -> xr.DataArray:
    """How many times as many examples per second at one place of the batches as at another, [norm, round]."""
    rate = examples_per_second(r)
    return rate.isel(batch=larger, drop=True) / rate.isel(batch=smaller, drop=True)


def draw_steps(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """The time of a step of every network over that without norm."""
    over = over_plain(r).sel(mode=STEP)
    places = np.arange(over.sizes["network"])
    for number, norm in enumerate(NORMS):
        values = over.sel(norm=norm).transpose("network", "round").values
        ax.bar(places + 0.27 * (number - 1), np.median(values, axis=1), 0.25, color=COLOR[norm], label=norm)
        if norm != PLAIN:
            spread = np.percentile(values, [25, 75], axis=1)
            ax.vlines(places + 0.27 * (number - 1), *spread, color="black", linewidth=1)
    ax.plot(places[0] + 0.27, 1183.34 / 533.50, "D", color="black", label="published (TensorFlow 1)")
    ax.set_xticks(places, over.network.values)
    ax.set(ylabel="time of a step, without norm = 1", title="Is a step longer?")
    ax.set_ylim(0, max(3.0, 1.25 * float(over.median("round").max())))
    ax.legend(frameon=False, fontsize=8, loc="upper right")


def draw_training(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """Test accuracy of both arms along the time."""
    for arm in ARMS:
        values = r.test_accuracy.sel(arm=arm).transpose("seed", "step")
        time = r.step.values * float(step_seconds(r).sel(arm=arm))
        ax.plot(time, values.mean("seed"), color=COLOR[arm], label=arm)
        ax.fill_between(time, values.min("seed"), values.max("seed"), color=COLOR[arm], alpha=0.2, linewidth=0)
    ax.set(xlabel="seconds of training (one MLP)", ylabel="test accuracy", ylim=(0, 1.02))
    ax.set_title("Is the whole training shorter?")
    ax.legend(frameon=False, fontsize=8, loc="lower right")


def draw_batches(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """Examples per second and memory against the batch size."""
    right = ax.twinx()
    for norm, marker in zip(ARMS, "os", strict=True):
        rate = examples_per_second(r).sel(norm=norm)
        lines(ax, rate, x="batch", color=COLOR[norm], marker=marker, label=f"{norm}: examples per second")
        right.plot(r.batch, memory(r).sel(norm=norm), "--", color=COLOR[norm], marker=marker, markerfacecolor="none")
        ax.plot([], [], "--", color=COLOR[norm], label=f"{norm}: memory")
    right.set(yscale="log", ylabel="memory of a step, MiB (dashed)")
    right.grid(False)
    right.spines["right"].set_visible(True)
    ax.set(xscale="log", xlabel="batch size", ylabel="examples per second", title="Fill the device, or the memory?")
    ax.set_ylim(0, None)
    ax.set_xticks(settings.batches, [f"{batch:,}" for batch in settings.batches])
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize=8, loc="lower right")


over_rounds = partial(Claim, over="round", ratio=True)
in_turns = partial(over_rounds, unit="times the seconds")

EXPERIMENT = Experiment(
    title="A step with batch norm is longer, and the whole training shorter.",
    question="What does batch norm cost, and is training shorter all the same?",
    source=LESSON,
    citation=f"{LESSON} (notebook Batch_Normalization_Lesson). Varun Godbole, George Dahl, Justin Gilmer, Christopher"
    " Shallue and Zachary Nado 2023, Deep Learning Tuning Playbook.",
    theme=WHEN_IT_HELPS,
    answer={
        "cpu": "On two cores a compiled step with batch norm took 1.20 times as long in an MLP, 1.15 in LeNet and"
        " 1.07 in a small residual network, where the lesson's took 2.2 times. The whole training of the MLP was"
        " shorter all the same: 0.42, 0.51 and 0.53 of the seconds to 80, 85 and 90% of the test digits.",
    },
    reader_questions={
        "Why does training get shorter although a step is longer?": (
            "Because it takes fewer steps: with each at its best rate the MLP came to 90% of the test digits in 136"
            " steps in place of 318. A step was 1.20 times as long, so that it took half the seconds."
        ),
        "Should a batch fill the memory?": (
            "Not on a CPU: LeNet took most examples per second at batches of 128. At 2,048 it took fewer, and a"
            " step asked for nearly sixteen times the memory."
        ),
    },
    surprise="It is not the statistics alone that cost: in 50 rounds scale and shift without any statistics made a"
    " step 6% longer (4% to 9%), and the statistics added 7% to that. Which of the two costs more 50 rounds do not"
    " tell.",
    differs="The lesson feeds every batch from Python to TensorFlow 1 and shows the steps per second of one run; here"
    " a step is one compiled program whose batch lies on the device, and every arm trains at its own best rate, on"
    " fewer digits (the preset full has all of MNIST and the lesson's 50,000 steps).",
    settings={
        "smoke": Sizes(seeds=2, data="mnist5k", steps=4, interval=2, rounds=2, networks=("MLP",), batches=(2, 4)),
        "cpu": Sizes(seeds=10, first_seed=100, data="mnist5k", steps=800, interval=20),
        "full": Sizes(seeds=10, data="mnist", steps=50_000, interval=500),
    },
    grid=Grid(
        task, BATCH_SIZE, {"arm": ARMS},
        search=Search("rate", (0.03, 0.1, 0.3, 1.0), extensions=2, least_steps=10),
    ),
    stages=lambda settings: [
        Stage("steps", partial(steps, settings)),
        Stage("batches", partial(by_batch, settings)),
    ],
    claims=[
        in_turns(
            "A step with batch norm takes longer.", Compared(seconds, NORMALIZED, PLAIN, "norm", ratio=True),
            measures="seconds of a training step of each network, within a round", above=1.0, precision=0.1,
        ),
        in_turns(
            "A step with batch norm takes more than twice as long.",
            Compared(lambda r: seconds(r).sel(network="MLP", drop=True), NORMALIZED, PLAIN, "norm", ratio=True),
            measures="seconds of a training step of the lesson's MLP, within a round", above=2.0,
        ),
        in_turns(
            "Scale and shift alone cost next to nothing.", Compared(seconds, AFFINE, PLAIN, "norm", ratio=True),
            measures="seconds of a training step of each network, within a round, with constants for statistics",
            equal=0.05, source="the control is ours",
            standalone="Scale and shift of batch norm, without its statistics, make a training step hardly longer.",
        ),
        over_rounds(
            "Most of what batch norm costs a step is its statistics.", lambda r: by_statistics(r) / by_affine(r),
            measures="the factor by which statistics lengthen a training step of each network that has scale and shift,"
            " over the factor by which scale and shift lengthen it without norm, within a round",
            unit="times the other factor", above=1.0, precision=0.05, found=both_factors, source="the control is ours",
            standalone="Most of the time that batch norm adds to a training step goes to its statistics, not to its"
            " scale and shift.",
        ),
        in_turns(
            "At test time batch norm is nearly free.",
            Compared(partial(seconds, mode=PREDICTION), NORMALIZED, PLAIN, "norm", ratio=True),
            measures="seconds of a prediction for a batch of each network, within a round", equal=0.1, source="ours",
            standalone="At test time batch norm makes a prediction hardly slower.",
        ),
        Claim(
            "A step with batch norm asks for at most a quarter more memory.",
            lambda r: (Compared(memory, NORMALIZED, PLAIN, "norm", ratio=True)(r) - 1).clip(0),
            measures="share of memory that LeNet's step asks for beyond that without norm, by its compiled program, at"
            " every batch size",
            unit="of the memory", exact=0.25, over="batch", source="ours",
            standalone="A training step of LeNet with batch norm asks for at most a quarter more memory than one"
            " without.",
        ),
        Claim(
            "Though a step is longer, the whole training is shorter.",
            Compared(time_to_learn, PLAIN, NORMALIZED, ratio=True),
            measures="seconds to a test accuracy of 80%, 85% and 90%, where every run gets there, of the MLP, each arm"
            " at its best rate (steps of each seed times the median seconds of a step)",
            unit="times the seconds", above=1.0, precision=0.1,
            standalone="Though a step with batch norm takes longer, the whole training takes less time than without.",
        ),
        over_rounds(
            "A batch twice as large gives about twice the examples per second while the device is not full.",
            lambda r: more_examples(r, 1, 0) ** (1 / np.log2(r.batch[1] / r.batch[0])),
            measures="examples per second of LeNet's training, per doubling between the two smallest batches",
            unit="times per doubling", above=1.8, source=PLAYBOOK,
        ),
        over_rounds(
            "Once the device is full a larger batch takes memory and gives no speed.",
            lambda r: more_examples(r, -1, -2),
            measures="examples per second of LeNet's training, the largest batch over the second largest (which needs a"
            " quarter of the memory)",
            unit="times the examples per second", equal=0.2, source=PLAYBOOK,
            standalone="Once batches fill the device, a larger batch takes more memory and gives no more examples per"
            " second.",
        ),
    ],
    tables=[
        table_of(
            "Training steps per second", lambda r: 1 / seconds(r), rows=["network"], columns="norm", form=".0f",
            published=PUBLISHED, over="round",
            note="Published: one run, as its progress display shows it; TensorFlow 1, batches fed from Python.",
        ),
        table_of(
            "Time over that of another norm, within a round", parts_of_time,
            rows=["network", "mode"], columns="over", form=".3f", over="round",
            note=f"'{NORMALIZED} over {AFFINE}' is what statistics add; '{AFFINE} over {PLAIN}', what the rest adds.",
        ),
        table_of(
            "Seconds of training to a test accuracy (MLP)", time_to_learn, rows=["accuracy"], columns="arm", form=".3f",
        ),
        table_of(
            "Training steps to a test accuracy (MLP)", lambda r: time_to_learn(r) / step_seconds(r),
            rows=["accuracy"], columns="arm", form=".0f",
        ),
        table_of(
            "Training examples per second, by batch size (LeNet)", examples_per_second,
            rows=["norm"], columns="batch", form=".0f", over="round",
        ),
        table_of(
            "Memory that a training step asks for, MiB, by batch size (LeNet)",
            lambda r: memory(r).expand_dims("program"),
            rows=["norm"], columns="batch", form=".2f", over="program",
            note="What the compiled program allocates beside its arguments and results; counted, not timed.",
        ),
    ],
    pictures=[
        panels(
            draw_steps, draw_training, draw_batches, file="cost.png", size=(4.6, 4.2),
            title="What does batch norm cost, and is training shorter all the same?",
            caption="Left: medians over rounds of the ratio within a round, and quartiles; the published figure is the"
            " lesson's, 1,183 against 533 steps per second. Middle: means over seeds, bands their range, each arm at"
            " its best rate. Right: LeNet; the memory of a step is what its program allocates.",
        )
    ],
)  # fmt: skip
