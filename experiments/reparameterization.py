"""Batch norm gives a network new parameters for the same functions: what changes, and what does adding no more do?

At the start: 256 digits, MLP 196-200-200-10 with relu, softmax loss. One plain network, the same with a scale of 1 and
a bias of 0 to be learned, and its twin with batch norm (scale and bias are the deviation and the mean of what they
replace) compute the same function; from there they walk 100 steps of gradient descent at 0.1 on these digits. The twin
also walks with weight decay and with Adam: what becomes of the bias in front of the normalization? In float64: what a
factor on the weights of a layer does to outputs and gradients.

Trained: the same MLP, batch 60, SGD, five networks (linear; linear with 32 of the 200 units; relu; sigmoid;
sigmoid(4 h), whose normalized inputs leave the linear part) x five arms (ARMS). Each of the 25 has its rate chosen on
validation from the same values; results are of fresh seeds, on test. They are trained as well with the initial weights
of the last hidden layer times 0.01 and times 100, at the rate that was chosen without that. Digits are averaged
down to 14 x 14, so that a hidden layer can be wider than its input.

`python -m experiments run reparameterization` takes about eight minutes of processor time, four on two cores that do
nothing else (500 steps, 10 seeds, 5,000 digits). By a pilot of three other seeds, with layers of 256 and 600 steps, the
claims need 3 to 11 seeds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import optax
import xarray as xr
from matplotlib.axes import Axes

from experiments.framework.claim import Claim, Compared
from experiments.framework.experiment import WHAT_IT_IS, Experiment, Grid, Search, Settings, Stage, Trained
from experiments.framework.pictures import COLORS, lines, panels
from experiments.framework.results import final
from experiments.framework.tables import table_of
from experiments.training import data, loop, same_function
from experiments.training import reparameterized as network

NETWORKS = {
    "linear": {"activation": network.LINEAR, "width": network.WIDTH},
    "linear, 32 wide": {"activation": network.LINEAR, "width": 32},
    "relu": {"activation": network.RELU, "width": network.WIDTH},
    "sigmoid": {"activation": network.SIGMOID, "width": network.WIDTH},
    "sigmoid(4 h)": {"activation": network.STEEP_SIGMOID, "width": network.WIDTH},
}
ARMS = {
    "plain": {"normalize": 0, "learned": 0, "lower": 1},
    "scale and bias alone": {"normalize": 0, "learned": 1, "lower": 1},
    "normalization alone": {"normalize": 1, "learned": 0, "lower": 1},
    "batch norm": {"normalize": 1, "learned": 1, "lower": 1},
    "last layer alone": {"normalize": 1, "learned": 1, "lower": 0},  # trained, with batch norm below it
}
CURVED = ["relu", "sigmoid"]
SHADES = {**COLORS, "scale and bias alone": "#de8f05", "normalization alone": "#029e73", "last layer alone": "#949494"}


@dataclass(frozen=True, kw_only=True)
class Sizes(Settings):
    """And units of a hidden layer, and steps of a walk."""

    width: int = network.WIDTH
    walk: int = 100


@cache
def task(settings: Sizes) -> loop.Task:
    """All networks and arms: they differ in numbers of the run."""

    def optimizer(run: dict) -> optax.GradientTransformation:
        return optax.chain(optax.sgd(run["rate"]), network.trained(run))

    return loop.Task(partial(network.init, width=settings.width), network.apply, optimizer)


def linear_part(trained: Trained) -> dict:
    """How much of what the last hidden layer does to test images is a straight line."""
    x = network.shrink(data.pixels(trained.arrays["test_images"]))
    return {"linear_part": ((), network.linear_parts(trained.variables, x))}


def stages(settings: Sizes) -> Iterator[Stage]:
    """What needs no training but a walk of some steps."""
    sizes = {"width": settings.width, "steps": settings.walk}
    yield Stage("same function", lambda: same_function.measure(data.load(settings.data), settings.every_seed, **sizes))


def accuracy(r: xr.Dataset, **cells: object) -> xr.DataArray:
    """Final test accuracy in some of the cells."""
    return final(r.test_accuracy).sel(**cells)


def unscaled(r: xr.Dataset, networks: list[str]) -> xr.DataArray:
    """Final test accuracy of these networks with their usual initial weights."""
    return accuracy(r, times=1.0, network=networks)


def change_by_scaling(r: xr.Dataset, arm: str) -> xr.DataArray:
    """Test accuracy with the last hidden layer's weights times 100, minus that without, at the same rate."""
    networks = ["linear", *CURVED]
    return accuracy(r, arm=arm, times=100.0, network=networks) - unscaled(r, networks).sel(arm=arm)


def figures_of_walks(r: xr.Dataset) -> xr.DataArray:
    """What a walk did, along "figure"."""
    by_others = {f"mean moved by others, layer {n}": r.elsewhere.sel(layer=n, drop=True) for n in r.layer.values}
    return xr.Dataset({"apart": r.apart, **by_others, "drift": r.drift}).to_dataarray("figure")


def draw_walks(ax: Axes, settings: Settings, r: xr.Dataset) -> None:
    """The loss from the same function on, for the three parameterizations."""
    shown = r.losses.sel(walk=list(same_function.WALKS)[:3]).rename("loss").assign_coords(update=range(settings.walk))
    lines(ax, shown, "update", hue="walk", style="walk", palette=SHADES)
    ax.set(xlabel="gradient step", ylabel="training loss", title="The same function at step 0,\nanother path")
    ax.legend(frameon=False)


def draw_arms(arms: list[str], networks: list[str], title: str, ax: Axes, settings: Settings, r: xr.Dataset) -> None:
    """Final test accuracy: the median of each arm, and its range over seeds as far as the panel reaches."""
    lowest = 0.72
    for number, arm in enumerate(arms):
        values = unscaled(r, networks).sel(arm=arm).transpose("network", "seed").values
        places, medians = np.arange(len(networks)) + 0.16 * (number - (len(arms) - 1) / 2), np.median(values, 1)
        ends = np.abs(np.stack([np.maximum(values.min(1), lowest), values.max(1)]) - medians)
        ax.errorbar(places, medians, ends, fmt="osD^v"[list(ARMS).index(arm)], color=SHADES[arm], label=arm)
        for place, below in zip(places, (values < lowest).sum(1), strict=True):
            if below:
                words = f"{below} of {settings.seeds} seeds\nare lower"
                ax.annotate(words, (place, lowest), (5, 3), textcoords="offset points", fontsize=8)
    ax.set_xticks(range(len(networks)), [name.replace(", ", ",\n") for name in networks])
    ax.set(ylabel="test accuracy", title=title, ylim=(lowest, 0.99))
    ax.legend(frameon=False, ncols=2, loc="upper left", fontsize=8)


def draw_scaling(ax: Axes, settings: Settings, r: xr.Dataset) -> None:
    """Final test accuracy by the factor on a layer's initial weights, with batch norm and without."""
    for name, style in {"linear": "-", "relu": ":", "sigmoid": "--"}.items():
        for arm in ("plain", "batch norm"):
            shown = accuracy(r, network=name, arm=arm).mean("seed").sortby("times")
            ax.plot(shown.times, shown, style, marker="o", color=SHADES[arm], label=f"{name}, {arm}")
    ax.set(xscale="log", xlabel="factor on the initial weights of one layer", ylabel="test accuracy", ylim=(0, 1))
    ax.set_xticks([0.01, 1, 100], ["0.01", "1", "100"])
    ax.minorticks_off()
    ax.set_title("One layer's weights scaled,\nat the rate chosen without")
    ax.legend(frameon=False, fontsize=8)


exactly = partial(Claim, unit="relative")
gains = partial(Claim, unit="of test accuracy")
IOFFE = "Ioffe and Szegedy 2015"

EXPERIMENT = Experiment(
    title="Scale and bias after a normalization are new parameters for the same functions, learned another way.",
    question="Why standardize a unit and then let it learn any mean and deviation again?",
    source="Goodfellow, Bengio and Courville, Deep Learning, section 8.7.1",
    citation="I. Goodfellow, Y. Bengio and A. Courville, Deep Learning, MIT Press 2016, section 8.7.1",
    theme=WHAT_IT_IS,
    answer={
        "cpu": "Scale and bias make a unit's mean and deviation parameters of their own: with batch norm the mean is"
        " its bias alone, where without it 83% to 97% of its change came from the weights and layers below. Without"
        " the learned scale and bias, sigmoids stayed in their linear part, which cost our MLP 1.7 points of accuracy;"
        " with ReLU they made no difference.",
    },
    surprise="A bias in front of batch norm has no effect and a gradient of 0, so it should move by weight decay only."
    " Adam moved it all the same, by up to 5% of its size in 100 steps, since it divides the rounding errors of that 0"
    " by their own size.",
    reader_questions={
        "What differs from adding a linear layer?": "A learned scale and bias without normalization are such a layer:"
        " 83% to 95% of the change of a unit's mean still came from the weights and layers below, where with the"
        " normalization in between the mean is the bias, to rounding. Trained, they gained nothing over our plain"
        " networks that ten seeds could show, and with ReLU 2 of 10 networks diverged at the rate that was chosen.",
        "Why normalize a unit and then let it learn any mean and deviation again?": "Because mean and deviation are"
        " then two parameters of their own that gradient descent moves directly, instead of a result of all that lies"
        " below. With sigmoids they are needed as well: without them a straight line explained 98.8% of what a unit of"
        " our MLP did, and accuracy was 1.7 points lower; with ReLU they made no difference (-0.1 to 0.2 points).",
        "Should a layer in front of batch norm have a bias?": "No: its gradient is 0, so that it moves by weight decay"
        " only, and no output depends on it. Under Adam it drifts nevertheless, by up to 5% of its size in 100 steps"
        " of ours, since Adam divides the rounding errors of that 0 by their own size.",
        "Does the size of the initial weights matter with batch norm?": "Hardly where they are large: the output is"
        " the same and the gradient goes as 1 / size, exactly without epsilon and to 3% with the default of 1e-5."
        " Small ones meet epsilon: weights times 0.01 changed the output by up to 68%, and cost our ReLU and sigmoid"
        " networks 1 to 2 points.",
        "Do lower layers become useless?": "In a linear network with batch norm they do where a layer has one unit, as"
        " in the book's example, but not where it has many: to train the last of three layers alone cost 10 points"
        " with layers of 32 units, which squeeze 196 inputs, and 0.7 with 200. In nonlinear networks they learn"
        " something useful: to train them too gained 7 points, with ReLU and with sigmoid (6.1 to 7.8 together).",
    },
    differs="The book argues and gives no figures; its linear example has one unit per layer, here a layer has 200.",
    settings={
        "smoke": Sizes(seeds=2, data="mnist5k", steps=4, interval=4, width=40, walk=4),
        "cpu": Sizes(seeds=10, first_seed=10, data="mnist5k", steps=500, interval=250),
        "full": Sizes(seeds=10, first_seed=10, data="mnist", steps=10_000, interval=1000),
    },
    grid=Grid(
        task, 60, {}, {"network": NETWORKS, "arm": ARMS, "times": (1.0, 0.01, 100.0)},
        search=Search("rate", (0.1, 0.3, 1.0), extensions=3, shared=("times",)), conclude=linear_part,
    ),
    stages=stages,
    claims=[
        exactly(
            "With and without batch norm a network can compute the same function.",
            lambda r: r.starts.sel(walk=list(same_function.WALKS)[1:3]),
            measures="largest difference of logits from those of the plain network in float32", exact=1e-5,
        ),
        Claim(
            "From the same function, gradient descent takes another path.",
            lambda r: r.apart.sel(walk="batch norm"),
            measures="distance of the logits from the plain network's at the end of the walk, over how far those moved",
            unit="of the way", above=0.1,
            standalone="From the same function gradient descent takes another path with batch norm than without.",
        ),
        exactly(
            "With batch norm the mean of a pre-activation is set by its bias alone.",
            lambda r: r.elsewhere.sel(walk="batch norm"),
            measures="share of the change of the means that is not that of the biases, float32", exact=1e-3,
        ),
        Claim(
            "Without the normalization the mean depends on all that lies below, even with a learned scale and bias.",
            lambda r: r.elsewhere.sel(walk=["plain", "scale and bias alone"]),
            measures="share of the change of the means that is not that of the biases", unit="of the change",
            above=0.5,
            standalone="Without normalization the mean of a pre-activation depends on all that lies below, even with a"
            " learned scale and bias.",
        ),
        exactly(
            "A bias in front of batch norm is redundant: its gradient is 0.",
            lambda r: r.bias_gradient,
            measures="largest gradient of a layer's bias over that of batch norm's bias, float64", exact=1e-12,
        ),
        exactly(
            "That bias moves by weight decay only.",
            lambda r: r.drift.sel(walk=["batch norm", "batch norm, decay"]),
            measures="distance from its decayed start over its size after the walk with SGD, float32", exact=1e-4,
            standalone="A bias in front of batch norm moves by weight decay only.",
        ),
        exactly(
            "That bias moves by weight decay only under Adam, too.",
            lambda r: r.drift.sel(walk=["batch norm, Adam", "batch norm, AdamW"]),
            measures="distance from its decayed start over its size after the walk, float32", exact=1e-4,
            standalone="Under Adam, too, a bias in front of batch norm moves by weight decay only.",
        ),
        exactly(
            "The output does not depend on the scale of the weights, and the gradient goes as 1 / scale.",
            lambda r: r.change.sel(epsilon=0.0),
            measures="largest change of logits, gradient below, and gradient times scale; epsilon 0, float64",
            exact=1e-10, source=f"{IOFFE}, section 3.3",
            standalone="With batch norm the output does not depend on the scale of the weights, and the gradient goes"
            " as 1 / scale.",
        ),
        exactly(
            "The same with the default epsilon of 1e-5.",
            lambda r: r.change.sel(epsilon=1e-5),
            measures="largest change of logits, gradient below, and gradient times scale; float64",
            exact=1e-2, source=f"{IOFFE}, section 3.3",
            standalone="With batch norm and the default epsilon of 1e-5, too, the output does not depend on the scale"
            " of the weights, and the gradient goes as 1 / scale.",
        ),
        gains(
            "With batch norm a layer whose weights are 100 times as large needs no other rate.",
            lambda r: change_by_scaling(r, "batch norm"),
            measures="final test accuracy with the last hidden layer times 100, minus without, at the same rate",
            equal=0.01, source=f"{IOFFE}, section 3.3",
        ),
        gains(
            "Without batch norm it does.",
            lambda r: change_by_scaling(r, "plain"),
            measures="final test accuracy with the last hidden layer times 100, minus without, at the same rate",
            below=-0.05, source=f"{IOFFE}, section 3.3",
            standalone="Without batch norm a layer whose weights are 100 times as large needs another rate.",
        ),
        gains(
            "A learned scale and bias without normalization bring nothing.",
            Compared(lambda r: unscaled(r, CURVED), "scale and bias alone", "plain"),
            measures="final test accuracy", equal=0.01,
        ),
        gains(
            "It is the normalization that brings a better result.",
            Compared(lambda r: unscaled(r, CURVED), "batch norm", "scale and bias alone"),
            measures="final test accuracy", above=0.01,
            standalone="It is the normalization that brings batch norm's better result, not its learned scale and"
            " bias.",
        ),
        Claim(
            "Normalization without scale and bias keeps sigmoids in their linear part.",
            lambda r: r.linear_part.sel(network="sigmoid", arm="normalization alone", times=1.0),
            measures="share of the variance of the last hidden units that is linear in what enters them, after"
            " training", unit="of the variance", above=0.95, source=f"{IOFFE}, section 3",
        ),
        gains(
            "Normalization without scale and bias is therefore poorer with sigmoids.",
            Compared(lambda r: unscaled(r, ["sigmoid"]), "batch norm", "normalization alone"),
            measures="final test accuracy", above=0.0, precision=0.005, source=f"{IOFFE}, section 3",
            standalone="With sigmoids normalization without scale and bias is poorer than batch norm, since it keeps"
            " them in their linear part.",
        ),
        gains(
            "With sigmoids that leave their linear part it is no poorer.",
            Compared(lambda r: unscaled(r, ["sigmoid(4 h)"]), "batch norm", "normalization alone"),
            measures="final test accuracy", equal=0.01,
            standalone="With sigmoids that leave their linear part, normalization without scale and bias is no poorer"
            " than batch norm.",
        ),
        gains(
            "In a linear network with normalized h, training the last layer alone is as good as training all.",
            Compared(lambda r: unscaled(r, ["linear", "linear, 32 wide"]), "last layer alone", "batch norm"),
            measures="final test accuracy", equal=0.01,
            standalone="In a linear network with batch norm, training the last layer alone is as good as training all.",
        ),
        gains(
            "In a nonlinear network with normalized h the lower layers still learn something useful.",
            Compared(lambda r: unscaled(r, CURVED), "batch norm", "last layer alone"),
            measures="final test accuracy", above=0.02,
            standalone="In a nonlinear network with batch norm the lower layers still learn something useful.",
        ),
    ],
    tables=[
        table_of(
            "Test accuracy", lambda r: accuracy(r, times=1.0), rows=["network"], columns="arm",
            note="Last layer alone: it alone is trained, with batch norm below.",
        ),
        table_of(
            "Test accuracy with the last hidden layer's initial weights scaled, at the rate chosen without",
            lambda r: accuracy(r, arm=["plain", "batch norm"]), rows=["network", "times"], columns="arm",
        ),
        table_of(
            "What is a straight line in the last hidden layer, share of the variance",
            lambda r: r.linear_part.sel(times=1.0), rows=["network"], columns="arm",
        ),
        table_of(
            "A factor on a layer's weights: largest relative changes", lambda r: r.change,
            rows=["epsilon", "factor"], columns="compared", form=".1e",
            note="Float64; digits at the start, relu. An epsilon counts where the variance comes down to it.",
        ),
        table_of(
            f"From the same function: after the walk on {same_function.DIGITS} digits",
            figures_of_walks, rows=["walk"], columns="figure", form=".2g",
            note="Apart: distance from the plain network's logits over how far those moved. By others: share of the"
            " change of a layer's mean that is not that of its own bias. Drift: of the bias in front of the"
            " normalization from its decayed start, over its size; without normalization it learns.",
        ),
    ],
    pictures=[
        panels(
            draw_walks,
            partial(
                draw_arms, list(ARMS)[:4], ["relu", "sigmoid", "sigmoid(4 h)"],
                "Scale and bias, normalization,\nor both?",
            ),
            partial(
                draw_arms, ["batch norm", "last layer alone"], ["linear, 32 wide", "linear", *CURVED],
                "Normalized: are the layers\nbelow the last still of use?",
            ),
            draw_scaling, file="reparameterization.png", size=(4.3, 4.2),
            title="Why standardize a unit and then let it learn any mean and deviation again?",
            caption="Networks with two hidden layers on digits. First: one network in three parameterizations, gradient"
            " descent on 256 digits at the same rate. Second and third: the rate of each is chosen on validation;"
            " marks are medians over seeds, bars their range. Scale and bias alone: learned without normalization."
            " Normalization alone: without a learned scale and bias. sigmoid(4 h) leaves the linear part of the"
            " sigmoid. Last layer alone: the layers below stay random. Fourth: one layer's initial weights are"
            " multiplied, the rate stays; means over seeds.",
        )
    ],
)  # fmt: skip
