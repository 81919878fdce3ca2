"""Does batch norm keep the layers of a deep network from collapsing to one direction, and does that decide who trains?

Part one, at the start: as many Gaussian inputs as units go through up to 5,000 layers `H -> F(norm(H W))` with W
uniform on [-a, a] (the scale does not matter), in float64. Rank is the number of singular values above 1e-5 of the
largest. Broken batch norm, the source's control, is the same with W uniform on [0, 2a].

Part two, training: MLPs of 2 to 32 hidden layers of 64 units on digits, ReLU, batch 64, 400 steps of SGD at a rate
chosen on validation for every arm and depth. Arms: PyTorch's default weights and biases; He's weights; batch norm;
broken batch norm; and batch norm whose statistics are those of 512 digits at the start and stay so: a network without
normalization that starts as the normalized one. The rank at the start is that of the last hidden layer on 128 digits,
counted in float32 as the source's code does.

`python -m experiments run rank` takes about four minutes on two cores; `full` is the source's size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from scipy.stats import rankdata

from experiments.framework.claim import Claim, Compared
from experiments.framework.experiment import WHAT_IT_IS, Experiment, Grid, Search, Settings, Stage
from experiments.framework.pictures import COLORS, lines, panels
from experiments.framework.results import final
from experiments.framework.tables import table_of
from experiments.training import loop
from experiments.training.towers import (
    ACTIVATIONS,
    ARMS,
    BATCH,
    BROKEN,
    CHAINS,
    DEPTHS,
    HE,
    PLAIN,
    STARTED,
    deeper,
    start_of,
    task,
)

SMALLEST = 1e-5  # of the largest singular value: what counts for the rank of part one
COLLAPSED = 1.2  # of the source's lower bound of the rank, whose least value is 1
RATES = (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0)  # so wide that only what does not train at all is best at an end
# Read off the picture in the source's repository (linear, gamma = infinity): 2 to the power of 1.5, 2.2, ...
PUBLISHED = xr.DataArray([2.8, 4.6, 7.1, 11.1, 16.9, 25.1], {"width": [8, 16, 32, 64, 128, 256]})


@dataclass(frozen=True, kw_only=True)
class Sizes(Settings):
    """And part one's widths and depths (ReLU stops at `relu_depth`), and the width and deepest network of part two."""

    widths: tuple[int, ...]
    chain_depths: tuple[int, ...]
    relu_depth: int
    width: int


def chains(settings: Sizes, width: int) -> xr.Dataset:
    """`rank` and `bound` [arm, activation, depth, seed] of the layers of one width; bound is (sum s^2)^2 / sum s^4."""
    shape = len(CHAINS), len(ACTIVATIONS), len(settings.chain_depths), settings.seeds
    ranks, bounds = np.full((2, *shape), np.nan)
    with jax.enable_x64(True):
        keys = jax.vmap(jax.random.key)(jnp.asarray(settings.every_seed))
        start = jax.vmap(lambda key: jax.random.normal(key, (width, width)))(keys)
        for arm, activation in np.ndindex(shape[:2]):
            h, done = start, 0
            for place, depth in enumerate(settings.chain_depths):
                if list(ACTIVATIONS)[activation] == "ReLU" and depth > settings.relu_depth:
                    continue
                h, done = deeper(arm, activation, keys, h, done, depth), depth
                singular = np.linalg.svd(np.asarray(h), compute_uv=False)
                singular /= np.where(singular[:, :1] > 0, singular[:, :1], 1)  # where all units died the rank is 0
                ranks[arm, activation, place] = np.sum(singular > SMALLEST, axis=1)
                fourth = np.maximum(np.sum(singular**4, axis=1), np.finfo(float).tiny)
                bounds[arm, activation, place] = np.sum(singular**2, axis=1) ** 2 / fourth
    axes = ("chain", "activation", "layers", "seed")
    names = {"chain": list(CHAINS), "activation": list(ACTIVATIONS), "layers": list(settings.chain_depths)}
    found = xr.Dataset({"chain_rank": (axes, ranks), "chain_bound": (axes, bounds)}, names)
    return found.assign_coords(seed=settings.every_seed, width=width)


def at_the_start(settings: Sizes) -> xr.Dataset:
    """What `start_of` says of every network: `rank`, `bound` and `gradients` [arm, seed, depth]."""
    names = {"arm": list(ARMS), "seed": settings.every_seed, "depth": list(map(float, DEPTHS))}
    values = np.reshape(
        [start_of(settings.data, settings.width, arm, settings.every_seed) for arm in ARMS],
        (*map(len, names.values()), 3),
    )
    starts = {name: (tuple(names), values[..., number]) for number, name in enumerate(("rank", "bound", "gradients"))}
    return xr.Dataset(starts, names)


def grid_task(settings: Sizes, arm: str) -> loop.Task:
    """The networks of one arm."""
    return task(settings.data, settings.width, arm)


def stages(settings: Sizes) -> Iterator[Stage]:
    """One for each width of part one, and the start of part two."""
    for width in settings.widths:
        yield Stage(f"width {width}", partial(chains, settings, width))
    yield Stage("start", partial(at_the_start, settings))


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


def in_powers_of_two(axis: Axis, last: int) -> None:
    """Ticks 1, 2, 4, ... up to `last` on a logarithmic axis."""
    ticks = 2 ** np.arange(int(np.log2(last)) + 1)
    axis.set_ticks(ticks, labels=map(str, ticks))
    axis.set_ticks([], minor=True)


def draw_depth(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """Rank by depth in linear networks of the widest kind that was measured."""
    shown = r.chain_rank.sel(activation="linear", drop=True).isel(width=-1)
    lines(ax, shown, x="layers", hue="chain", palette=SHADES, style="chain", markers=True, dashes=False)
    width = settings.widths[-1]
    ax.axhline(width**0.5, color="grey", linestyle=":", label="square root of the width")
    ax.set(xscale="log", yscale="log", xlabel="layer", ylabel="rank", title=f"Linear, width {width}, at the start")
    in_powers_of_two(ax.yaxis, width)
    ax.legend(frameon=False, fontsize=8)


def draw_width(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """Rank by width after the deepest layer, beside the published figures."""
    shown = last_layer(r.chain_rank).sel(activation="linear", drop=True)
    lines(ax, shown, x="width", hue="chain", palette=SHADES, style="chain", markers=True, dashes=False)
    ax.plot(PUBLISHED.width, PUBLISHED, "k:", marker="x", label="published, batch norm")
    ax.plot(settings.widths, np.sqrt(settings.widths), color="grey", linestyle=":", label="square root of the width")
    ax.set(xscale="log", yscale="log", xlabel="units per layer", ylabel="rank")
    ax.set(title=f"Linear, layer {settings.chain_depths[-1]:,}, at the start")
    in_powers_of_two(ax.xaxis, 256)
    in_powers_of_two(ax.yaxis, 32)
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
    in_powers_of_two(ax.xaxis, settings.width)
    ax.legend(frameon=False, fontsize=8)


SHADES = COLORS | {HE: "#e69f00", BROKEN: "#56b4e9", STARTED: "#009e73"}
at_start = partial(Claim, unit="of rank", measures="rank after the deepest layer, by activation and width")

EXPERIMENT = Experiment(
    title="Batch norm keeps the rank of a deep network's layers at the start; whether that decides who trains.",
    question="Does batch norm make deep networks trainable by keeping their layers from collapsing to one direction?",
    source="Daneshmand et al. 2020, theorem 2 and figures 1 to 3 and 6",
    citation="Hadi Daneshmand, Jonas Kohler, Francis Bach, Thomas Hofmann and Aurelien Lucchi, Batch Normalization"
    " Provably Avoids Rank Collapse for Randomly Initialised Deep Networks, NeurIPS 2020, arXiv:2003.01652.",
    theme=WHAT_IT_IS,
    answer="At the start it does: 5,000 linear layers leave 1 direction of 128 without batch norm and 21 with it, and"
    " breaking the norm breaks that. But the rank does not decide who trains: networks that had all but collapsed at"
    " the start learned up to 89% of the digits, and one that started with the full rank of the normalized one, without"
    " normalizing afterwards, did not learn at 32 layers.",
    reader_questions={
        "Does the rank of the last layer at the start tell whether a network will train?": "It goes along with it"
        " (correlation 0.69 over arms and depths), no better than how even the gradients of the layers are. It does not"
        " cause it: at 32 layers the full rank without normalization in training ended at 15% of the digits right, and"
        " batch norm at 52%.",
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
            seeds=5, first_seed=10, data="mnist5k", steps=400, interval=400,
            widths=(8, 16, 32, 64, 128), chain_depths=(1, 10, 100, 1000, 5000), relu_depth=1000, width=64,
        ),
        "full": Sizes(
            seeds=5, first_seed=10, data="fashion_mnist", steps=70_000, interval=700,
            widths=(8, 16, 32, 64, 128, 256), chain_depths=(1, 10, 100, 1000, 10_000, 100_000, 1_000_000),
            relu_depth=50_000, width=128,
        ),
    },
    grid=Grid(
        grid_task, 64, {"arm": ARMS}, {"depth": DEPTHS}, Search("rate", RATES, seeds=2, extensions=0)
    ),
    stages=stages,
    claims=[
        at_start(
            "Without batch norm the rank of a deep network collapses to 1.",
            lambda r: last_layer(r.chain_rank).sel(chain=PLAIN), below=1.5,
        ),
        at_start(
            "With batch norm the rank stays above the square root of the width.",
            lambda r: last_layer(r.chain_rank).sel(chain=BATCH) / np.sqrt(r.width),
            measures="rank after the deepest layer over the square root of the width, by activation and width",
            unit="times the square root", ratio=True, above=1.0, precision=0.1,
        ),
        Claim(
            "It grows as the square root of the width, not as the width.", lambda r: exponent(r) - 0.5,
            measures="slope of log rank over log width (linear, deepest layer) minus 0.5",
            unit="of the exponent", equal=0.15,
        ),
        at_start(
            "With weights that are not centred batch norm does not keep the rank.",
            Compared(lambda r: last_layer(r.chain_rank), BROKEN, BATCH, "chain", ratio=True),
            unit="times the rank", below=0.5,
        ),
        Claim(
            "With batch norm a deep network trains that does not train without.", Compared(of_the_deepest),
            measures=f"test accuracy of {DEPTHS[-1]} layers, PyTorch's weights", unit="of test accuracy", above=0.3,
        ),
        Claim(
            "Batch norm that does not keep the rank trains worse.", Compared(of_the_deepest, BATCH, BROKEN),
            measures=f"test accuracy of {DEPTHS[-1]} layers", unit="of test accuracy", above=0.1,
        ),
        Claim(
            "The rank at the start forecasts which networks train.", lambda r: forecast(r, r["rank"]),
            measures="Spearman's correlation of the last hidden layer's rank at the start with the final test accuracy,"
            " over all arms and depths", unit="of correlation", above=0.5,
        ),
        Claim(
            "No network trains whose rank has collapsed at the start.", collapsed,
            measures=f"best test accuracy among networks whose bound of the rank is below {COLLAPSED:g} at the start",
            unit="of test accuracy", below=0.5,
        ),
        Claim(
            "A network that starts with the rank of the normalized one trains without normalization.",
            Compared(of_the_deepest, STARTED, PLAIN),
            measures=f"test accuracy of {DEPTHS[-1]} layers", unit="of test accuracy", above=0.3,
            source="a control in place of the source's pre-training (figure 6)",
        ),
        Claim(
            "The rank forecasts better than the evenness of the gradients.",
            lambda r: forecast(r, r["rank"]) - forecast(r, -uneven(r)),
            measures="Spearman's correlation of the rank with the final test accuracy minus that of how alike the"
            " first and the last layer's gradients are", unit="of correlation", above=0.0, precision=0.1,
            source="a control",
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
