"""Does batch norm take the largest eigenvalues from the Hessian, and do they come back when its statistics are frozen?

Protocol (Ghorbani et al. 2019, section 4): a small VGG-style network on 3,500 digits, plain SGD, batch 60, 100 steps,
with and without batch norm, from the same weights and on the same batches, once at one rate for all and once at the
rate that was best on validation for each. Then the greatest eigenvalues of the Hessian of the loss of 250 training
digits are found by Lanczos' method, through the statistics of those digits.

The control is Page's (2019): the same trained network once more, its statistics those of the same digits but frozen.
It computes the same function and has the same loss; only, the statistics do not follow when the weights move.

`python -m experiments run spectrum` takes about five minutes on two cores (100 steps, 10 seeds, 5,000 digits). By a
pilot that is enough for two of the claims; the others would need 11 to 135 seeds.
"""

from dataclasses import dataclass
from functools import cache, partial

import jax
import numpy as np
import optax
import xarray as xr
from matplotlib.axes import Axes

from experiments.framework.claim import Claim, Compared
from experiments.framework.experiment import WHY_FASTER, Experiment, Grid, Search, Settings, Trained
from experiments.framework.pictures import COLORS, dots, lines, panels
from experiments.framework.results import final, side_by_side
from experiments.framework.tables import table_of
from experiments.training import loop
from experiments.training.switched_networks import rate_of, vgg_task
from experiments.training.switched_norm import freeze, kind
from jaxbn import diagnostics

PLAIN, NORM, FROZEN = "plain", "batch norm", "batch norm, then frozen"
ARMS = {PLAIN: kind(normalize=False), NORM: kind()}
SEEN = (PLAIN, NORM, FROZEN)  # what spectra are of: the networks of ARMS, and the second with frozen statistics
BEST, SAME = "best rate of each", "same rate"
RATE = 0.1  # where both have the same
BATCH_SIZE, CLASSES = 60, 10
DIGITS, ITERATIONS = 250, 40  # what the Hessian is of, and of Lanczos' method
SHADES = {**COLORS, FROZEN: "#222222"}


@dataclass(frozen=True, kw_only=True)
class Sizes(Settings):
    """And the network: filters by block, units of the dense layer."""

    blocks: tuple[tuple[int, ...], ...] = ((8, 8), (16, 16), (32, 32))
    units: int = 64


@cache
def task(settings: Sizes) -> loop.Task:
    """The network with the run's normalizer, under SGD at its "rate", or at RATE where it has the "same" as all."""
    return vgg_task(settings.blocks, settings.units, lambda run: optax.sgd(rate_of(run, RATE)))


def spectra(trained: Trained) -> dict:
    """Of every network as in SEEN: its greatest Ritz values in descending order, and the curvature along its gradient.

    Networks that are none of the arm in question have no values. Curvature: g.Hg / (g.g greatest eigenvalue).
    """
    loss = loop.loss_of(trained.task.apply)

    @jax.jit
    def measured(variables: dict, seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        key = jax.random.fold_in(jax.random.key(seed), 3)
        index = jax.random.choice(key, len(trained.arrays["train_labels"]), (DIGITS,), replace=False)
        batch = loop.take(trained.arrays, index)
        found = diagnostics.spectrum(loss, variables, batch, key=key, iterations=ITERATIONS)
        gradient = jax.grad(lambda params: loss({**variables, "params": params}, batch, key).loss_sum)(
            variables["params"]
        )
        image = diagnostics.hessian_vector_product(loss, variables, batch, gradient)
        along = optax.tree.vdot(gradient, image) / optax.tree.vdot(gradient, gradient)
        values, _ = found.leading(ITERATIONS)
        return values, along / values[0]

    values = np.full((len(trained.runs), len(SEEN), ITERATIONS), np.nan)
    along = np.full(values.shape[:2], np.nan)
    for number, run in enumerate(trained.runs):
        variables = jax.tree.map(lambda leaf, number=number: leaf[number], trained.variables)
        seen = {NORM: variables, FROZEN: freeze(variables)} if run["normalize"] else {PLAIN: variables}
        for name, one in seen.items():
            at = number, SEEN.index(name)
            values[at], along[at] = measured(one, np.int32(run["seed"]))
    return {"eigenvalue": (("seen", "place"), values), "along": (("seen",), along)}


def of_each(array: xr.DataArray) -> xr.DataArray:
    """What `spectra` found, by network: [arm, ...] with FROZEN as an arm of its own."""
    array = array.assign_coords(seen=list(SEEN))
    found = [array.sel(seen=name, arm=NORM if name == FROZEN else name, drop=True) for name in SEEN]
    return xr.concat(found, "arm").assign_coords(arm=list(SEEN))


def largest(r: xr.Dataset) -> xr.DataArray:
    """The greatest eigenvalue."""
    return of_each(r.eigenvalue)[{"place": 0}]


def outliers(r: xr.Dataset) -> xr.DataArray:
    """How far the greatest eigenvalue stands out: over the tenth, as many as there are classes."""
    values = of_each(r.eigenvalue)
    return values[{"place": 0}] / values[{"place": CLASSES - 1}]


def along(r: xr.Dataset) -> xr.DataArray:
    """The curvature along the gradient over the greatest eigenvalue: 1 where the gradient is its eigenvector."""
    return of_each(r.along)


def figures(r: xr.Dataset) -> xr.DataArray:
    """What the table shows of each network."""
    accuracy = final(r.test_accuracy)
    accuracy = xr.concat([accuracy.sel(arm=NORM if name == FROZEN else name, drop=True) for name in SEEN], "arm")
    found = {"greatest": largest(r), "over the tenth": outliers(r), "along the gradient": along(r)}
    return side_by_side({**found, "test accuracy": accuracy.assign_coords(arm=list(SEEN))})


def draw_values(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """The 20 greatest eigenvalues of each, at the same rate."""
    values = of_each(r.eigenvalue).sel(trained=SAME, drop=True)[{"place": slice(20)}]
    values = values.assign_coords(place=np.arange(values.sizes["place"]) + 1)
    lines(ax, values, x="place", hue="arm", palette=SHADES, style="arm", markers=True, dashes=False)
    ax.set(yscale="log", xlabel="place", ylabel="eigenvalue of the Hessian", title=f"both trained at rate {RATE:g}")
    ax.legend(frameon=False, fontsize=8)


def draw_figure(values, label: str, logarithmic: bool, ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """One figure of every network, each at its best rate."""
    dots(ax, values(r).sel(trained=BEST), "arm", SHADES)
    ax.set(xlabel=label, title="each trained at its best rate", **({"xscale": "log"} if logarithmic else {}))


ratio = partial(Claim, unit="times", precision=0.2)
GHORBANI, PAGE = "Ghorbani et al. 2019, section 4", "Page 2019, How to train your ResNet 7"

EXPERIMENT = Experiment(
    title="Frozen statistics bring back the large eigenvalues of the Hessian that batch norm takes away.",
    question="Does batch norm take away the largest eigenvalues of the loss, and is it the moving statistics that do?",
    source="Ghorbani, Krishnan and Xiao 2019; Page 2019",
    citation="B. Ghorbani, S. Krishnan, Y. Xiao: An Investigation into Neural Net Optimization via Hessian Eigenvalue"
    " Density. ICML 2019, arXiv:1901.10159. D. Page: How to Train Your ResNet 7: Batch Norm. myrtle.ai, 2019.",
    theme=WHY_FASTER,
    answer={
        "cpu": "In part: at the same rate the greatest eigenvalue of the loss's Hessian was a third of that without"
        " batch norm (at the best rate of each ten seeds do not tell), and it stood out half as far. Frozen statistics"
        " made the same network's 7 times as large, where one to two orders are claimed: it is their following the"
        " weights that keeps it small.",
    },
    surprise="Freezing the statistics of a trained network with batch norm is said to make the largest eigenvalues of"
    " its Hessian larger by one to two orders. In a small VGG-style network the greatest grew 7-fold (5.7 to 8.4).",
    reader_questions={
        "Does batch norm lower curvature by normalizing, or because its statistics follow the weights?": "Because they"
        " follow the weights. With the same statistics held fixed the same function of the images had a Hessian whose"
        " greatest eigenvalue was 7 times as large, in our VGG-style network.",
    },
    differs="The sources train residual networks on CIFAR-10 to the end, with curves whose numbers we could not read;"
    " here eight small layers learn digits for 100 steps. In place of the share of the gradient in the eigenspace of"
    " the ten greatest eigenvalues we take the curvature along it.",
    settings={
        "smoke": Sizes(
            seeds=2, data="mnist5k", steps=2, interval=2, blocks=((4,),), units=8
        ),
        "cpu": Sizes(seeds=10, data="mnist5k", steps=100, interval=50),
        "full": Sizes(
            seeds=5, data="cifar10", steps=15_000, interval=1_500, units=512,
            blocks=((64,), (128,), (256, 256), (512, 512), (512, 512)),
        ),
    },
    grid=Grid(
        task, BATCH_SIZE, {}, {"trained": {BEST: {"same": 0}, SAME: {"same": 1}}, "arm": ARMS},
        Search("rate", (0.1, 0.3, 1.0), extensions=1, shared=("trained",), together=False, least_steps=10),
        conclude=spectra,
    ),
    claims=[
        ratio(
            "Without batch norm a few eigenvalues stand far out.", lambda r: outliers(r).sel(arm=PLAIN, drop=True),
            measures="greatest eigenvalue of the Hessian over the tenth, without batch norm", ratio=True, above=5.0,
            source=GHORBANI, standalone="Without batch norm a few eigenvalues of the Hessian stand far out.",
        ),
        ratio(
            "With batch norm they stand out less.", Compared(outliers, NORM, PLAIN, ratio=True),
            measures="greatest eigenvalue over the tenth", below=1.0, source=GHORBANI,
            standalone="With batch norm the largest eigenvalues of the Hessian stand out less.",
        ),
        ratio(
            "The greatest eigenvalue is smaller with batch norm.", Compared(largest, NORM, PLAIN, ratio=True),
            measures="greatest eigenvalue", below=1.0, source=PAGE,
            standalone="The greatest eigenvalue of the Hessian is smaller with batch norm.",
        ),
        Claim(
            "With batch norm less of the gradient lies where the curvature is greatest.",
            Compared(along, NORM, PLAIN), measures="curvature along the gradient over the greatest eigenvalue",
            unit="of the greatest eigenvalue", below=0.0, precision=0.1, source=GHORBANI,
        ),
        ratio(
            "The same network with frozen statistics has eigenvalues that are larger by one to two orders.",
            Compared(largest, FROZEN, NORM, ratio=True), measures="greatest eigenvalue", above=10.0, source=PAGE,
            standalone="A network with batch norm has eigenvalues of the Hessian that are larger by one to two orders"
            " when its statistics are frozen.",
        ),
        ratio(
            "With frozen statistics the outliers are back.", Compared(outliers, FROZEN, NORM, ratio=True),
            measures="greatest eigenvalue over the tenth", above=1.0, source=GHORBANI,
            standalone="When the statistics of batch norm are frozen, outliers among the eigenvalues of the Hessian"
            " are back.",
        ),
    ],
    tables=[
        table_of(
            "The Hessian after training", figures, rows=["trained", "arm"], columns="figure", form=".3g",
            note="Greatest eigenvalue; that over the tenth; curvature along the gradient over the greatest eigenvalue.",
        ),
        table_of(
            "Learning rate chosen on validation",
            lambda r: r.rate.sel(trained=BEST).isel(seed=[0]).expand_dims(chosen=["rate"]), rows=["arm"],
            columns="chosen", form="g",
        ),
    ],
    pictures=[
        panels(
            draw_values,
            partial(draw_figure, largest, "greatest eigenvalue", True),
            partial(draw_figure, along, "curvature along gradient / greatest", False),
            file="spectrum.png", size=(4.6, 4.2),
            title="Does batch norm take away the largest eigenvalues, and is it its moving statistics that do?",
            caption="Eigenvalues of the Hessian of the loss of 250 digits after training, largest first. 'Then frozen'"
            " is the same trained network with the same statistics, which no longer follow when the weights move."
            " Left: means over seeds, bands their range. Dots: seeds.",
        )
    ],
)  # fmt: skip
