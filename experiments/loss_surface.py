"""Is the loss flat between trained networks, and does batch norm take the plateaus away?

Protocol (Im et al. 2016): a small VGG-style network and an NIN-style one on 3,500 digits, batch 60, 120 steps, with and
without batch norm. Five optimizers start from the same weights and see the same batches, each at the rate that was best
on validation. Then the loss of 250 training digits is measured at 17 points of the straight line between the end points
of every two optimizers. The statistics are those of the digits at each point. A plateau is where the loss hardly
changes: between neighbouring points by less than a tenth of the mean change on its line. A line like sin^2 has 4% of
it, on average over where its top lies.

The control is the same line with stale statistics: the running ones of its first end, which do not follow the weights.

`python -m experiments run loss_surface` takes about five minutes on two cores. 10 seeds are taken, the most here.
"""

from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr

from experiments.framework.claim import Claim, Compared
from experiments.framework.experiment import WHY_FASTER, Drawn, Experiment, Grid, Search, Settings, Trained
from experiments.framework.pictures import COLORS, dots, figure, finish, lines
from experiments.framework.results import final, side_by_side
from experiments.framework.tables import table_of
from experiments.training import loop, models
from experiments.training.switched_networks import task as task_of
from experiments.training.switched_networks import vgg_task
from experiments.training.switched_norm import kind
from jaxbn import diagnostics

PLAIN, NORM = "plain", "batch norm"
VGG, NIN = "VGG-style", "NIN-style"
ARMS = {PLAIN: kind(normalize=False), NORM: kind()}
STALE, AVERAGED = "batch norm, stale statistics", "batch norm, averaged statistics"
STATISTICS = (NORM, STALE, AVERAGED)  # in the order of `diagnostics.Interpolation`
SEEN = (PLAIN, NORM, STALE)
OPTIMIZERS = {  # made for a rate, and the rate that a factor of 1 stands for
    "SGD": (optax.sgd, 0.1),
    "momentum": (partial(optax.sgd, momentum=0.9), 0.03),
    "RMSProp": (optax.rmsprop, 0.001),
    "Adadelta": (partial(optax.adadelta, rho=0.95), 1.0),
    "Adam": (optax.adam, 0.003),
}
PAIRS = list(combinations(OPTIMIZERS, 2))
CORNERS = ("SGD", "RMSProp", "Adam")  # of the plane that is drawn
BATCH_SIZE, DIGITS = 60, 250
LINE, SIDE = np.linspace(0, 1, 17), np.linspace(-0.25, 1.25, 13)  # points of a line; of a side of the plane
FLAT = 0.1  # of the mean change on the line: what hardly changes changes less
SHADES = {**COLORS, STALE: "#222222"}


@dataclass(frozen=True, kw_only=True)
class Sizes(Settings):
    """And the network: filters by block, units of the dense layer."""

    blocks: tuple[tuple[int, ...], ...] = ((8,), (16,), (16,))
    units: int = 64


def chosen(run: dict) -> optax.GradientTransformation:
    """The optimizer with the run's number in OPTIMIZERS, at its rate times the run's "factor".

    All are computed and one is taken, so that all runs are one program.
    """
    every = [optax.flatten(make(rate * run["factor"])) for make, rate in OPTIMIZERS.values()]

    def init(params: optax.Params) -> list:
        return [one.init(params) for one in every]

    def update(gradient: optax.Updates, states: list, params: optax.Params) -> tuple[optax.Updates, list]:
        stepped = [one.update(gradient, state, params) for one, state in zip(every, states, strict=True)]
        number = run["number"].astype(int)
        updates = jax.tree.map(lambda *leaves: jnp.stack(leaves)[number], *(updates for updates, _ in stepped))
        return updates, [state for _, state in stepped]

    return optax.GradientTransformation(init, update)


@cache
def task(settings: Sizes, network: str) -> loop.Task:
    """One of the two networks with the run's normalizer and optimizer; NIN's blocks have VGG's last filters."""
    if network == VGG:
        return vgg_task(settings.blocks, settings.units, chosen)
    return task_of(partial(models.nin, [block[-1] for block in settings.blocks]), chosen)


def surfaces(trained: Trained) -> dict:
    """The loss on the line from each network to those of the later OPTIMIZERS, and on the plane of CORNERS.

    "along" [runs, other optimizer, statistics, point]; "plane" [runs, statistics, a, b] of the first seed; nan where
    none is measured, and of the VGG-style network alone.
    """
    apply = trained.task.apply
    measure = partial(diagnostics.interpolate, loop.loss_of(apply), loop.loss_of(apply, train=False))
    names, runs, networks = list(OPTIMIZERS), trained.runs, jax.device_get(trained.variables)
    along = np.full((len(runs), len(names), len(STATISTICS), len(LINE)), np.nan)
    plane = np.full((len(runs), len(STATISTICS), len(SIDE), len(SIDE)), np.nan)
    numbers = {(run["seed"], run["arm"], run["optimizer"]): number for number, run in enumerate(runs)}
    for (seed, arm, name), number in numbers.items():
        key = jax.random.fold_in(jax.random.key(seed), 3)
        index = jax.random.choice(key, len(trained.arrays["train_labels"]), (DIGITS,), replace=False)
        batch = loop.take(trained.arrays, index)

        def corners(*others: str, seed=seed, arm=arm) -> list[dict]:
            return [jax.tree.map(lambda leaf, at=numbers[seed, arm, o]: leaf[at], networks) for o in others]

        for other in names[names.index(name) + 1 :]:
            along[number, names.index(other)] = measure(corners(name, other), batch, (LINE,))
        if name == CORNERS[0] and seed == runs[0]["seed"] and trained.program["network"] == VGG:
            plane[number] = measure(corners(*CORNERS), batch, (SIDE, SIDE))
    # Five digits are enough, and keep the record small.
    found = {"along": (("other", "statistics", "point"), np.round(along, 5))}
    if not np.isnan(plane).all():
        found["plane"] = (("statistics", "a", "b"), np.round(plane, 5))
    return found


def of_each(array: xr.DataArray) -> xr.DataArray:
    """What `surfaces` found with STATISTICS as arms, plain networks beside them: [arm, ...]."""
    found = [array.sel(arm=PLAIN, drop=True)[{"statistics": 0}]]
    found += [array.sel(arm=NORM, drop=True)[{"statistics": number}] for number in range(len(STATISTICS))]
    return xr.concat([one.drop_vars("statistics", errors="ignore") for one in found], "arm").assign_coords(
        arm=[PLAIN, *STATISTICS]
    )


def on_lines(r: xr.Dataset) -> xr.DataArray:
    """The loss on every line: [arm, line, seed, point]; a point is where it lies, from 0 to 1."""
    along = of_each(r.along).assign_coords(other=list(OPTIMIZERS), point=LINE)
    found = [along.sel(optimizer=one, other=other, drop=True) for one, other in PAIRS]
    return xr.concat(found, "line").assign_coords(line=[" to ".join(pair) for pair in PAIRS]).rename("loss")


def flat(r: xr.Dataset) -> xr.DataArray:
    """The share of each line on which the loss hardly changes."""
    change = abs(on_lines(r).diff("point"))
    return (change < FLAT * change.mean("point")).mean("point")


def flat_and_high(r: xr.Dataset) -> xr.DataArray:
    """The share on which it hardly changes, halfway up from the least to the greatest loss of the line or higher."""
    loss = on_lines(r)
    change = abs(loss.diff("point"))
    high = loss > (loss.min("point") + loss.max("point")) / 2
    return ((change < FLAT * change.mean("point")) & high.sel(point=change.point)).mean("point")


def barrier(r: xr.Dataset) -> xr.DataArray:
    """The greatest loss on the line minus that of the worse end."""
    loss = on_lines(r)
    return loss.max("point") - loss[{"point": [0, -1]}].max("point")


def variation(r: xr.Dataset) -> xr.DataArray:
    """How far a line's shape is from the mean shape of the other seeds: root of the mean square over its points.

    A shape is the loss, its least on the line taken as 0 and its greatest as 1.
    """
    loss = on_lines(r)
    low, high = loss.min("point"), loss.max("point")
    shape = (loss - low) / (high - low)
    seeds = shape.sizes["seed"]
    others = (shape.sum("seed") - shape) / (seeds - 1)
    return np.sqrt(((shape - others) ** 2).mean("point")).mean("line")


def mistaken(r: xr.Dataset) -> xr.DataArray:
    """The loss midway with statistics of the ends over that with statistics of the point, geometric mean of lines."""
    middle = np.log(on_lines(r).sel(point=0.5))
    return np.exp((middle.sel(arm=[STALE, AVERAGED]) - middle.sel(arm=NORM, drop=True)).mean("line"))


def figures(r: xr.Dataset) -> xr.DataArray:
    """What the table shows of each arm."""
    found = {
        "flat": flat(r).mean("line"),
        "flat and high": flat_and_high(r).mean("line"),
        "barrier": barrier(r).mean("line"),
        "variation": variation(r),
    }
    return side_by_side({name: array.sel(arm=list(SEEN)) for name, array in found.items()})


def draw(settings: Sizes, r: xr.Dataset) -> Drawn:
    """Every line, mean over seeds, and the share of them on which the loss hardly changes; a row for each network."""
    drawn, axes = figure(2, len(SEEN) + 1, size=(3.7, 3.1))
    for network, row in zip((VGG, NIN), axes, strict=True):
        own = r.sel(network=network)
        each = on_lines(own)
        loss = each.mean("seed")
        highest = float(loss.sel(arm=[PLAIN, NORM]).max())
        for arm, ax in zip(SEEN, row, strict=False):
            # On a logarithmic axis an arithmetic mean would show the worst seeds alone.
            shown = np.exp(np.log(each.sel(arm=arm)).mean("seed")) if arm == STALE else loss.sel(arm=arm, drop=True)
            lines(ax, shown, x="point", units="line", estimator=None, errorbar=None, color=SHADES[arm], alpha=0.6)
            title = {PLAIN: "without batch norm"}.get(arm, arm)
            ax.set(
                xlabel="way from one end to the other", ylabel="loss of training digits", title=f"{network}: {title}"
            )
            if arm == STALE:
                ax.set(yscale="log", ylabel="loss of training digits, logarithmic")
            else:
                ax.set_ylim(0, 1.05 * highest)  # the same for both
        ax = row[-1]
        dots(ax, flat(own).mean("line").sel(arm=list(SEEN)), "arm", SHADES)
        ax.set_yticks(range(len(SEEN)), [name.replace(", ", ",\n") for name in SEEN])
        ax.set(xlabel="share of the line", title=f"{network}: where it hardly changes")
        ax.axvline(FLAT, color="#888888", linestyle=":")
    return finish(
        drawn, "loss_surface.png",
        "Is the loss flat between trained networks, and does batch norm take the plateaus away?",
        "Loss on the straight lines between the end points of every two of five optimizers, mean over seeds. Batch"
        " norm: statistics of the digits at each point. Stale: running statistics of the first end, geometric mean over"
        " seeds. Right: a dot is a seed, a bar the mean of seeds; beyond the dotted line there would be plateaus. The"
        " loss hardly changes where neighbouring points differ by less than a tenth of the line's mean change.",
    )  # fmt: skip


def draw_planes(settings: Sizes, r: xr.Dataset) -> Drawn:
    """The loss on the plane of three end points of the first seed."""
    planes = of_each(r.plane.sel(optimizer=CORNERS[0], network=VGG, drop=True)).isel(seed=0)
    drawn, axes = figure(1, len(SEEN), size=(4.2, 4.0))
    levels = np.geomspace(0.05, 12.8, 9)
    for name, ax in zip(SEEN, axes[0], strict=True):
        values = np.clip(planes.sel(arm=name).transpose("b", "a").values, levels[0], levels[-1])
        filled = ax.contourf(SIDE, SIDE, values, levels, norm="log", cmap="cividis")
        for place, corner in zip([(0, 0), (1, 0), (0, 1)], CORNERS, strict=True):
            ax.plot(*place, "o", color="white", markeredgecolor="black")
            box = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1.5}
            ax.annotate(corner, place, xytext=(0, 8), textcoords="offset points", ha="center", bbox=box)
        ax.set(title=name, xlabel=f"towards {CORNERS[1]}", ylabel=f"towards {CORNERS[2]}", aspect="equal")
    drawn.colorbar(filled, ax=axes[0], label="loss of training digits", ticks=levels, format="%.2g")
    return finish(
        drawn, "planes.png", "What does the loss look like between the end points of three optimizers?",
        "The plane through three trained VGG-style networks of one seed, which started from the same weights. Dark:"
        " small loss. Left: without batch norm. Middle: statistics of each point. Right: the running statistics of the"
        f" network at {CORNERS[0]}, which is the usual mistake. Losses beyond {levels[0]:g} and {levels[-1]:g} have the"
        " last colours.",
    )  # fmt: skip


share = partial(Claim, unit="share of the line", precision=0.05)
HARDLY = (
    "share of the line between two optimizers' end points on which the loss of 250 training digits changes by less"
    " than a tenth of the line's mean change, statistics recomputed at each point"
)

EXPERIMENT = Experiment(
    title="Between trained networks the loss has plateaus without batch norm, and none with it.",
    question="Is the loss flat between trained networks, and does batch norm take the plateaus away?",
    source="Im, Tao and Branson 2016, as remembered",
    citation="D. J. Im, M. Tao, K. Branson: An Empirical Analysis of the Optimization of Deep Network Loss Surfaces."
    " 2016, arXiv:1612.04010.",
    theme=WHY_FASTER,
    answer={
        "cpu": "It depends on the network: between the end points of different optimizers the loss of an NIN-style one"
        " was flat on 19% of the line without batch norm, where it hardly learned, and on 7% with it; a VGG-style one"
        " had 5% and 8% (a smooth hill: 4%). Stale running statistics make the loss look five to six times too large"
        " midway, and about 20 times at the far end.",
    },
    surprise="The loss between trained networks is said to have plateaus without batch norm and none with it. In a"
    " VGG-style network it was flat on 5% of the way without batch norm and on 8% with it, little more than the 4% of"
    " a smooth hill.",
    reader_questions={
        "Do averaged weights (EMA, SWA) need new statistics?": "Yes, if they are the average of networks that differ:"
        " midway between two that different optimizers had trained, the loss of our networks was 1.3 and 2.0 times too"
        " large with averaged statistics. With those of one end it was five and six times too large.",
        "Do different optimizers end in different valleys?": "It depends on how far they come: after two epochs from"
        " the same start there was hardly a hill between them in our VGG-style network (0.02 to 0.03 of loss), and one"
        " of 0.4 in the deeper NIN-style one with batch norm. Without it that one had hardly left its start.",
    },
    differs="As remembered, the source trains VGG and NIN on CIFAR-10 until they hardly change, and shows surfaces"
    " without a number for plateaus; we could read its abstract alone. Here five small layers (ten in"
    " NIN's style) learn digits for two epochs, with strides where the sources have maxima, and there is hardly any"
    " hill between end points. Five of the twenty arms took the greatest rate that was tried, where the search ended."
    " The share of flat ground and the stale statistics are ours.",
    settings={
        "smoke": Sizes(seeds=2, data="mnist5k", steps=2, interval=2, blocks=((4,),), units=8),
        "cpu": Sizes(seeds=10, data="mnist5k", steps=120, interval=60),
        "full": Sizes(
            seeds=5, data="cifar10", steps=50_000, interval=5_000, units=512,
            blocks=((64,), (128,), (256, 256), (512, 512), (512, 512)),
        ),
    },
    grid=Grid(
        task, BATCH_SIZE, {"network": (VGG, NIN)},
        {"arm": ARMS, "optimizer": {name: {"number": number} for number, name in enumerate(OPTIMIZERS)}},
        Search("factor", (0.3, 1.0, 3.0), extensions=1, together=False, least_steps=10),
        conclude=surfaces,
    ),
    claims=[
        share(
            "Without batch norm the loss has plateaus between trained networks.",
            lambda r: flat(r).sel(arm=PLAIN, drop=True), measures=f"{HARDLY}; without batch norm", above=0.1,
        ),
        share(
            "With batch norm it has none.", lambda r: flat(r).sel(arm=NORM, drop=True),
            measures=f"{HARDLY}; with batch norm", below=0.1,
            standalone="With batch norm the loss has no plateaus between trained networks.",
        ),
        share(
            "With batch norm it has fewer.", Compared(flat, NORM, PLAIN), measures=HARDLY, below=0.0,
            standalone="With batch norm the loss between trained networks has fewer plateaus than without.",
        ),
        share(
            "It is the statistics that fit each point that take the plateaus away: with stale ones there are more.",
            Compared(flat, STALE, NORM), measures=f"{HARDLY} or stale", above=0.0, source="the control is ours",
            standalone="It is batch norm's statistics that fit each point that take the plateaus between trained"
            " networks away: with stale ones there are more.",
        ),
        Claim(
            "Different optimizers end in different valleys.",
            lambda r: barrier(r).sel(arm=[PLAIN, NORM]),
            measures="greatest loss on the line minus that of the worse end", unit="of loss", above=0.1,
            standalone="Different optimizers end in different valleys of the loss.",
        ),
        Claim(
            "With batch norm the surface looks more alike from one run to the next.",
            Compared(variation, NORM, PLAIN, ratio=True),
            measures="distance of a line's shape from the mean shape of the other seeds, least and greatest loss of a"
            " line taken as 0 and 1", unit="times", below=1.0, precision=0.2,
            standalone="With batch norm the loss between trained networks looks more alike from one run to the next.",
        ),
        Claim(
            "With statistics of the ends the loss between them looks larger than it is.", mistaken,
            measures="loss midway with stale or averaged running statistics over that with statistics of the point",
            unit="times", ratio=True, above=1.0, precision=0.2, source="the control is ours",
            standalone="With batch norm's statistics of the ends, the loss between two trained networks looks larger"
            " than it is.",
        ),
    ],
    tables=[
        table_of(
            "Lines between the end points of two optimizers",
            figures, rows=["network", "arm"], columns="figure", form=".3f",
            note="Flat: share of the line on which the loss hardly changes. High: in the upper half of the line's loss."
            " Barrier: greatest loss minus that of the worse end. Variation: distance of shapes of different seeds.",
        ),
        table_of(
            "Test accuracy of the end points",
            lambda r: final(r.test_accuracy), rows=["network", "arm"], columns="optimizer",
        ),
        table_of(
            "Learning rate chosen on validation, as a factor of the usual one",
            lambda r: r.factor.isel(seed=[0]), rows=["network", "arm"], columns="optimizer", form="g",
            note="Usual: " + ", ".join(f"{name} {rate:g}" for name, (_, rate) in OPTIMIZERS.items()) + ".",
        ),
    ],
    pictures=[
        draw,
        draw_planes,
    ],
)  # fmt: skip
