"""Why do deep networks need batch norm, and is it because it shrinks the residual branches?

Protocol: convolutional networks of 20, 56 and 110 layers on digits. Images are averaged over 2 x 2 pixels; then come a
3 x 3 convolution of stride 2, equal blocks of two 3 x 3 convolutions of 8 channels on 7 x 7 positions, the mean over
positions and a dense layer. Norm and ReLU stand before each convolution of a block, and before the mean. Weights are
normal after He et al. 2015; batch 16, SGD with momentum 0.9. Arms, which start from the same weights:

- plain: no shortcuts, a bias in the place of each norm; plain, batch norm: the same with batch norm (decay 0.9);
- residual: each block adds its branch to its input, with biases only; residual, batch norm: the same with batch norm;
- SkipInit at 0, the control: residual with biases only, and one learned number at the end of each branch, 0 at first;
- SkipInit at 1/sqrt(blocks): that number starts where batch norm is said to bring the branch. It takes batch norm's
  factor, and nothing else of it.

At the start: root mean square of what enters each block, of its branch, and of the loss's gradient by what enters the
block, on 128 training digits of all classes, at 20, 56 and 110 layers. Trained: 20 and 56 layers, 400 steps. Each arm
has its own best rate at each depth, by the same search on validation; the result is of five fresh seeds on test. Five
seeds were set beforehand, without a pilot.

`python -m experiments run depth` took thirteen minutes on two cores with other work beside it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

import jax
import numpy as np
import optax
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

import jaxbn
from experiments.framework.claim import Claim, Compared
from experiments.framework.experiment import WHEN_IT_HELPS, Experiment, Grid, Search, Settings, Stage
from experiments.framework.pictures import COLORS, panels
from experiments.framework.results import difference, final
from experiments.framework.search import runs_of
from experiments.framework.tables import table_of
from experiments.topics import GRADIENTS
from experiments.training import data, loop
from experiments.training.equal_blocks import EqualBlocks, blocks_of

PLAIN, PLAIN_NORM, RESIDUAL, NORM = "plain", "plain, batch norm", "residual", "residual, batch norm"
ZERO, ROOT = "residual, SkipInit at 0", "residual, SkipInit at 1/sqrt(blocks)"
BARE = {"normalize": 0, "shortcut": 0, "learned": 0, "alpha": 1, "shrunk": 0}
ARMS = {
    PLAIN: BARE,
    PLAIN_NORM: {**BARE, "normalize": 1},
    RESIDUAL: {**BARE, "shortcut": 1},
    NORM: {**BARE, "shortcut": 1, "normalize": 1},
    ZERO: {**BARE, "shortcut": 1, "learned": 1, "alpha": 0},
    ROOT: {**BARE, "shortcut": 1, "learned": 1, "shrunk": 1},
}
LAYERS = SHALLOW, DEEP = 20, 56  # of the networks that are trained
SEEN = 128  # training digits on which the start is measured
POINTS = 12  # blocks of a network at which the start is recorded, at most
LOWEST = 2  # block from which growth is measured: the first one takes in the image, whose positions differ little
LEARNS = 0.5  # test accuracy of a network that has learned
STYLES = {  # colour and line of each arm
    PLAIN: (COLORS["plain"], "--"),
    PLAIN_NORM: (COLORS["batch norm"], "--"),
    RESIDUAL: (COLORS["plain"], "-"),
    NORM: (COLORS["batch norm"], "-"),
    ZERO: ("#009e73", "-"),
    ROOT: ("#e69f00", "-"),
}
PUBLISHED = xr.DataArray([[1 - 0.0875, 1 - 0.0697]], {"arm": [NORM], "layers": list(LAYERS)})
HE = "He et al. 2016"
YANG = "Yang et al. 2019, theorem 8, for dense networks of equal layers"


@dataclass(frozen=True, kw_only=True)
class Sizes(Settings):
    """And the channels, the depths at which the start is measured, and the layers that no trained network exceeds."""

    width: int = 8
    depths: tuple[int, ...] = (20, 56, 110)
    most: int = DEEP


def task(settings: Sizes, layers: int) -> loop.Task:
    """What `of_depth` says of networks that are trained."""
    return of_depth(settings.width, min(layers, settings.most))


def network(width: int, layers: int) -> EqualBlocks:
    """The network of every arm."""
    return EqualBlocks(jaxbn.batch_norm(decay=0.9, use_bias=False), layers, width)


@cache
def of_depth(width: int, layers: int) -> loop.Task:
    """The network of every arm, under SGD with momentum at the run's "rate"."""
    blocks = network(width, layers)

    def init(run: dict, key: jax.Array, x: jax.Array) -> dict:
        factor = blocks_of(layers) ** (-run["shrunk"] / 2)
        return blocks.init({**run, "alpha": run["alpha"] * factor}, key, x)

    return loop.Task(init, blocks.apply, lambda run: optax.sgd(run["rate"], momentum=0.9))


def stages(settings: Sizes) -> Iterator[Stage]:
    """The start, at each depth."""
    for depth in settings.depths:
        yield Stage(f"start, {depth} layers", partial(start, settings, depth))


def start(settings: Sizes, depth: int) -> xr.Dataset:
    """`entering`, `branch` and `gradient` [seed, arm, block] before the first step."""
    arrays = loop.on_device(data.load(settings.data))
    images, labels = loop.take(arrays, data.spread(SEEN, len(arrays["train_labels"])))
    measure = jax.jit(jax.vmap(network(settings.width, depth).flow, (0, None, None)))
    begin = jax.vmap(partial(loop.init_run, of_depth(settings.width, depth), arrays["test_images"]))
    found = []
    for seed in settings.every_seed:
        runs = runs_of({"arm": ARMS, "rate": (0.0,)}, 1, seed)
        variables = begin(loop.stacked(runs, len(runs)))["variables"]
        found.append(jax.device_get(measure(variables, images, labels)))
    block = np.unique(np.geomspace(1, blocks_of(depth), POINTS).round().astype(int))
    names = {"seed": list(settings.every_seed), "arm": list(ARMS), "block": block, "depth": depth}
    sizes = {
        name: (("seed", "arm", "block"), np.stack([getattr(one, name) for one in found])[:, :, block - 1])
        for name in ("entering", "branch", "gradient")
    }
    return xr.Dataset(sizes, names)


def last_block(values: xr.DataArray) -> xr.DataArray:
    """The values of the last block at every depth: [depth, seed, arm]."""
    found = [values.sel(depth=depth, block=blocks_of(depth), drop=True) for depth in values.depth.values.tolist()]
    return xr.concat(found, "depth").assign_coords(depth=values.depth)


def blocks(r: xr.Dataset) -> xr.DataArray:
    """The number of blocks at every depth."""
    return (r.depth - 2) / 2


def share(r: xr.Dataset) -> xr.DataArray:
    """What leaves the last block's branch over what its shortcut carries, at the start: [depth, seed, arm]."""
    return last_block(r.branch) / last_block(r.entering)


def signal_growth(r: xr.Dataset) -> xr.DataArray:
    """Factor of the mean square per block on the way up, at the start: [depth, seed, arm]."""
    whole = last_block(r.entering) / r.entering.sel(block=LOWEST, drop=True)
    return whole ** (2 / (blocks(r) - LOWEST))


def gradient_growth(r: xr.Dataset) -> xr.DataArray:
    """Factor of the squared gradient per layer on the way down, at the start: [depth, seed, arm]."""
    whole = r.gradient.sel(block=LOWEST, drop=True) / last_block(r.gradient)
    return whole ** (1 / (blocks(r) - LOWEST))


def accuracy(r: xr.Dataset) -> xr.DataArray:
    """Test accuracy after the last step: [layers, arm, seed]."""
    return final(r.test_accuracy)


def deep(r: xr.Dataset) -> xr.DataArray:
    """The same of the deeper networks."""
    return accuracy(r).sel(layers=DEEP, drop=True)


def deepening(r: xr.Dataset) -> xr.DataArray:
    """What test accuracy gains from the shallower to the deeper network: [arm, seed]."""
    return difference(accuracy(r), DEEP, SHALLOW, "layers")


def mean_loss(r: xr.Dataset) -> xr.DataArray:
    """Training loss, mean over all steps: [layers, arm, seed]."""
    return r.loss.mean("step")


def by_block(r: xr.Dataset) -> xr.DataArray:
    """The branch over the shortcut in the deepest networks, at the start: [seed, arm, block]."""
    return (r.branch / r.entering).isel(depth=-1, drop=True).dropna("block", how="all").sel(arm=[RESIDUAL, NORM, ROOT])


def draw_blocks(ax: Axes, values: xr.DataArray, arms: Sequence[str]) -> None:
    """Lines by block in the deepest networks: geometric mean over seeds, and their range as a band."""
    values = values.isel(depth=-1).dropna("block")
    for arm in arms:
        color, line = STYLES[arm]
        own = values.sel(arm=arm)
        ax.plot(own.block, np.exp(np.log(own).mean("seed")), color=color, linestyle=line, label=arm)
        ax.fill_between(own.block, own.min("seed"), own.max("seed"), color=color, alpha=0.2, linewidth=0)


def draw_branch(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """The branch over the shortcut by block, at the start."""
    draw_blocks(ax, r.branch / r.entering, (RESIDUAL, NORM, ROOT))
    block = np.arange(1, blocks_of(settings.depths[-1]) + 1)
    ax.plot(block, block**-0.5, ":", color="black", label="theory: 1/sqrt(block)")
    ax.set(xscale="log", yscale="log", xlabel="block (1 is next to the input)", ylabel="branch / shortcut")
    ticks = [tick for tick in (1, 2, 5, 10, 20) if tick < block[-1]]
    ax.set_xticks([*ticks, block[-1]], [*map(str, ticks), str(block[-1])])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set(title=f"{settings.depths[-1]} layers, start: size of the branch")
    ax.legend(frameon=False, fontsize=8)


def draw_gradient(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """The gradient by block over that of the last block, at the start."""
    draw_blocks(ax, r.gradient / last_block(r.gradient), list(ARMS))
    ax.set(yscale="log", xlabel="block (1 is next to the input)", ylabel="gradient / that at the last block")
    ax.set(title=f"{settings.depths[-1]} layers, start: gradients")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** 0.2)  # room for the legend above the lines
    ax.legend(edgecolor="none", framealpha=0.85, fontsize=8)


def draw_accuracy(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """Test accuracy of every arm at both depths: a dot a seed, a bar their mean."""
    for place, arm in enumerate(ARMS):
        for offset, marker, layers in zip((-0.17, 0.17), "os", LAYERS, strict=True):
            values, color = accuracy(r).sel(arm=arm, layers=layers).values, STYLES[arm][0]
            ax.plot(values, np.full(len(values), place + offset), marker, color=color, alpha=0.4, markersize=5)
            ax.plot(values.mean(), place + offset, "|", color=color, markersize=14, markeredgewidth=2.5)
    for marker, layers in zip("os", LAYERS, strict=True):
        ax.plot([], [], marker, color="grey", label=f"{layers} layers")
    ax.axvline(0.1, color="grey", linestyle=":", linewidth=1, label="guessing")
    ax.set_yticks(range(len(ARMS)), [arm.replace(", ", ",\n") for arm in ARMS])
    ax.set(xlabel=f"test accuracy after {settings.steps:,} steps", xlim=(0, 1.02), ylim=(len(ARMS) - 0.5, -0.5))
    ax.set_title("Trained, each at its best rate")
    ax.legend(frameon=False, fontsize=8, loc="best")


of_the_last_block = partial(Claim, unit="times", ratio=True, precision=0.1)
trained = partial(Claim, unit="of test accuracy", precision=0.01)
of_deep = partial(trained, measures=f"final test accuracy of {DEEP} layers, each arm at its best rate")

EXPERIMENT = Experiment(
    title="Whether batch norm makes deep residual networks trainable by shrinking their branches.",
    question="Why do deep networks need batch norm: is it because it shrinks the residual branches?",
    source="De and Smith 2020; He et al. 2016",
    citation="Soham De and Samuel L. Smith: Batch Normalization Biases Residual Blocks Towards the Identity Function in"
    " Deep Networks. NeurIPS 2020, arXiv:2002.10444. Kaiming He, Xiangyu Zhang, Shaoqing Ren and Jian Sun: Deep"
    " Residual Learning for Image Recognition. CVPR 2016. Greg Yang et al.: A Mean Field Theory of Batch Normalization."
    " ICLR 2019.",
    theme=WHEN_IT_HELPS,
    answer={
        "cpu": "It is not shown that batch norm helps by shrinking the residual branches: of five residual networks of"
        " 56 layers none learned without it (0.10), all did with it (0.78), and one did with a scalar in its place"
        " that starts at 1/sqrt(blocks), to which it shrinks the last branch (0.19). With a scalar that starts at 0"
        " (SkipInit) four of five learned, to 0.65.",
    },
    surprise="Batch norm is said to make deep residual networks trainable by shrinking their branches. A learned"
    " scalar that starts at 1/sqrt(blocks), to which batch norm shrinks the last branch, let one of five networks of"
    " 56 layers learn, batch norm all five (0.19 against 0.78 on average, after 400 steps and at rates chosen with one"
    " seed).",
    reader_questions={
        "Does batch norm still matter in a residual network?": "Yes: with 56 layers our residual network named 0.78 of"
        " the digits with it and 0.10 without. At the start the mean square of the signal grew 1.6-fold a block"
        " without it.",
        "Can I train a deep network without batch norm?": "With a scalar that starts at 0 at the end of each residual"
        " branch (SkipInit) four of our five networks of 56 layers learned, to 0.65 on average, and the fifth stayed"
        " at guessing. With batch norm all five learned, to 0.78 on average, in the same 400 steps.",
        "Do shortcuts or batch norm make deep networks trainable?": "In our networks of 56 layers it took both: a"
        " plain one learned hardly anything with batch norm (0.21); its squared gradients grew 1.36-fold a layer on"
        " the way down. A residual one learned nothing without batch norm (0.10).",
    },
    differs="The sources train on CIFAR-10, for 64,000 steps (He et al.) and 200 epochs (De and Smith, as remembered),"
    " with weight decay, a schedule of rates and augmentation, in three stages of growing width. Here all blocks are"
    " equal, so that depth alone differs, and 3,500 digits are learned for two epochs at a constant rate; norm"
    " and ReLU stand before each convolution, as in De and Smith's networks (as remembered), where He et al. have them"
    " after it. 110 layers are measured at the start only. Of De and Smith the abstract was read, and He et al.'s"
    " figures in a repository that reproduces them (github.com/akamaster/pytorch_resnet_cifar10). Rates are chosen with"
    " one seed, which is little where only some networks learn: in the preset cpu SkipInit at 1/sqrt(blocks) with 56"
    " layers has rate 0.1 for its 0.41 on validation, and four of its five networks stayed at guessing. The preset full"
    " has CIFAR-10 and 64,000 steps.",
    settings={
        "smoke": Sizes(seeds=2, data="mnist5k", steps=2, interval=2, width=2, depths=(8,), most=8),
        "cpu": Sizes(seeds=5, data="mnist5k", steps=400, interval=200),
        "full": Sizes(seeds=5, data="cifar10", steps=64_000, interval=3_200, width=32),
    },
    grid=Grid(
        task, 16, {"layers": LAYERS}, {"arm": ARMS},
        Search(
            "rate", (1e-5, 1e-4, 0.001, 0.01, 0.03, 0.1, 0.3), seeds=1, extensions=1, together=False, least_steps=100
        ),
    ),
    stages=stages,
    claims=[
        of_the_last_block(
            "At the start batch norm shrinks the residual branch to about 1/sqrt(depth) of the shortcut.",
            lambda r: share(r).sel(arm=NORM, drop=True) * np.sqrt(blocks(r)), equal=0.2,
            measures="root mean square of the last block's branch over that of its shortcut, times the square root of"
            " the number of blocks, with batch norm",
        ),
        of_the_last_block(
            "Without batch norm the branch is as large as the shortcut, however deep the network.",
            lambda r: share(r).sel(arm=RESIDUAL, drop=True), above=0.5,
            measures="root mean square of the last block's branch over that of its shortcut, without norm",
            standalone="Without batch norm a residual branch is as large as its shortcut at the start, however deep"
            " the network.",
        ),
        of_the_last_block(
            "So without batch norm the signal grows exponentially with depth.",
            lambda r: signal_growth(r).sel(arm=RESIDUAL, drop=True), above=1.4, unit="times per block",
            measures="growth of the mean square from block to block of a residual network without norm (theory: 2, less"
            " what zero padding takes)",
            standalone="Without batch norm the signal of a residual network grows exponentially with depth.",
        ),
        of_the_last_block(
            "In a plain network batch norm makes gradients explode with depth.",
            lambda r: gradient_growth(r).sel(arm=PLAIN_NORM, drop=True), above=1.2, unit="times per layer",
            measures="growth of the squared gradient per layer on the way down, plain network with batch norm",
            source=YANG, dispute=GRADIENTS,
        ),
        of_the_last_block(
            "Shortcuts keep them from exploding.",
            Compared(lambda r: gradient_growth(r).isel(depth=-1, drop=True), NORM, PLAIN_NORM, ratio=True),
            below=0.9, unit="times per layer",
            measures="growth of the squared gradient per layer on the way down the deepest networks",
            standalone="Shortcuts keep gradients from exploding in a deep network with batch norm.",
        ),
        of_deep(
            "A deep plain network does not learn without batch norm.",
            lambda r: deep(r).sel(arm=PLAIN, drop=True), below=LEARNS, source="a common belief",
        ),
        of_deep(
            "With batch norm it learns.", lambda r: deep(r).sel(arm=PLAIN_NORM, drop=True), above=LEARNS, source=HE,
            standalone="With batch norm a deep plain network learns.",
        ),
        trained(
            "Even with batch norm a plain network gets worse when it is made deeper.",
            lambda r: deepening(r).sel(arm=PLAIN_NORM, drop=True), below=0.0, source=HE,
            measures=f"final test accuracy of {DEEP} layers minus that of {SHALLOW}, each at its best rate",
        ),
        trained(
            "A residual network with batch norm does not.",
            lambda r: deepening(r).sel(arm=NORM, drop=True), above=-0.01, source=HE,
            measures=f"final test accuracy of {DEEP} layers minus that of {SHALLOW}, each at its best rate",
            standalone="A residual network with batch norm does not get worse when it is made deeper.",
        ),
        of_deep(
            "Shortcuts alone are not enough: a deep residual network needs batch norm.",
            Compared(deep, NORM, RESIDUAL), above=0.05,
        ),
        of_deep(
            "Or it needs smaller branches: with SkipInit a deep residual network learns without batch norm.",
            Compared(deep, ZERO, RESIDUAL), above=0.05,
            standalone="With SkipInit, a learned scalar that starts at 0 on each branch, a deep residual network"
            " learns without batch norm.",
        ),
        trained(
            "With SkipInit it does as well as with batch norm.", Compared(accuracy, ZERO, NORM), equal=0.02,
            measures="final test accuracy by depth, each arm at its best rate",
            standalone="A residual network does as well with SkipInit as with batch norm.",
        ),
        trained(
            "Batch norm's own factor is enough: SkipInit that starts at 1/sqrt(blocks) does as well as batch norm.",
            Compared(accuracy, ROOT, NORM), equal=0.02, source="the control of De and Smith 2020, as remembered",
            measures="final test accuracy by depth, each arm at its best rate",
            standalone="The factor by which batch norm shrinks residual branches is enough: SkipInit that starts at"
            " 1/sqrt(blocks) does as well as batch norm.",
        ),
        Claim(
            "What remains for batch norm is speed: it learns faster than SkipInit.", Compared(mean_loss, NORM, ZERO),
            below=0.0, precision=0.05, unit="of training loss", source="a common belief",
            measures="training loss, mean over all steps, by depth, each arm at its best rate",
            standalone="What remains for batch norm is speed: a residual network learns faster with it than with"
            " SkipInit.",
        ),
    ],
    tables=[
        table_of(
            "Final test accuracy", accuracy, rows=["arm"], columns="layers", published=PUBLISHED,
            note="Published: CIFAR-10 (He et al.).",
        ),
        table_of(
            "Learning rate chosen on validation", lambda r: r.rate.isel(seed=[0]), rows=["arm"], columns="layers",
            form="g",
        ),
        table_of(
            "Training loss, mean of the second half of the steps", lambda r: final(r.loss), rows=["arm"],
            columns="layers", form=".3g", note="Guessing: 2.303.",
        ),
        table_of(
            "Size of the last block's branch over that of its shortcut, at the start", share, rows=["arm"],
            columns="depth", note="Plain networks: over what the shortcut would carry.",
        ),
        table_of(
            "Size of a block's branch over that of its shortcut, at the start, deepest networks, by block", by_block,
            rows=["arm"], columns="block", note="Theory, with batch norm: 1/sqrt(block), that is 1, 0.707, 0.577, ...",
        ),
        table_of(
            "Growth of the squared gradient per layer on the way down, at the start", gradient_growth, rows=["arm"],
            columns="depth", note="Published for dense layers with batch norm and no shortcuts: 1.467 (Yang et al.).",
        ),
    ],
    pictures=[
        panels(
            draw_branch, draw_gradient, draw_accuracy, file="depth.png", size=(4.6, 4.2),
            title="Why do deep networks need batch norm: because it shrinks the residual branches?",
            caption="Left and middle: before the first step; line: geometric mean of the seeds, band: their range."
            " Branch and shortcut: root mean squares of what a block's convolutions add, and of what they add it to."
            " SkipInit: no norm, one learned number at the end of each branch; at 0 there is no branch at the start."
            " Right: a dot is a seed, a bar the mean.",
        )
    ],
)  # fmt: skip
