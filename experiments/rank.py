"""Does batch norm keep the layers of a deep network from collapsing to one direction, and does that decide who trains?

Part one, at the start: as many Gaussian inputs as units go through up to 5,000 layers (with ReLU 1,000)
`H -> F(norm(H W))` with W uniform on [-a, a] (the scale does not matter), in float64. Rank is the number of singular
values above 1e-5 of the largest. Broken batch norm, the source's control, is the same with W uniform on [0, 2a].

Part two, training: MLPs of 2 to 32 hidden layers of 64 units on digits, ReLU, batch 64, 400 steps of SGD at a rate
chosen on validation for every arm and depth. Arms: PyTorch's default weights and biases; He's weights; batch norm;
broken batch norm; and batch norm whose statistics are those of 512 digits at the start and stay so: a network without
normalization that starts as the normalized one. The rank at the start is that of the last hidden layer on 128 digits,
counted in float32 as the source's code does.

`python -m experiments run rank` took twelve minutes on two cores with other work beside it; `full` is the source's
size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from scipy.stats import rankdata

from experiments.framework.claim import Claim, Compared
from experiments.framework.experiment import WHAT_IT_IS, Experiment, Grid, Search, Settings, Stage
from experiments.framework.pictures import COLORS, lines, panels
from experiments.framework.results import final
from experiments.framework.tables import table_of
from experiments.training.random_chains import BATCH, BROKEN, PLAIN, chain_ranks
from experiments.training.towers import ARMS, DEPTHS, HE, STARTED, starts, task

COLLAPSED = 1.2  # of the source's lower bound of the rank, whose least value is 1
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
# Read off the picture in the source's repository (linear, gamma = infinity): 2 to the power of 1.5, 2.2, ...
PUBLISHED = xr.DataArray([2.8, 4.6, 7.1, 11.1, 16.9, 25.1], {"width": [8, 16, 32, 64, 128, 256]})


@dataclass(frozen=True, kw_only=True)
class Sizes(Settings):
    """And part one's widths and depths (ReLU stops at `relu_depth`), and the width and deepest network of part two."""

    widths: tuple[int, ...]
    chain_depths: tuple[int, ...]
    relu_depth: int
    width: int


def stages(settings: Sizes) -> Iterator[Stage]:
    """One for each width of part one, and the start of part two."""
    for width in settings.widths:
        measure = partial(chain_ranks, width, settings.chain_depths, settings.relu_depth, settings.every_seed)
        yield Stage(f"width {width}", measure)
    yield Stage("start", partial(starts, settings.data, settings.width, settings.every_seed))


def last_layer(found: xr.DataArray) -> xr.DataArray:
    """The rank or its bound in the deepest layer that was measured: [chain, activation, width, seed]."""
    known = found.notnull().all([axis for axis in found.dims if axis not in ("activation", "layers")])
    deepest = found.layers.where(known).max("layers").astype(int)
    return found.sel(layers=deepest, drop=True)


def exponent(r: xr.Dataset) -> xr.DataArray:
    """Slope of log rank over log width with batch norm, linear: 0.5 if rank grows as the square root of the width."""
    rank = last_layer(r.chain_rank).sel(activation="linear", drop=True).sel(chain=BATCH, drop=True)
    return (
        np.log(rank)
        .assign_coords(width=np.log(rank.width))
        .polyfit("width", 1)
        .polyfit_coefficients.sel(degree=1, drop=True)
    )


def accuracy(r: xr.Dataset) -> xr.DataArray:
    """Test accuracy after the last step: [arm, depth, seed]."""
    return final(r.test_accuracy)


def of_the_deepest(r: xr.Dataset) -> xr.DataArray:
    """The same of the deepest networks."""
    return accuracy(r).isel(depth=-1, drop=True)


def forecast(r: xr.Dataset, sign: xr.DataArray) -> xr.DataArray:
    """Spearman's correlation of what is seen at the start with the test accuracy, over arms and depths: [seed]."""
    cells = [one.stack(cell=["arm", "depth"]).transpose("seed", "cell") for one in (sign, accuracy(r))]
    return xr.corr(*(one.copy(data=rankdata(one.values, axis=1)) for one in cells), dim="cell")


def collapsed(r: xr.Dataset) -> xr.DataArray:
    """The best test accuracy among networks whose bound of the rank is below COLLAPSED at the start: [seed]."""
    return accuracy(r).where(r.bound < COLLAPSED).max(["arm", "depth"])


def uneven(r: xr.Dataset) -> xr.DataArray:
    """How far the gradient of the first layer is from the last one's, whichever is larger, as a logarithm."""
    return abs(np.log(r.gradients))


def draw_depth(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """Rank by depth in linear networks of the widest kind that was measured."""
    shown = r.chain_rank.sel(activation="linear", drop=True).isel(width=-1)
    lines(ax, shown, x="layers", hue="chain", palette=SHADES, style="chain", markers=True, dashes=False)
    width = settings.widths[-1]
    ax.axhline(width**0.5, color="grey", linestyle=":", label="square root of the width")
    ax.set(xscale="log", yscale="log", xlabel="layer", ylabel="rank", title=f"Linear, width {width}, at the start")
    ax.set_xticks(settings.chain_depths, [f"{depth:,}" for depth in settings.chain_depths])
    ax.set_yticks(POWERS[:8], map(str, POWERS[:8]))
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize=8)


def draw_width(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """Rank by width after the deepest layer, beside the published figures."""
    shown = last_layer(r.chain_rank).sel(activation="linear", drop=True)
    lines(ax, shown, x="width", hue="chain", palette=SHADES, style="chain", markers=True, dashes=False)
    ax.plot(PUBLISHED.width, PUBLISHED, "k:", marker="x", label="published, batch norm")
    ax.plot(settings.widths, np.sqrt(settings.widths), color="grey", linestyle=":", label="square root of the width")
    ax.set(xscale="log", yscale="log", xlabel="units per layer", ylabel="rank")
    ax.set(title=f"Linear, layer {settings.chain_depths[-1]:,}, at the start")
    ax.set_xticks(POWERS[3:], map(str, POWERS[3:]))
    ax.set_yticks(POWERS[:6], map(str, POWERS[:6]))
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize=8)


def draw_training(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """Test accuracy by the rank at the start, a dot for each arm and depth."""
    rank, reached = r["rank"].mean("seed"), accuracy(r).mean("seed")
    for arm, marker in zip(ARMS, "oPsX^", strict=True):
        sizes = [25 + 4 * depth for depth in DEPTHS]
        ax.scatter(
            rank.sel(arm=arm), reached.sel(arm=arm), s=sizes, marker=marker, color=SHADES[arm], alpha=0.8, label=arm
        )
    ax.set(xscale="log", xlabel="rank of the last hidden layer at the start", ylabel="test accuracy after training")
    ax.set(title=f"Trained; larger is deeper ({DEPTHS[0]} to {DEPTHS[-1]} layers)", ylim=(0, 1.02))
    ax.set_xticks(POWERS[:7], map(str, POWERS[:7]))
    ax.minorticks_off()
    for handle in ax.legend(frameon=False, fontsize=8).legend_handles:
        handle.set_sizes([40])


POWERS = [2**power for power in range(9)]  # the axes' ticks
SHADES = COLORS | {HE: "#e69f00", BROKEN: "#56b4e9", STARTED: "#009e73"}
at_start = partial(Claim, unit="of rank", measures="rank after the deepest layer, by activation and width")

EXPERIMENT = Experiment(
    title="Batch norm keeps the rank of a deep network's layers at the start; whether that decides who trains.",
    question="Does batch norm make deep networks trainable by keeping their layers from collapsing to one direction?",
    source="Daneshmand et al. 2020, theorem 2 and figures 1 to 3 and 6",
    citation="Hadi Daneshmand, Jonas Kohler, Francis Bach, Thomas Hofmann and Aurelien Lucchi, Batch Normalization"
    " Provably Avoids Rank Collapse for Randomly Initialised Deep Networks, NeurIPS 2020, arXiv:2003.01652.",
    theme=WHAT_IT_IS,
    answer={
        "cpu": "Batch norm keeps layers from collapsing at the start: after 5,000 random linear layers of 128 units 21"
        " directions were left with batch norm, and one without it or with weights that are not centred. But that is"
        " not all it takes to train: 32 layers that started with full rank and went on without normalizing named 10%"
        " of the digits, with batch norm 57%.",
    },
    surprise="Batch norm is said to make deep networks trainable by keeping the rank of their layers at the start. A"
    " network of 32 layers that started with the full rank of the normalized one and went on without normalizing named"
    " 10% of the digits, which is chance; with batch norm it named 57%.",
    reader_questions={
        "Does the rank of the last layer at the start tell whether a network will train?": "In part: over our arms and"
        " depths it went along with the final accuracy (rank correlation 0.63), less so than how even the gradients of"
        " the layers are (0.72). No network that started with rank 1 named more than 21% of the digits, but full rank"
        " did not make one of 32 layers train without batch norm.",
    },
    differs="Read were the abstract, the informal theorem 2 and the source's code. Theirs: chains of 50,000 layers and"
    " a million (here 5,000); Fashion-MNIST, width 128, 75 epochs, SGD without and Adam with batch norm (here 5,000"
    " digits, width 64, 400 steps, SGD for all). In place of their pre-training that raises the rank: a start from"
    " the normalized network.",
    settings={
        "smoke": Sizes(
            seeds=2, data="mnist5k", steps=4, interval=4,
            widths=(4, 8), chain_depths=(1, 10, 100), relu_depth=10, width=16,
        ),
        "cpu": Sizes(
            seeds=5, first_seed=20, data="mnist5k", steps=400, interval=400,
            widths=(8, 16, 32, 64, 128), chain_depths=(1, 10, 100, 1000, 5000), relu_depth=1000, width=64,
        ),
        "full": Sizes(
            seeds=5, first_seed=20, data="fashion_mnist", steps=70_000, interval=700,
            widths=(8, 16, 32, 64, 128, 256), chain_depths=(1, 10, 100, 1000, 10_000, 100_000, 1_000_000),
            relu_depth=50_000, width=128,
        ),
    },
    grid=Grid(
        lambda settings, arm: task(settings.data, settings.width, arm), 64, {"arm": ARMS}, {"depth": DEPTHS},
        Search("rate", RATES, seeds=1, extensions=0, least_steps=100),
    ),
    stages=stages,
    claims=[
        at_start(
            "Without batch norm the rank of a deep network collapses to 1.",
            lambda r: last_layer(r.chain_rank).sel(chain=PLAIN), below=1.5,
            standalone="Without batch norm the rank of a deep random network's layers collapses to 1.",
        ),
        at_start(
            "With batch norm the rank stays above the square root of the width.",
            lambda r: last_layer(r.chain_rank).sel(chain=BATCH) / np.sqrt(r.width),
            measures="rank after the deepest layer over the square root of the width, by activation and width",
            unit="times the square root", ratio=True, above=1.0, precision=0.1,
            standalone="With batch norm the rank of a deep random network's layers stays above the square root of the"
            " width.",
        ),
        Claim(
            "It grows as the square root of the width, not as the width.", lambda r: exponent(r) - 0.5,
            measures="slope of log rank over log width (linear, deepest layer) minus 0.5",
            unit="of the exponent", equal=0.15,
            standalone="With batch norm the rank of a deep random network's layers grows as the square root of the"
            " width, not as the width.",
        ),
        at_start(
            "With weights that are not centred batch norm does not keep the rank.",
            Compared(lambda r: last_layer(r.chain_rank), BROKEN, BATCH, "chain", ratio=True),
            unit="times the rank", below=0.5,
            standalone="With weights that are not centred batch norm does not keep the rank of a deep random network's"
            " layers.",
        ),
        Claim(
            "With batch norm a deep network trains that does not train without.", Compared(of_the_deepest),
            measures=f"test accuracy of {DEPTHS[-1]} layers, PyTorch's weights", unit="of test accuracy", above=0.3,
        ),
        Claim(
            "Batch norm that does not keep the rank trains worse.", Compared(of_the_deepest, BATCH, BROKEN),
            measures=f"test accuracy of {DEPTHS[-1]} layers", unit="of test accuracy", above=0.1,
            standalone="Batch norm that does not keep the rank of a deep network's layers trains it worse.",
        ),
        Claim(
            "The rank at the start forecasts which networks train.", lambda r: forecast(r, r["rank"]),
            measures="Spearman's correlation of the last hidden layer's rank at the start with the final test accuracy,"
            " over all arms and depths", unit="of correlation", above=0.5,
            standalone="The rank of the last hidden layer at the start forecasts which networks train.",
        ),
        Claim(
            "No network trains whose rank has collapsed at the start.", collapsed,
            measures=f"best test accuracy among networks whose bound of the rank is below {COLLAPSED:g} at the start",
            unit="of test accuracy", below=0.5,
            standalone="No network trains in which the rank of the last hidden layer has collapsed at the start.",
        ),
        Claim(
            "A network that starts with the rank of the normalized one trains without normalization.",
            Compared(of_the_deepest, STARTED, PLAIN),
            measures=f"test accuracy of {DEPTHS[-1]} layers", unit="of test accuracy", above=0.3,
            source="a control in place of the source's pre-training (figure 6)",
            standalone="A deep network that starts with the rank of the normalized one trains without normalization.",
        ),
        Claim(
            "The rank forecasts better than the evenness of the gradients.",
            lambda r: forecast(r, r["rank"]) - forecast(r, -uneven(r)),
            measures="Spearman's correlation of the rank with the final test accuracy minus that of how alike the"
            " first and the last layer's gradients are", unit="of correlation", above=0.0, precision=0.1,
            source="a control",
            standalone="The rank of the last hidden layer at the start forecasts which networks train better than the"
            " evenness of the gradients does.",
        ),
    ],
    tables=[
        table_of(
            "Rank by depth at the widest", lambda r: r.chain_rank.isel(width=-1),
            rows=["activation", "chain"], columns="layers", form=".1f",
            note="Number of singular values above 1e-5 of the largest.",
        ),
        table_of(
            "Rank after the deepest layer, by width, with batch norm",
            lambda r: last_layer(r.chain_rank).sel(chain=BATCH, drop=True), rows=["activation"], columns="width",
            form=".1f", published=PUBLISHED.expand_dims(activation=["linear"]),
            note="Published: read off a picture.",
        ),
        table_of(
            "Lower bound of the rank by depth at the widest", lambda r: r.chain_bound.isel(width=-1),
            rows=["activation", "chain"], columns="layers", form=".2f", note="(sum s^2)^2 / sum s^4.",
        ),
        table_of(
            "Rank of the last hidden layer at the start", lambda r: r["rank"], rows=["arm"], columns="depth", form=".1f"
        ),
        table_of("Its lower bound", lambda r: r.bound, rows=["arm"], columns="depth", form=".2f"),
        table_of(
            "Relative gradient of the first layer over that of the last one at the start", lambda r: r.gradients,
            rows=["arm"], columns="depth", form=".2g",
        ),
        table_of("Final test accuracy", accuracy, rows=["arm"], columns="depth"),
    ],
    pictures=[
        panels(
            draw_depth, draw_width, draw_training, file="rank.png",
            title="Does batch norm keep a deep network from collapsing to one direction, and is that why it trains?",
            caption="Line: mean; band: range of the networks. Rank counts the directions that the layer's outputs of"
            " a batch still fill. Left and middle: random networks before training. Right: each dot is an arm at one"
            " depth, mean over seeds.",
        )
    ],
)  # fmt: skip
