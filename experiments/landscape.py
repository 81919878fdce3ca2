"""Does batch norm smooth the loss, and is that why it trains faster?

Protocol (Santurkar et al. 2018, figure 4): a small VGG-style network on 3,500 digits, plain SGD, batch 60. At points of
training the loss and its gradient g are measured along the gradient of a batch, at steps of 1/2 to 4 times the rate:
the range of the loss; the largest distance of the gradients there from g; that distance over the way moved. All arms
start from the same weights and see the same batches, once at one rate for all and once at the rate that was best on
validation for each.

Two controls. "frozen": the statistics of the first batch for ever. It starts as the same function as batch norm, and no
statistics move with the weights. And steps of equal length: a network whose gradient is smaller moves less at the same
rate and looks smoother, so the relative change of g is also measured at a distance of 2% of the length of all params.

`python -m experiments run landscape` takes about six minutes on two cores (100 steps, 10 seeds, 5,000 digits). By a
pilot that is enough for three of the claims; the others would need 18 to thousands of seeds.
"""

from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter

from experiments.framework.claim import Claim, Compared
from experiments.framework.experiment import WHY_FASTER, Experiment, Grid, Search, Settings
from experiments.framework.pictures import COLORS, dots, lines, panels
from experiments.framework.results import final, side_by_side
from experiments.framework.tables import table_of
from experiments.training import loop
from experiments.training.switched_networks import rate_of, vgg_task
from experiments.training.switched_norm import kind
from jaxbn import diagnostics

PLAIN, NORM, FROZEN = "plain", "batch norm", "frozen"
P_NORMS = ["l1", "l2", "l-infinity"]
ARMS = {PLAIN: kind(normalize=False), NORM: kind(), FROZEN: kind(frozen=True), **{p: kind(p) for p in P_NORMS}}
BEST, SAME = "best rate of each", "same rate"
RATE = 0.1  # where all have the same
MULTIPLES = (0.5, 1.0, 2.0, 4.0)  # of the rate: the steps along the gradient
DISTANCE = 0.02  # of the length of all params: the step of equal length
BATCH_SIZE = 60
RANGE, CHANGE, BETA = "range of the loss", "change of the gradient", "beta-smoothness"
MEASURES = (RANGE, CHANGE, BETA)
RELATIVE, SPREAD = "relative change at equal distance", "spread of the normalized"
SHADES = {**COLORS, FROZEN: "#222222", "l1": "#4dac5e", "l2": "#e69f00", "l-infinity": "#9970ab"}


@dataclass(frozen=True, kw_only=True)
class Sizes(Settings):
    """And the network: filters by block, units of the dense layer."""

    blocks: tuple[tuple[int, ...], ...] = ((8, 8), (16, 16), (32, 32))
    units: int = 64


@cache
def task(settings: Sizes) -> loop.Task:
    """The network with the run's normalizer, under SGD at its "rate", or at RATE where it has the "same" as all."""
    rate = partial(rate_of, same=RATE)
    plain = vgg_task(settings.blocks, settings.units, lambda run: optax.sgd(rate(run)))
    loss = loop.loss_of(plain.apply)

    def metrics(run: dict, state: dict, arrays: dict) -> dict:
        key = jax.random.fold_in(jax.random.key(run["seed"]), 2)
        batch = loop.take(arrays, jax.random.randint(key, (BATCH_SIZE,), 0, len(arrays["train_labels"])))
        return measured(loss, state["variables"], batch, rate(run))

    return plain._replace(metrics=metrics)


def measured(loss: diagnostics.Loss, variables: dict, batch: tuple, rate: jax.Array) -> dict:
    """MEASURES at MULTIPLES of the rate, RELATIVE at DISTANCE, and SPREAD of the last training batch."""
    gradient = jax.grad(lambda params: loss({**variables, "params": params}, batch, None).loss_sum)(variables["params"])
    equal = DISTANCE * optax.tree.norm(variables["params"]) / optax.tree.norm(gradient)
    rates = jnp.append(rate * jnp.array(MULTIPLES), equal)
    seen = diagnostics.landscape(loss, variables, batch, rates=rates)
    along = jnp.append(seen.loss[:-1], seen.loss_here)
    return {
        RANGE: jnp.max(along) - jnp.min(along),
        CHANGE: jnp.max(seen.gradient_distance[:-1]),
        BETA: jnp.max(seen.beta[:-1]),
        RELATIVE: seen.gradient_distance[-1] / seen.gradient_norm,
        SPREAD: jnp.mean(jnp.stack([stats["spread"] for stats in variables["batch_stats"]])),
        "gradient": seen.gradient_norm,
    }


def over_training(array: xr.DataArray) -> xr.DataArray:
    """The geometric mean over the points of training."""
    return np.exp(np.log(array).mean("step"))


def source_measure(r: xr.Dataset, name: str) -> xr.DataArray:
    """One of MEASURES over training, all arms at the same rate."""
    return over_training(r[name].sel(trained=SAME, drop=True))


def all_measures(r: xr.Dataset) -> xr.DataArray:
    """MEASURES over training, all arms at the same rate: [measure, arm, seed]."""
    found = [source_measure(r, name).rename("measures") for name in MEASURES]
    return xr.concat(found, "measure").assign_coords(measure=list(MEASURES))


def relative(r: xr.Dataset) -> xr.DataArray:
    """The relative change of the gradient at equal distance over training, at either rate."""
    return over_training(r[RELATIVE])


def accuracy(r: xr.Dataset) -> xr.DataArray:
    """Test accuracy after the last step."""
    return final(r.test_accuracy)


def p_norms_over_plain(r: xr.Dataset) -> xr.DataArray:
    """The measures with the p-norms over those without any: [measure, arm, seed]."""
    values = all_measures(r)
    return values.sel(arm=P_NORMS) / values.sel(arm=PLAIN, drop=True)


def p_norms_minus_batch_norm(r: xr.Dataset) -> xr.DataArray:
    """Final test accuracy at the best rate of each."""
    best = accuracy(r).sel(trained=BEST, drop=True)
    return best.sel(arm=P_NORMS) - best.sel(arm=NORM, drop=True)


def figures(r: xr.Dataset) -> xr.DataArray:
    """What the table shows of each arm."""
    names = [*MEASURES, RELATIVE, "gradient"]
    found = {name: over_training(r[name]) for name in names}
    found |= {SPREAD: r[SPREAD].mean("step"), "test accuracy": accuracy(r)}
    return side_by_side(found)


def by_step(r: xr.Dataset) -> xr.DataArray:
    """What is drawn along the gradient, all arms at the same rate: [measure, arm, step, seed]."""
    names = [*MEASURES, RELATIVE]
    found = [r[name].sel(trained=SAME, drop=True).rename("measures") for name in names]
    return xr.concat(found, "measure").assign_coords(measure=names)


def draw(name: str, label: str, ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """One measure during training, all arms at the same rate; the first panel has the legend."""
    lines(ax, r[name].sel(trained=SAME, drop=True), x="step", hue="arm", palette=SHADES, style="arm", errorbar=None)
    ax.set(xlabel=f"training step, rate {RATE:g}", ylabel=label, title=name)
    if name != RELATIVE:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    if name == RANGE:
        ax.legend(frameon=False, fontsize=8, loc="lower right")
    else:
        ax.get_legend().remove()


def draw_accuracy(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """The accuracy of every arm at its best rate."""
    dots(ax, accuracy(r).sel(trained=BEST), "arm", SHADES)
    ax.set(xlabel=f"test accuracy after {settings.steps:,} steps", title="each at its best rate")


smoother = partial(Claim, ratio=True, below=1.0, precision=0.2)
EQUALLY_FAR = "|g(there) - g| / |g| at a distance of 2% of the length of all params"
ALONG = "at steps of 1/2 to 4 times the rate along the gradient, all arms at rate 0.1, geometric mean over training"

EXPERIMENT = Experiment(
    title="At equal distance gradients are more predictive with batch norm; at equal rates only in the end.",
    question="Does batch norm smooth the loss, and is that why it trains faster?",
    source="Santurkar, Tsipras, Ilyas and Madry 2018, sections 3.1 and 3.3, figure 4",
    citation="S. Santurkar, D. Tsipras, A. Ilyas, A. Madry: How Does Batch Normalization Help Optimization?"
    " NeurIPS 2018, arXiv:1805.11604.",
    theme=WHY_FASTER,
    answer={
        "cpu": "By the measures of Santurkar et al. no: at one rate, averaged over training, the gradient changed 1.28"
        " times as fast along its direction with batch norm as without (1.11 to 1.48). After steps of equal length it"
        " changed 0.74 times as much as without and 0.44 times as much as with frozen statistics, and batch norm"
        " learned faster than both, though that does not show the cause.",
    },
    surprise="Batch norm is said to smooth the loss along its gradient. With one rate for all, averaged over training,"
    " it was the other way round: the gradient changed 1.28 times as fast with batch norm as without (1.11 to 1.48),"
    " and only after steps of equal length did it change less (0.74 times as much).",
    reader_questions={
        "Is the loss smoother with batch norm?": "It depends on the steps along which it is measured: at equal rates a"
        " network that does not learn yet has small gradients, moves little and looks smoothest. After steps of equal"
        " length the gradient changed 0.74 times as much with batch norm as without, in an eight-layer network.",
        "Does batch norm smooth the loss by fixing distributions?": "Hardly: normalized by an l1 or l2 norm, which"
        " leaves the deviations of features unequal, the gradients of our network changed as much as batch norm's"
        " after steps of equal length (1.02 times their length at the best rates), and test accuracy was 0.92 against"
        " 0.93. Batch norm with statistics frozen at the start had gradients that changed more than twice as much.",
    },
    differs="The source trains VGG on CIFAR-10, and its figure 4 has curves without numbers to set beside ours; here"
    " eight small layers learn digits for 100 steps, with strides where VGG has maxima. We take its p-norms over the"
    " batch and all positions of a feature, and could not read more of its protocol than its text says. Frozen"
    " statistics and equal distances are ours. The best rate of frozen statistics lies at the lower end of the search,"
    " and one of ten diverged at the rate of all: no ratio to it is judged there.",
    settings={
        "smoke": Sizes(seeds=2, data="mnist5k", steps=2, interval=1, blocks=((4,),), units=8),
        "cpu": Sizes(seeds=10, data="mnist5k", steps=100, interval=25),
        "full": Sizes(
            seeds=5, data="cifar10", steps=15_000, interval=500, units=512,
            blocks=((64,), (128,), (256, 256), (512, 512), (512, 512)),
        ),
    },
    grid=Grid(
        task, BATCH_SIZE, {}, {"trained": {BEST: {"same": 0}, SAME: {"same": 1}}, "arm": ARMS},
        Search("rate", (0.1, 0.3, 1.0), extensions=1, shared=("trained",), together=False, least_steps=10),
    ),
    claims=[
        smoother(
            "Along its gradient the loss of a network with batch norm varies less.",
            Compared(partial(source_measure, name=RANGE), NORM, PLAIN, ratio=True),
            measures=f"greatest minus least loss {ALONG}", unit="times",
            standalone="Along its gradient the loss of a network with batch norm varies less than that of a plain one.",
        ),
        smoother(
            "Its gradients are more predictive.",
            Compared(partial(source_measure, name=CHANGE), NORM, PLAIN, ratio=True),
            measures=f"largest |g(there) - g| {ALONG}", unit="times",
            standalone="The gradients of a network with batch norm are more predictive than those of a plain one.",
        ),
        smoother(
            "And its loss is smoother.",
            Compared(partial(source_measure, name=BETA), NORM, PLAIN, ratio=True),
            measures=f"largest |g(there) - g| over the distance {ALONG}", unit="times",
            standalone="The loss of a network with batch norm is smoother than that of a plain one.",
        ),
        smoother(
            "Normalizing by an l1, l2 or l-infinity norm smooths, too.", p_norms_over_plain,
            measures=f"the three measures {ALONG}: p-norm over plain", unit="times",
            source="Santurkar et al. 2018, section 3.3",
            standalone="Normalizing by an l1, l2 or l-infinity norm smooths the loss, too, not only batch norm.",
        ),
        smoother(
            "It is the statistics that move with the weights that smooth: frozen ones do less.",
            Compared(all_measures, NORM, FROZEN, ratio=True),
            measures=f"the three measures {ALONG}", unit="times", source="ours, a control",
            standalone="It is statistics that move with the weights by which batch norm smooths the loss: frozen ones"
            " do less.",
        ),
        smoother(
            "The gradients are more predictive also where both networks move equally far.",
            Compared(relative, NORM, PLAIN, ratio=True),
            measures=f"{EQUALLY_FAR}, geometric mean over training",
            unit="times", source="ours, a control",
            standalone="The gradients of a network with batch norm are more predictive than those of a plain one also"
            " where both move equally far.",
        ),
        smoother(
            "And equally far they are more predictive than with frozen statistics.",
            Compared(relative, NORM, FROZEN, ratio=True),
            measures=f"{EQUALLY_FAR}, geometric mean over training",
            unit="times", source="ours, a control",
            standalone="Where both networks move equally far gradients are more predictive with batch norm than with"
            " frozen statistics.",
        ),
        Claim(
            "p-norms do not fix the distribution.",
            lambda r: r[SPREAD].sel(arm=P_NORMS).mean("step"),
            measures="standard deviation over the features of a layer of the logarithm of the normalized features'"
            " standard deviation, mean over layers and training; with batch norm it is 0",
            unit="of the logarithm", above=0.1, source="Santurkar et al. 2018, section 3.3",
            standalone="Normalizing by an l1, l2 or l-infinity norm does not fix the distribution of a layer's"
            " features.",
        ),
        Claim(
            "They train as well as batch norm all the same.", p_norms_minus_batch_norm,
            measures="final test accuracy, each arm at its best rate: p-norm minus batch norm",
            unit="of test accuracy", equal=0.02, source="Santurkar et al. 2018, section 3.3",
            standalone="Networks that are normalized by an l1, l2 or l-infinity norm train as well as with batch norm.",
        ),
        Claim(
            "A network with batch norm learns faster than a plain one.",
            Compared(accuracy, NORM, PLAIN), measures="final test accuracy after few steps, at either rate",
            unit="of test accuracy", above=0.0, precision=0.01,
        ),
        Claim(
            "And faster than one with frozen statistics.",
            Compared(accuracy, NORM, FROZEN), measures="final test accuracy after few steps, at either rate",
            unit="of test accuracy", above=0.0, precision=0.01, source="ours, a control",
            standalone="A network with batch norm learns faster than one with frozen statistics.",
        ),
    ],
    tables=[
        table_of(
            "What is seen along the gradient, at either rate", figures, rows=["trained", "arm"], columns="figure",
            form=".3g",
            note=f"Geometric means over training but the last two. Relative change: at {DISTANCE:.0%} of the length of"
            " all params. Gradient: its length. Spread: of the logarithms of the normalized features' deviations.",
        ),
        table_of(
            f"What is seen along the gradient in the course of training, all at rate {RATE:g}", by_step,
            rows=["measure", "arm"], columns="step", form=".3g",
        ),
        table_of(
            "Learning rate chosen on validation",
            lambda r: r.rate.sel(trained=BEST).isel(seed=[0]).expand_dims(chosen=["rate"]), rows=["arm"],
            columns="chosen", form="g",
        ),
    ],
    pictures=[
        panels(
            partial(draw, RANGE, "greatest minus least loss"),
            partial(draw, BETA, "change of gradient / distance"),
            partial(draw, RELATIVE, "relative change of the gradient"),
            draw_accuracy,
            file="landscape.png", size=(3.9, 4.2),
            title="Does batch norm smooth the loss, and is that why it trains faster?",
            caption="Lines: means of the seeds. The lower, the smoother. First two: at steps of 1/2 to 4 times the rate"
            " along the gradient, as Santurkar et al. have it. Third: after a step of the same length for all, 2% of"
            " the length of all params. Frozen: batch norm with the statistics of the first batch for ever; a network"
            " that diverged is left out of the lines. Right: a dot is a seed, a bar the mean, each arm at the rate that"
            " was best on validation. While the plain network does not learn yet its gradient is small, and it looks"
            " smooth.",
        )
    ],
)  # fmt: skip
