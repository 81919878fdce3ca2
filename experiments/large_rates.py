"""Does batch norm gain anything but larger learning rates?

Protocol: residual MLP on digits of 14 x 14 pixels: a layer of 40 units, 10 blocks of two layers of 40, a layer of 10;
ReLU before every layer but the first; normal weights after He et al. 2015; batch 60, plain SGD. Arms of one network:

- plain: no norm;
- batch norm (decay 0.9, epsilon 0.001): after the first layer and before every ReLU;
- last layer only: one norm, before the ReLU of the output layer;
- first layer only: one norm, after the first layer, as a control for "one norm is enough, wherever";
- shrunk branches: no norm, but each block adds its branch over the square root of the number of blocks, so that
  activations do not grow with depth: the control that takes away the suspected cause without a norm.

All arms of a seed start from the same weights, see the same batches and are trained at all of RATES, together in one
compiled program. "Best rate" of an arm for a seed: that with the best validation accuracy, mean over all *other* seeds,
so that no seed has a say in the rate at which it is reported; what is reported is test accuracy. A network that
diverged has the accuracy of guessing. Activations and gradients at the start are those of 600 training digits of all
classes; for gradients the depth is varied in two ways: block by block, and in a network of a fifth of the blocks.

`python -m experiments run large_rates` takes four to five minutes on two cores. By three earlier seeds five claims need
4 to 7 seeds, and the others more than 10; 10 are taken, the most here. The result's seeds are fresh.
"""

from dataclasses import dataclass, replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import optax
import xarray as xr
from matplotlib.axes import Axes

import jaxbn
from experiments.framework.claim import Claim, Compared
from experiments.framework.experiment import WHY_FASTER, Experiment, Grid, Settings, Stage
from experiments.framework.pictures import COLORS, dots, lines, panels
from experiments.framework.results import final, side_by_side
from experiments.framework.tables import table_of
from experiments.training import data, loop
from experiments.training.residual_mlp import ResidualMLP, size

PLAIN, NORM, LAST, FIRST, SHRUNK = "plain", "batch norm", "last layer only", "first layer only", "shrunk branches"
NONE = {"first": 0, "inner": 0, "last": 0, "shrunk": 0}
ARMS = {
    PLAIN: NONE,
    NORM: {"first": 1, "inner": 1, "last": 1, "shrunk": 0},
    LAST: {**NONE, "last": 1},
    FIRST: {**NONE, "first": 1},
    SHRUNK: {**NONE, "shrunk": 1},
}
RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
SEEN = 600  # training digits on which the start is measured
LEARNS = 0.5  # test accuracy at the end of a network that counts as learning
DASHES = {PLAIN: "", NORM: (4, 1.5), LAST: (1, 1), FIRST: (3, 1, 1, 1), SHRUNK: (5, 1, 1, 1, 1, 1)}
SHADES = {PLAIN: COLORS[PLAIN], NORM: COLORS[NORM], LAST: "#4dac5e", FIRST: "#9970ab", SHRUNK: "#e69f00"}
AT_BEST = {"best rate": ".2g", "test accuracy there": ".3f", "at the best rate of plain": ".3f"}
WHY = {
    "largest rate that learns": ".2g",
    "activations, last block over first": ".2g",
    "gradients, last block over first": ".2g",
    "gradients, all blocks over a fifth of them": ".2g",
}
# Figure 1, read off the plot: Resnet of 110 layers on CIFAR-10, rates 0.0001, 0.003 and 0.1, means of five runs.
PUBLISHED = xr.DataArray(
    [[0.0001, 0.82, 0.82], [0.1, 0.93, 0.81]], {"arm": [PLAIN, NORM], "figure": list(AT_BEST)}, ["arm", "figure"]
)


@dataclass(frozen=True, kw_only=True)
class Sizes(Settings):
    """And the number of blocks and their width."""

    blocks: int = 10
    width: int = 40


@cache
def network(settings: Sizes) -> ResidualMLP:
    """The network of all arms."""
    return ResidualMLP(jaxbn.batch_norm(decay=0.9, epsilon=1e-3), settings.blocks, settings.width)


def init(settings: Sizes, run: dict, key: jax.Array, x: jax.Array) -> dict:
    """Variables of a run's arm."""
    branch = jnp.where(run["shrunk"] > 0, settings.blocks**-0.5, 1.0)
    return network(settings).init({**run, "branch": branch}, key, x)


@cache
def task(settings: Sizes) -> loop.Task:
    """The network of a run's arm under SGD at its "rate"."""
    return loop.Task(partial(init, settings), network(settings).apply, lambda run: optax.sgd(run["rate"]))


def start(settings: Sizes) -> xr.Dataset:
    """Activations and gradients before the first step, and gradients of a network of a fifth of the blocks."""
    shallow = signals(replace(settings, blocks=max(1, settings.blocks // 5)))
    return signals(settings).assign(shallow_gradient=shallow.gradient.mean("block"))


def signals(settings: Sizes) -> xr.Dataset:
    """Root mean square of activations and of gradients of the weights, block by block, before the first step."""
    dataset = data.load(settings.data)
    index = data.spread(SEEN, len(dataset.train_labels))
    images, labels = data.pixels(jnp.asarray(dataset.train_images[index])), jnp.asarray(dataset.train_labels[index])
    runs = [{"seed": seed, "rate": 0.0, **arm} for seed in settings.every_seed for arm in ARMS.values()]

    def measured(variables: dict) -> tuple[jax.Array, jax.Array]:
        def loss(params: dict) -> jax.Array:
            logits, _ = network(settings).apply({**variables, "params": params}, images, train=True)
            return loop.softmax_loss(logits, labels)

        gradient = jax.grad(loss)(variables["params"])
        return network(settings).sizes(variables, images), jax.vmap(size)(gradient["inner"]["kernel"])

    begin = partial(loop.init_run, task(settings), jnp.asarray(dataset.test_images[:2]))
    states = jax.vmap(begin)(loop.stacked(runs, len(runs)))
    found = jax.device_get(jax.jit(jax.vmap(measured))(states["variables"]))
    activations, gradients = (values.reshape(settings.seeds, len(ARMS), -1) for values in found)
    arrays = {"activation": (("seed", "arm", "depth"), activations), "gradient": (("seed", "arm", "block"), gradients)}
    depths = {"depth": range(settings.blocks + 1), "block": range(1, settings.blocks + 1)}
    return xr.Dataset(arrays, {"seed": settings.every_seed, "arm": list(ARMS), **depths})


def growth(r: xr.Dataset, name: str) -> xr.DataArray:
    """The last value along the depth over the first."""
    axis = {"activation": "depth", "gradient": "block"}[name]
    return r[name].isel({axis: -1}, drop=True) / r[name].isel({axis: 0}, drop=True)


def growth_with_network(r: xr.Dataset) -> xr.DataArray:
    """Gradients, mean over blocks, over those of the network with a fifth of the blocks."""
    return r.gradient.mean("block") / r.shallow_gradient


def best_rate(r: xr.Dataset) -> xr.DataArray:
    """The rate with the best validation accuracy by all other seeds: [arm, seed]."""
    accuracy = final(r.validation_accuracy)
    return (accuracy.sum("seed") - accuracy).idxmax("rate")


def at(array: xr.DataArray, rate: xr.DataArray) -> xr.DataArray:
    """The values of an array with the axis "rate" where it is `rate`."""
    return array.where(array.rate == rate).max("rate")


def best(r: xr.Dataset) -> xr.DataArray:
    """Final test accuracy of each arm at its best rate."""
    return at(final(r.test_accuracy), best_rate(r))


def at_plain(array: xr.DataArray, r: xr.Dataset) -> xr.DataArray:
    """An array at the best rate of the plain network."""
    return at(array, best_rate(r).sel(arm=PLAIN, drop=True))


def alike(r: xr.Dataset) -> xr.DataArray:
    """Test accuracy at the best rate of the plain network, at the end and on average over training."""
    both = xr.concat([final(r.test_accuracy), r.test_accuracy.mean("step")], "moment")
    return at_plain(both.assign_coords(moment=["end", "mean over training"]), r)


def large_rates_add(r: xr.Dataset) -> xr.DataArray:
    """Final test accuracy of batch norm: at its own best rate minus at that of the plain network."""
    return (best(r) - at_plain(final(r.test_accuracy), r)).sel(arm=NORM, drop=True)


def share_of_last(r: xr.Dataset) -> xr.DataArray:
    """What one norm in the last layer gains, in parts of batch norm's mean gain, minus two thirds."""
    gain = best(r) - best(r).sel(arm=PLAIN, drop=True)
    whole = gain.sel(arm=NORM, drop=True)
    return (gain.sel(arm=LAST, drop=True) - 2 / 3 * whole) / whole.mean("seed")


def largest(r: xr.Dataset) -> xr.DataArray:
    """The largest rate at which a network learns; nan where none."""
    return r.rate.where(final(r.test_accuracy) >= LEARNS).max("rate")


def at_best(r: xr.Dataset) -> xr.DataArray:
    """What the first table shows of each arm."""
    return side_by_side(dict(zip(AT_BEST, (best_rate(r), best(r), at_plain(final(r.test_accuracy), r)), strict=True)))


def why(r: xr.Dataset) -> xr.DataArray:
    """What the second table shows of each arm."""
    figures = largest(r), growth(r, "activation"), growth(r, "gradient"), growth_with_network(r)
    return side_by_side(dict(zip(WHY, figures, strict=True)))


def draw_rates(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """Final test accuracy by rate."""
    lines(ax, final(r.test_accuracy), x="rate", hue="arm", palette=SHADES, style="arm", dashes=DASHES)
    ax.set(xscale="log", xlabel="learning rate", ylabel="final test accuracy", ylim=(0, 1.32))
    ax.set(yticks=[0, 0.2, 0.4, 0.6, 0.8, 1], title="Every network at every rate")
    ax.legend(frameon=False, loc="upper left", fontsize=8, ncols=2)


def draw_best(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """Final test accuracy at the best rate."""
    dots(ax, best(r), "arm", SHADES)
    theirs = PUBLISHED.sel(figure="test accuracy there")
    places = [list(ARMS).index(arm) + 0.25 for arm in theirs.arm.values]
    ax.plot(theirs, places, "D", markerfacecolor="none", markeredgecolor="black", label="published (CIFAR-10)")
    ax.set(xlabel="final test accuracy", title="Each at its best rate")
    ax.legend(frameon=False, loc="lower left", fontsize=8)


def draw_start(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """Activations by depth; those below a norm in the last layer are those of a plain network."""
    seen = r.activation.sel(arm=[PLAIN, NORM, SHRUNK])
    lines(ax, seen, x="depth", hue="arm", palette=SHADES, style="arm", dashes=DASHES, legend=False)
    ax.set(yscale="log", xlabel="blocks below", ylabel="activations, root mean square", title="Before the first step")


accuracy = partial(Claim, unit="of test accuracy", precision=0.005)
best_of = partial(accuracy, measures="final test accuracy, each arm at its best rate")
at_the_start = partial(Claim, unit="times", ratio=True)
largest_of = partial(Claim, unit="times", measures=f"largest rate with {LEARNS:.0%} test accuracy at the end")
OURS = "a control of ours; that batch norm shrinks residual branches: De and Smith 2020"

EXPERIMENT = Experiment(
    title="Batch norm trains faster because it stands rates at which a plain network diverges.",
    question="Does batch norm gain anything but larger learning rates?",
    source="Bjorck, Gomes, Selman and Weinberger 2018",
    citation="Nils Bjorck, Carla Gomes, Bart Selman and Kilian Q. Weinberger: Understanding Batch Normalization."
    " NeurIPS 2018, arXiv:1806.02375.",
    theme=WHY_FASTER,
    answer={
        "cpu": "Hardly anything in our residual MLP: with batch norm it learned at rates at least 79 times as large,"
        " and at the plain network's best rate batch norm lost four fifths of its gain of 0.045. Shrunk residual"
        " branches without a norm allowed rates 26 times as large and brought more than half of the gain, a single"
        " norm in the last layer a third.",
    },
    surprise="A single batch norm, in the last layer, is said to bring two thirds of the gain of batch norm in all"
    " layers. In a residual MLP it brought a third (0.015 of 0.045), and shrinking the residual branches without any"
    " norm more than half (0.026).",
    reader_questions={
        "Does batch norm help at small learning rates?": "Not in our residual MLP: at a tenth of the rate that was"
        " best without it, batch norm slowed learning down (0.68 against 0.81 of the test digits after 15 epochs). At"
        " that best rate itself batch norm was ahead by 0.009 in the end; in Bjorck et al. both were alike at a small"
        " rate, after longer training.",
        "What makes a plain network diverge at large rates?": "In our residual MLP activations grow 27-fold over ten"
        " blocks at the start, and gradients are 30 times those of a network of two blocks. Where shrunk residual"
        " branches keep both from growing, a network without norms stands large rates, too.",
    },
    differs="The source trains a Resnet of 110 layers on CIFAR-10 with momentum, weight decay, a schedule of rates and"
    " augmentation; CIFAR-10 is not at hand, and an MLP of 22 layers with norms before the ReLU learns 3,500 digits for"
    " 15 epochs with none of these. Its abstract, and its figures 1 to 3 in public summaries, were read; two thirds"
    " is from such a summary, and where the last norm stands is our reading. The preset full has 54 blocks and all of"
    " MNIST.",
    settings={
        "smoke": Sizes(seeds=2, data="mnist5k", steps=2, interval=1, blocks=2, width=4),
        "cpu": Sizes(seeds=10, data="mnist5k", steps=900, interval=90),
        "full": Sizes(seeds=5, data="mnist", steps=50_000, interval=1000, blocks=54, width=100),
    },
    grid=Grid(task, 60, {}, {"arm": ARMS, "rate": RATES}),
    stages=lambda settings: [Stage("start", lambda: start(settings))],
    claims=[
        at_the_start(
            "Activations of a plain network grow with depth.",
            lambda r: growth(r, "activation").sel(arm=PLAIN, drop=True), above=4.0,
            measures="root mean square after the last block over that before the first, plain, at the start",
        ),
        at_the_start(
            "Gradients of a plain network grow with the depth of the network.",
            lambda r: growth_with_network(r).sel(arm=PLAIN, drop=True), above=2.0,
            measures="root mean square of the gradient of the weights, mean over blocks, plain, at the start: over that"
            " of a network with a fifth of the blocks",
        ),
        at_the_start(
            "Gradients of a plain network grow from block to block.",
            lambda r: growth(r, "gradient").sel(arm=PLAIN, drop=True), above=2.0,
            measures="root mean square of the gradient of the weights, last block over first, plain, at the start",
            source="Bjorck et al. 2018, another reading",
        ),
        at_the_start(
            "Gradients of a plain network are much larger than with batch norm.",
            Compared(lambda r: r.gradient, PLAIN, NORM, ratio=True), above=10.0,
            measures="root mean square of the gradient of the weights, block by block, at the start",
        ),
        accuracy(
            "At equal small rates batch norm and none learn alike.", Compared(alike, NORM, PLAIN), equal=0.02,
            measures="test accuracy at the best rate of the plain network",
            standalone="At equal small rates networks with and without batch norm learn alike.",
        ),
        largest_of(
            "Batch norm learns at rates at which a plain network does not.",
            Compared(largest, NORM, PLAIN, ratio=True), above=5.0,
        ),
        best_of(
            "Batch norm is more accurate in the end.", Compared(best, NORM, PLAIN), above=0.0,
            standalone="A network with batch norm is more accurate in the end than a plain one.",
        ),
        accuracy(
            "That is due to large rates: batch norm loses accuracy at the rate that is best for a plain network.",
            large_rates_add, above=0.0,
            measures="final test accuracy of batch norm: at its best rate minus at that of the plain network",
            standalone="What batch norm gains in accuracy is due to large rates: it loses accuracy at the rate that is"
            " best for a plain network.",
        ),
        best_of("One norm in the last layer is better than none.", Compared(best, LAST, PLAIN), above=0.0),
        Claim(
            "It brings about two thirds of the gain.", share_of_last, equal=1 / 6, unit="of batch norm's gain",
            measures="gain in final test accuracy over plain, each arm at its best rate, in parts of batch norm's: last"
            " layer only minus two thirds",
            standalone="A single norm in the last layer brings about two thirds of what batch norm in all layers"
            " gains.",
        ),
        best_of(
            "The last layer is the right place for a single norm: in the first it brings less.",
            Compared(best, LAST, FIRST), above=0.0, source="a control of ours",
        ),
        largest_of(
            "Growth with depth is what forbids large rates: without it a plain network stands them, too.",
            Compared(largest, SHRUNK, PLAIN, ratio=True), above=5.0, source=OURS,
            standalone="Growth of activations with depth is what forbids large rates: without it a plain network"
            " stands them, too.",
        ),
        best_of(
            "And then it is as accurate as batch norm.", Compared(best, NORM, SHRUNK), equal=0.02, source=OURS,
            standalone="A plain network whose activations do not grow with depth is as accurate as one with batch"
            " norm.",
        ),
    ],
    tables=[
        table_of(
            "Every arm at its best rate, and at that of the plain network", at_best, rows=["arm"], columns="figure",
            form=AT_BEST, published=PUBLISHED,
            note="Published: CIFAR-10, read off figure 1; its three rates are 0.0001, 0.003 and 0.1, and only the first"
            " works without batch norm.",
        ),
        table_of(
            "The largest rate at which an arm learns, and growth at the start", why, rows=["arm"], columns="figure",
            form=WHY, note=f"Learns: at least {LEARNS:.0%} test accuracy at the end. Growth: of root mean squares.",
        ),
    ],
    pictures=[
        panels(
            draw_rates, draw_best, draw_start, file="large_rates.png",
            title="Does batch norm gain anything but larger learning rates?",
            caption="Residual MLP of 22 layers on 3,500 digits. Lines: means of the seeds, bands: their range. Middle:"
            " a dot a seed, a bar their mean; the rate of each seed was chosen on validation by the other seeds. Right:"
            " below a norm in the last layer activations are those of the plain network.",
        )
    ],
)  # fmt: skip
