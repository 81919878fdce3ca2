"""Do gradients reach the lower layers of a deep network, do these learn last, and does batch norm change it?

Protocol: MLPs of 1, 3, 8 and 20 hidden layers of 50 units on digits, with ReLU, tanh or sigmoid, Glorot-uniform
weights, batches of 60, plain SGD, 300 steps (five epochs). Three arms start from the same weights and see the same
batches: plain; batch norm before the activation (decay 0.9, epsilon 1e-5); and, the control, normalized at the start
only: the same network with the statistics of 512 images at its start, which then stay as constants (scale and bias are
learned). It starts with the signals of batch norm, and its gradients lack only what flows through the statistics. Each
network has the rate that was best on validation, by the same search: 0.003 to 3, a factor of about 3 apart, one seed
each, and one more beyond an end where the best of an arm lies, twice at most. With batch norm a network has 39,860
parameters at a depth of 1 and 90,210 at 20.

Four things are measured. The norm of the loss's gradient by the output of each of 20 layers (at the start, at the
end). Test accuracy by depth. In networks of 8 layers, how alike the outputs of each layer during training are to its
final ones (linear CKA on 500 test images), and what it costs to freeze the lower or the upper half of the layers after
a quarter of the steps. And, with ReLU and 8 layers, the share of units that are silent on all test images, by rate.
A network of below 50% accuracy has not learned: claims about the order of learning leave such cells out.

`python -m experiments run gradient_flow` takes about five minutes on two cores. By a pilot of three other seeds the
claims need 3 to 10 seeds; 44 for that which compares the costs of freezing, and 305 for that which compares the start
alone with batch norm. Ten are taken. A first run of ten other seeds had looked for rates down to 0.009 only, and the
deepest networks of the control had their best there, at the edge: the search now goes further down.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import jax
import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from experiments.framework.claim import Claim, Compared
from experiments.framework.experiment import WHY_FASTER, Experiment, Grid, Search, Settings, Stage
from experiments.framework.pictures import COLORS, lines, panels
from experiments.framework.results import difference
from experiments.framework.search import choose, runs_of, with_chosen
from experiments.framework.tables import table_of
from experiments.topics import GRADIENTS, ORDER
from experiments.training import data, loop, switched_towers
from experiments.training.switched_towers import ACTIVATIONS, NEVER, gradients, similarity, task
from experiments.training.towers import BATCH, NORMS, PLAIN, STARTED

BATCH_SIZE = 60
SEEN = 500  # test images on which outputs are compared
TRAINS = 0.5  # test accuracy that a network which has learned exceeds
ARMS = (PLAIN, BATCH, STARTED)
CELLS = {
    "arm": {arm: {"kind": NORMS[arm]} for arm in ARMS},
    "activation": {name: {"number": number} for number, name in enumerate(ACTIVATIONS)},
}
SATURATING = ("tanh", "sigmoid")
HALVES = ("lower", "upper")
SEARCH = Search("rate", (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0), seeds=1, extensions=2, together=False, least_steps=10)
RATES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # at which ReLUs are counted
SHADES = COLORS | {STARTED: "#009e73"}
IOFFE = "Ioffe and Szegedy 2015, section 1"
RAGHU = "Raghu et al. 2017"
NIELSEN = "Nielsen, Neural Networks and Deep Learning, chapter 5"
CS231N = "the notes of Stanford's CS231n, Neural Networks part 1"
PUBLISHED = 0.01 ** (1 / 3)  # the first of four hidden layers of sigmoids "roughly 100 times slower" than the last


@dataclass(frozen=True, kw_only=True)
class Sizes(Settings):
    """And the depths, from shallow to deep; the one at which layers and units are looked at; the width."""

    depths: tuple[int, ...]
    looked_at: int
    width: int = 50


def cells(seed: int, **numbers: float) -> list[dict]:
    """The runs of one seed, one for each arm and activation."""
    return [run | {"lower": NEVER, "upper": NEVER} | numbers for run in runs_of(CELLS, 1, seed)]


def trained(settings: Sizes, depth: int, runs: Sequence[dict]) -> tuple[dict, list[dict]]:
    """What `switched_towers.trained` says of networks of one depth."""
    return switched_towers.trained(
        settings.data, depth, settings.width, loop.Schedule(settings.steps, settings.interval, BATCH_SIZE), runs
    )


@cache
def rates(settings: Sizes) -> xr.DataArray:
    """The rate that was best on validation: [depth, arm, activation]."""

    def train(stage: str, program: Mapping, runs: list[dict]) -> list[dict]:
        runs = [{**run, "lower": NEVER, "upper": NEVER} for run in runs]
        found, _ = trained(settings, program["depth"], runs)
        return [{"stage": stage, "runs": runs}, {"stage": stage, "first": 0, "step": settings.steps, **found}]

    return choose(Grid(task, BATCH_SIZE, {"depth": settings.depths}, CELLS, SEARCH), settings.steps, train)


def measured(settings: Sizes, seed: int) -> xr.Dataset:
    """Everything about the networks of one seed."""
    chosen, shape = rates(settings), [len(names) for names in CELLS.values()]
    accuracy, frozen = [], []
    for depth in settings.depths:
        found, kept = trained(settings, depth, with_chosen(cells(seed), chosen, {"depth": depth}))
        accuracy.append(found["test_accuracy"].reshape(shape))
        if depth == settings.looked_at:
            alike = np.stack([similar(settings, variables, kept[-1]) for variables in kept])
        if depth == settings.depths[-1]:
            sizes = np.array([flow(settings, variables) for variables in (kept[0], kept[-1])])
    for half in HALVES:
        runs = cells(seed, **{half: settings.steps // 4})
        runs = with_chosen(runs, chosen, {"depth": settings.looked_at})
        frozen.append(trained(settings, settings.looked_at, runs)[0]["test_accuracy"].reshape(shape))
    over = ("arm", "activation")
    arrays = {
        "rate_chosen": (("depth", *over), chosen.sel(arm=list(ARMS), activation=list(ACTIVATIONS)).values),
        "accuracy": (("depth", *over), np.stack(accuracy)),
        "similarity": (("step", *over, "layer"), alike.reshape(len(alike), *shape, -1)),
        "gradient": (("when", *over, "level"), sizes.reshape(2, *shape, -1)),
        "frozen": (("half", *over), np.stack(frozen)),
        "dead": (("rate", "arm"), dead(settings, seed)),
    }
    names = {"depth": list(settings.depths), "arm": list(ARMS), "activation": list(ACTIVATIONS)}
    names |= {"step": range(0, settings.steps + 1, settings.interval), "when": ["start", "end"], "half": list(HALVES)}
    names |= {"layer": range(1, settings.looked_at + 1), "level": range(1, settings.depths[-1] + 1)}
    names |= {"rate": RATES}
    return xr.Dataset(arrays, {name: list(values) for name, values in names.items()}).assign_coords(seed=seed)


def similar(settings: Sizes, variables: dict, others: dict) -> np.ndarray:
    """CKA of every layer of every network with that of the other: [runs, layer]."""
    images = data.load(settings.data).test_images
    images = images[data.spread(SEEN, len(images))]
    return np.asarray(similarity(settings.looked_at, settings.width)(variables, others, images))


def flow(settings: Sizes, variables: dict) -> list[list[float]]:
    """Norm of the gradient by each layer's output in every one of the deepest networks: [runs, level]."""
    arrays = loop.on_device(data.load(settings.data))
    images, labels = loop.take(arrays, data.spread(2 * BATCH_SIZE, len(arrays["train_labels"])))
    batch, depth = {"x": images, "label": labels}, settings.depths[-1]
    several = [jax.tree.map(lambda leaf, i=i: leaf[i], variables) for i in range(len(cells(0)))]
    return [gradients(depth, settings.width, one, batch) for one in several]


def dead(settings: Sizes, seed: int) -> np.ndarray:
    """The share of ReLUs that are silent on every test image after training: [rate, arm]."""
    own = [run for run in cells(seed) if run["activation"] == "ReLU"]
    runs = [{**run, "rate": rate} for rate in RATES for run in own]
    parts = np.split(np.arange(len(runs)), len(runs) // len(cells(seed)))  # as many as there are cells: one program
    found = [trained(settings, settings.looked_at, [runs[i] for i in part])[0]["dead"] for part in parts]
    return np.concatenate(found).reshape(len(RATES), len(own))


def stages(settings: Sizes) -> Iterator[Stage]:
    """One for each seed."""
    for seed in settings.every_seed:
        yield Stage(f"seed {seed}", partial(measured, settings, seed))


def per_layer(r: xr.Dataset) -> xr.DataArray:
    """The factor of the gradient's norm per layer on the way down, from the last layer to the first, at the start."""
    of_layers = r.gradient.sel(when="start", drop=True)
    whole = of_layers.isel(level=0, drop=True) / of_layers.isel(level=-1, drop=True)
    return whole ** (1 / (of_layers.sizes["level"] - 1))


def deepest(r: xr.Dataset) -> xr.DataArray:
    """Test accuracy of the deepest networks."""
    return r.accuracy.isel(depth=-1, drop=True)


def gain(r: xr.Dataset) -> xr.DataArray:
    """Test accuracy that batch norm gains: [depth, activation, seed]."""
    return difference(r.accuracy, BATCH, PLAIN)


def looked_at(r: xr.Dataset) -> xr.DataArray:
    """Test accuracy of the networks whose layers are looked at."""
    return r.accuracy.sel(depth=r.sizes["layer"], drop=True)


def of_halves(values: xr.DataArray) -> xr.DataArray:
    """Mean over the lower and over the upper half of the layers; that in the middle belongs to none: [half, ...]."""
    half = values.sizes["layer"] // 2
    parts = [values.isel(layer=slice(None, half)).mean("layer"), values.isel(layer=slice(-half, None)).mean("layer")]
    return xr.concat(parts, "half").assign_coords(half=list(HALVES))


def if_learned(values: xr.DataArray, r: xr.Dataset) -> xr.DataArray:
    """Nan for networks that have not learned."""
    return values.where(looked_at(r) > TRAINS)


def ahead(r: xr.Dataset) -> xr.DataArray:
    """How much more alike its final self the lower half is than the upper half; mean over training."""
    halves = of_halves(r.similarity.isel(step=slice(1, -1)).mean("step"))
    return if_learned(difference(halves, *HALVES, "half"), r)


def left(r: xr.Dataset) -> xr.DataArray:
    """Of the way (1 - CKA) from a half's start to its final self, the share that is left; mean over training."""
    way = of_halves(1 - r.similarity)
    return way.isel(step=slice(1, -1)).mean("step") / way.isel(step=0, drop=True)


def behind(r: xr.Dataset) -> xr.DataArray:
    """How much more of its way the lower half has left than the upper half."""
    return if_learned(difference(left(r), *HALVES, "half"), r)


def at_rates(r: xr.Dataset) -> xr.DataArray:
    """Dead ReLUs: the largest share at any rate at which a network has not diverged, over that at the lowest rate."""
    return r.dead.max("rate") - r.dead.isel(rate=0, drop=True)


def draw_gradients(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """Gradient by layer over that of the last layer, at the start."""
    of_layers = r.gradient.sel(when="start", arm=[PLAIN, BATCH], drop=True)
    shown = (of_layers / of_layers.isel(level=-1)).rename("gradient")
    lines(ax, shown, x="level", hue="arm", style="activation", palette=SHADES)
    levels = r.level.values
    ax.plot(levels, PUBLISHED ** (levels[-1] - levels), color="gray", linewidth=1, label="published, plain sigmoid")
    ax.set(yscale="log", xlabel="layer (1 is next to the input)", ylabel="gradient / that of the last layer")
    ax.set(title=f"{levels[-1]} layers, before training", xticks=sorted({1, levels[-1] // 2, levels[-1]}))
    ax.legend(frameon=False, fontsize=8)


def draw_depths(activation: str, ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """Test accuracy by depth, with one activation."""
    shown = r.accuracy.sel(activation=activation, drop=True).rename("test accuracy")
    lines(ax, shown, x="depth", hue="arm", style="arm", palette=SHADES, markers=True)
    ax.set(xscale="log", xlabel="hidden layers", ylabel="", ylim=(0, 1.02))
    if activation == "ReLU":
        ax.set_ylabel(f"test accuracy after {settings.steps:,} steps")
    ax.set_xticks(settings.depths, map(str, settings.depths))
    ax.minorticks_off()
    ax.set_title(f"{activation}: trained, each at its best rate")
    ax.legend(frameon=False, fontsize=8, loc="lower left")


def draw_order(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """Likeness of the lower and the upper half to their final selves, by step."""
    shown = of_halves(if_learned(r.similarity, r)).mean("activation").rename("likeness").sel(arm=[PLAIN, BATCH])
    lines(ax, shown, x="step", hue="arm", style="half", palette=SHADES)
    ax.set(xlabel="training step", ylabel="likeness to the layer's final outputs (CKA)", ylim=(None, 1.02))
    ax.set_title(f"{settings.looked_at} layers: which half is there first?")
    ax.legend(frameon=False, fontsize=8)


def draw_dead(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """Dead ReLUs by rate."""
    lines(ax, r.dead.sel(arm=[PLAIN, BATCH]), x="rate", hue="arm", style="arm", palette=SHADES, markers=True)
    ax.axhline(0.4, color="gray", linestyle=":", label="published: as much as 40%")
    ax.set(xscale="log", xlabel="learning rate", ylabel="share of ReLUs silent on all test images", ylim=(0, None))
    ax.set_title(f"{settings.looked_at} layers: ReLUs that have died")
    ax.legend(frameon=False, fontsize=8)


per_layer_claim = partial(
    Claim,
    measures="factor of the gradient's norm per layer on the way down 20 layers, at the start",
    unit="times per layer",
    ratio=True,
    dispute=GRADIENTS,
)
trains = partial(
    Claim, measures="test accuracy of the deepest networks", unit="of test accuracy", above=TRAINS, source=IOFFE
)
in_order = partial(Claim, dispute=ORDER, precision=0.05)

EXPERIMENT = Experiment(
    title="Without batch norm gradients vanish on the way down, deep sigmoid networks do not train, ReLUs die.",
    question="Do gradients reach the lower layers of a deep network, and is that why batch norm helps?",
    source="Ioffe and Szegedy 2015, section 1; Raghu et al. 2017; Nielsen 2015, chapter 5",
    citation="S. Ioffe, C. Szegedy: Batch Normalization: Accelerating Deep Network Training by Reducing Internal"
    " Covariate Shift. ICML 2015. M. Raghu, J. Gilmer, J. Yosinski, J. Sohl-Dickstein: SVCCA: Singular Vector Canonical"
    " Correlation Analysis for Deep Learning Dynamics and Interpretability. NIPS 2017, arXiv:1706.05806. M. Nielsen:"
    " Neural Networks and Deep Learning. Determination Press 2015. S. Kornblith et al.: Similarity of Neural Network"
    " Representations Revisited. ICML 2019.",
    theme=WHY_FASTER,
    answer={
        "cpu": "Without batch norm the gradient of a deep sigmoid network shrinks more than fourfold per layer on the"
        " way down, and 20 layers learned nothing; with it gradients grow by 3% to 22% per layer, and 20 layers"
        " reached 0.81 to 0.87 with every activation. That is not the whole reason: networks normalized at the start"
        " only had gradients as good and ended 0.23 lower on average.",
    },
    surprise="Deep tanh networks are said not to train without batch norm, and lower layers to learn last. With 20"
    " layers tanh networks reached 0.83 of the test digits without batch norm (0.87 with it), and in plain networks of"
    " 8 layers that learned the lower half had less of the way to its final outputs left than the upper half.",
    reader_questions={
        "Does batch norm prevent vanishing and exploding gradients?":
        "It prevents vanishing ones: in our MLPs without it, from the last of 20 layers to the first the gradient"
        " falls to a trillionth with sigmoid, to about 1/700 with ReLU and to four tenths with tanh (Glorot's"
        " weights). With it the gradient grows, by 3% a layer with sigmoid, 10% with tanh and 22% with ReLU, where it"
        " is 42 times as large in the first layer as in the last.",
        "Do lower layers learn last?":
        "Not in our networks of 8 layers that learned: their lower half was closer to its final outputs than the"
        " upper half, with batch norm and without. It was not finished, though: freezing it after a quarter of the"
        " steps cost 0.01 to 0.19 of test accuracy, more than freezing the upper half.",
        "Do ReLUs die, and does batch norm keep them alive?":
        "In our plain networks of 8 layers two thirds of the ReLUs were silent on every test image after training at"
        " rate 1, with batch norm none. At rate 10, where plain networks diverge, 30% were with batch norm.",
        "Is batch norm worth while in a shallow network?":
        "With one hidden layer batch norm changed our MLPs' test accuracy by less than 0.02, up with ReLU and down with"
        " tanh, each at its best rate. With 20 layers it gained 0.03 with tanh, 0.66 with ReLU and 0.77 with sigmoid.",
    },
    differs="None of the sources compares these arms. Raghu et al. train convolutional and residual networks on"
    " CIFAR-10 and compare by SVCCA; here MLPs on digits, and linear CKA. Nielsen's network has four hidden layers of"
    " 30 sigmoids and Gaussian weights of variance 1 / inputs (as remembered).",
    settings={
        "smoke": Sizes(seeds=2, data="mnist5k", steps=4, interval=2, depths=(2,), looked_at=2, width=8),
        "cpu": Sizes(
            seeds=10, first_seed=10, data="mnist5k", steps=300, interval=30, depths=(1, 3, 8, 20), looked_at=8
        ),
        "full": Sizes(
            seeds=10, first_seed=10, data="mnist", steps=10_000, interval=500, depths=(1, 2, 3, 5, 8, 12, 20),
            looked_at=8, width=100,
        ),
    },
    stages=stages,
    claims=[
        per_layer_claim(
            "Without batch norm gradients shrink on the way down.", lambda r: per_layer(r).sel(arm=PLAIN), below=0.95,
            source=NIELSEN,
        ),
        per_layer_claim(
            "With batch norm gradients keep their size on the way down.", lambda r: per_layer(r).sel(arm=BATCH),
            equal=0.05, source="Ioffe and Szegedy 2015, section 3.3 (conjecture)",
        ),
        per_layer_claim(
            "With batch norm gradients do not vanish on the way down.", lambda r: per_layer(r).sel(arm=BATCH),
            above=0.95, source=IOFFE,
        ),
        trains(
            "A deep sigmoid network does not train without batch norm.",
            lambda r: deepest(r).sel(arm=PLAIN, activation="sigmoid"), above=None, below=TRAINS,
        ),
        trains(
            "A deep tanh network does not train without batch norm.",
            lambda r: deepest(r).sel(arm=PLAIN, activation="tanh"), above=None, below=TRAINS,
        ),
        trains(
            "With batch norm deep sigmoid and tanh networks train.",
            lambda r: deepest(r).sel(arm=BATCH, activation=list(SATURATING)),
        ),
        trains(
            "It is enough to normalize the start: deep sigmoid and tanh networks then train without batch norm.",
            lambda r: deepest(r).sel(arm=STARTED, activation=list(SATURATING)), source="ours, a control",
            standalone="It is enough to normalize a network at its start: deep sigmoid and tanh networks then train"
            " without batch norm.",
        ),
        Claim(
            "A deep network that is normalized at the start only does as well as one with batch norm.",
            Compared(deepest, STARTED, BATCH), measures="test accuracy of the deepest networks",
            unit="of test accuracy", above=-0.02, source="ours, a control",
        ),
        in_order(
            "Lower layers come close to what they end as before upper layers do.", ahead,
            measures="likeness (CKA) to the final outputs, mean over training, lower half minus upper half of 8 layers",
            unit="of CKA", above=0.0, source=RAGHU,
        ),
        in_order(
            "Without batch norm lower layers learn last.", lambda r: behind(r).sel(arm=PLAIN),
            measures="share of the way from the start to the final outputs (1 - CKA) that is left, mean over training,"
            " lower half minus upper half of 8 layers",
            unit="of the way", above=0.0, source=NIELSEN,
        ),
        in_order(
            "With batch norm lower layers are less behind.", Compared(behind),
            measures="share of the way that is left, lower minus upper half", unit="of the way", below=0.0,
            source="ours: what vanishing gradients would explain",
            standalone="With batch norm lower layers are less far behind upper ones in learning than without.",
        ),
        in_order(
            "The lower layers can be frozen after a quarter of the training at no loss.",
            lambda r: if_learned(r.frozen.sel(half="lower") - looked_at(r), r),
            measures="final test accuracy with the lower half of 8 layers frozen, minus that with none",
            unit="of test accuracy", above=-0.01, precision=0.01, source=RAGHU,
        ),
        in_order(
            "It costs less to freeze the lower layers than the upper ones.",
            lambda r: if_learned(difference(r.frozen, *HALVES, "half"), r),
            measures="final test accuracy with the lower half of 8 layers frozen after a quarter of the training, minus"
            " that with the upper half frozen", unit="of test accuracy", above=0.0, precision=0.01, source=RAGHU,
            standalone="After a quarter of the training it costs less to freeze the lower layers than the upper ones.",
        ),
        Claim(
            "Without batch norm ReLUs die at high rates.", lambda r: at_rates(r).sel(arm=PLAIN),
            measures="share of ReLUs silent on all test images: the largest at any rate at which the network has not"
            " diverged, minus that at the lowest rate",
            unit="of the ReLUs", above=0.1, source=CS231N,
        ),
        Claim(
            "With batch norm fewer ReLUs die at the same rate.", Compared(lambda r: r.dead, PLAIN, BATCH),
            measures="share of ReLUs silent on all test images, rates at which neither diverged", unit="of the ReLUs",
            above=0.0, precision=0.05, source="Arnekvist et al. 2020, introduction",
        ),
        Claim(
            "The deeper the network, the more batch norm gains.",
            lambda r: gain(r).isel(depth=-1, drop=True) - gain(r).isel(depth=0, drop=True),
            measures="test accuracy that batch norm gains in the deepest network minus that in the shallowest",
            unit="of test accuracy", above=0.05, source="a common belief",
        ),
        Claim(
            "A network of one hidden layer gains nothing: batch norm is for deep networks.",
            lambda r: gain(r).isel(depth=0, drop=True), unit="of test accuracy", equal=0.01, source="a common belief",
            measures="test accuracy that batch norm gains with one hidden layer",
            standalone="A network of one hidden layer gains nothing by batch norm, which is for deep networks.",
        ),
    ],
    tables=[
        table_of("Final test accuracy", lambda r: r.accuracy, rows=["activation", "arm"], columns="depth"),
        table_of(
            "Learning rate chosen on validation", lambda r: r.rate_chosen.isel(seed=[0]), rows=["activation", "arm"],
            columns="depth", form="g",
        ),
        table_of(
            "Factor of the gradient's norm per layer on the way down, at the start", per_layer, rows=["arm"],
            columns="activation",
            note="Published for a plain sigmoid network: the first of four hidden layers learns roughly 100 times"
            f" slower than the last, which is {PUBLISHED:.3f} per layer (Nielsen).",
        ),
        table_of(
            "Share of the way from a half's start to its final outputs that is left, mean over training",
            lambda r: if_learned(left(r), r), rows=["arm", "activation"], columns="half",
            note="Way: 1 - CKA. Networks that have not learned are left out.",
        ),
        table_of(
            "Final test accuracy with half of the layers frozen after a quarter of the training", lambda r: r.frozen,
            rows=["arm", "activation"], columns="half",
            note="Published for early layers frozen bit by bit (Composer's documentation): 0.5 to 1% less accuracy for"
            " ResNet-50 on ImageNet.",
        ),
        table_of(
            "Share of ReLUs that are silent on all test images, by learning rate", lambda r: r.dead, rows=["arm"],
            columns="rate", note="Left out: networks that have diverged.",
        ),
    ],
    pictures=[
        panels(
            draw_gradients, *(partial(draw_depths, activation) for activation in ACTIVATIONS),
            file="gradient_flow.png", size=(4.4, 4.2),
            title="Do gradients reach the lower layers, and is that why batch norm helps?",
            caption="Lines: means over seeds; bands: their range. Left: norm of the loss's gradient by each layer's"
            " output; published: Nielsen's figure for four hidden layers, continued. Others: the control 'normalized at"
            " the start only' begins with the statistics of batch norm and keeps them as constants.",
        ),
        panels(
            draw_order, draw_dead, file="layers.png", size=(5.6, 4.4),
            title="Which layers learn last, and do units die?",
            caption="Lines: means over seeds; bands: their range. Left: mean over the activations with which the"
            " network learned. Right: after training; networks that have diverged are left out.",
        ),
    ],
)  # fmt: skip
