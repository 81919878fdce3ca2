"""Is the noise of batch statistics what makes batch norm generalize, and is dropout still needed beside it?

Protocol: MLP on digits of 14 x 14 pixels: two hidden layers of 128 units, ReLU after the norm, Glorot-uniform weights,
SGD with momentum 0.9, 390 steps of 256 examples (30 epochs of 3,500 digits). All arms of a seed start from the same
weights and see the same batches, so that the noise of SGD is the same; each has the rate that was best on validation.
They are one network with switches, which trains all:

- no norm; batch norm by statistics of groups of 4, 16 and 64 examples (ghost batches) and of all 256: each without
  dropout, and with dropout of 0.25 and 0.5 after both hidden layers;
- noise put back: statistics of all 256, plus Gaussian noise as great as statistics of 16 examples have. The control: if
  noise is what helps, this helps as well;
- decay of the scale: statistics of all 256, plus an L2 penalty on the scales of the norms, at three strengths. By Luo
  et al. 2018 batch norm is population normalization, which has no noise, and such a decay.

Where one of several is "chosen" (strength of dropout, of decay), it is the one with the best validation accuracy, mean
over all *other* seeds. The generalization gap is test loss minus training loss, both in evaluation mode.

The rate changes the gap and the accuracy too. So the gap, and noise put back, are judged at one rate for all: the arms
with batch norm and without dropout train once more at 0.3, which lies between the rates that suited them.

Dropout shifts the variance between training and test (Li et al. 2018). The control takes that away: the same trained
networks with the exact statistics of the training digits, measured without dropout ("recalibrated").

A first run, with seeds 0 to 8, compared the gap of each arm at its own rate, and found that of 16 examples to be 0.65
times that of all 256. But these had 0.1 and 0.9 for their rates, and at equal rates its search (2 seeds) had 0.85 to
0.95. So the gap was measured again, with seeds from 100 on: whether noise narrows it at all (below 1), and whether by a
tenth (below 0.9, the threshold of the first run). Noise put back had 0.1 against 0.9 as well, and is judged at one rate
now. The first run also found statistics of 16 examples 0.3% less accurate than those of 256, which this one does not.

`python -m experiments run noise` takes about five minutes on two cores. 9 seeds, fixed before any result was seen.
"""

from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from experiments.framework.claim import Claim, Compared
from experiments.framework.experiment import WHEN_IT_HELPS, Experiment, Grid, Search, Settings, Stage, Trained
from experiments.framework.pictures import COLORS, dots, lines, panels
from experiments.framework.results import final, side_by_side
from experiments.framework.search import runs_of
from experiments.framework.tables import table_of
from experiments.topics import DROPOUT, SMALL_BATCHES
from experiments.training import data, loop, noisy_mlp
from experiments.training.noisy_statistics import WHOLE, kind

PLAIN, FOUR, SIXTEEN, ALL = "no norm", "groups of 4", "groups of 16", "all 256"
CROSSED = {
    PLAIN: {"normalize": False},
    FOUR: {"group": 4},
    SIXTEEN: {"group": 16},
    "groups of 64": {"group": 64},
    ALL: {"group": WHOLE},
}
BOTH = [SIXTEEN, ALL]
SIZES = {FOUR: 4, SIXTEEN: 16, "groups of 64": 64, ALL: 256}
BATCH_SIZE = 256
DROPOUTS = (0.0, 0.25, 0.5)
PUT_BACK, DECAYED = "all 256, noise put back", "all 256, decay of scale"
STRENGTHS = (1e-4, 1e-3, 1e-2)


def crossing(arm: str, dropout: float) -> str:
    """The name of a network."""
    return f"{arm}, dropout {dropout:g}"


DECAYS = {f"{DECAYED} {strength:g}": {**kind(), "decay": strength} for strength in STRENGTHS}
NETWORKS = {
    **{crossing(a, p): {**kind(**how, dropout=p), "decay": 0.0} for a, how in CROSSED.items() for p in DROPOUTS},
    PUT_BACK: {**kind(16, drawn=True), "decay": 0.0},
    **DECAYS,
}
RATE = 0.3  # at which arms are compared too: between 0.1 and 0.9, which suited them in the first run
AT_ONE_RATE = {**{arm: crossing(arm, 0) for arm in SIZES}, PUT_BACK: PUT_BACK}
SHADES = {
    PLAIN: COLORS["plain"], FOUR: "#6baed6", SIXTEEN: COLORS["batch norm"], "groups of 64": "#4a90c4",
    ALL: "#08306b", PUT_BACK: "#e69f00", DECAYED: "#4dac5e",
}  # fmt: skip
IOFFE, LUO = "Ioffe and Szegedy 2015, section 3.4", "Luo, Wang, Shao and Peng 2018"
LI = "Li, Chen, Hu and Yang 2018"


@dataclass(frozen=True, kw_only=True)
class Sizes(Settings):
    """And the width of the network."""

    width: int = 128


def task(settings: Sizes) -> loop.Task:
    """`noisy_mlp.task` of the settings' width."""
    return noisy_mlp.task(settings.width)


def by_exact_statistics(trained: Trained) -> dict:
    """Accuracy with exact statistics of the training digits, [runs]; nan where a network has no statistics."""
    accuracies = np.array(noisy_mlp.recalibrated(trained.settings.width, trained.variables["params"], trained.arrays))
    accuracies[[run["normalize"] == 0 for run in trained.runs]] = np.nan
    return {"recalibrated": ((), accuracies)}


def at_one_rate(settings: Sizes) -> xr.Dataset:
    """Accuracy and generalization gap of AT_ONE_RATE's networks at RATE, the seeds of the result: [arm, seed]."""
    arms = {arm: NETWORKS[network] for arm, network in AT_ONE_RATE.items()}
    runs = runs_of({"arm": arms, "rate": (RATE,)}, settings.seeds, settings.first_seed)
    schedule = loop.Schedule(settings.steps, settings.steps, BATCH_SIZE)
    programs = loop.compile_grid(task(settings), schedule, loop.runs_per_seed(runs))
    numbers, arrays = loop.stacked(runs, len(runs)), loop.on_device(data.load(settings.data))
    states, _ = programs.advance(programs.start(numbers, arrays), numbers, arrays, 0)
    found = jax.device_get(programs.evaluate(states, numbers, arrays))
    figures = {
        "accuracy_at_one_rate": found["test_accuracy"],
        "gap_at_one_rate": found["test_loss"] - found["training_loss"],
    }
    coords = {"seed": settings.every_seed, "arm": list(arms)}
    shape = [len(values) for values in coords.values()]
    return xr.Dataset({name: (tuple(coords), v.reshape(shape).astype(float)) for name, v in figures.items()}, coords)


def crossed(array: xr.DataArray) -> xr.DataArray:
    """The networks that are crossed with dropout: [arm, dropout, ...]."""
    arms = [xr.concat([array.sel(network=crossing(arm, p), drop=True) for p in DROPOUTS], "dropout") for arm in CROSSED]
    return xr.concat(arms, "arm").assign_coords(arm=list(CROSSED), dropout=list(DROPOUTS))


def chosen(r: xr.Dataset, networks: list[str]) -> xr.DataArray:
    """Test accuracy of the one of some networks that has the best validation accuracy by all other seeds."""
    some = r.sel(network=networks)
    validation = final(some.validation_accuracy)
    best = (validation.sum("seed") - validation).argmax("network")
    return final(some.test_accuracy).isel(network=best).drop_vars("network")


def accuracy(r: xr.Dataset) -> xr.DataArray:
    """Final test accuracy by arm and dropout."""
    return crossed(final(r.test_accuracy))


def without(r: xr.Dataset) -> xr.DataArray:
    """Final test accuracy of every arm without dropout."""
    alone = accuracy(r).sel(dropout=0, drop=True)
    further = final(r.test_accuracy).sel(network=PUT_BACK, drop=True), chosen(r, list(DECAYS))
    return xr.concat(
        [alone, *(one.assign_coords(arm=n) for n, one in zip((PUT_BACK, DECAYED), further, strict=True))], "arm"
    )


def gap(r: xr.Dataset) -> xr.DataArray:
    """Test loss minus training loss at the end, by arm and dropout, each at its own rate."""
    return crossed(final(r.test_loss) - final(r.training_loss))


def accuracy_at_one_rate(r: xr.Dataset) -> xr.DataArray:
    """Final test accuracy at RATE without dropout: [arm, seed]."""
    return r.accuracy_at_one_rate.sel(arm=list(AT_ONE_RATE))


def gap_at_one_rate(r: xr.Dataset) -> xr.DataArray:
    """Test loss minus training loss at the end at RATE without dropout: [arm, seed]."""
    return r.gap_at_one_rate.sel(arm=list(AT_ONE_RATE))


def gained_by_dropout(r: xr.Dataset) -> xr.DataArray:
    """Final test accuracy with the chosen dropout minus without, by arm."""
    found = [chosen(r, [crossing(arm, p) for p in DROPOUTS[1:]]) for arm in CROSSED]
    return xr.concat(found, "arm").assign_coords(arm=list(CROSSED)) - accuracy(r).sel(dropout=0, drop=True)


def in_place_of_dropout(r: xr.Dataset) -> xr.DataArray:
    """Final test accuracy of batch norm by 16 without dropout minus that of no norm with the chosen dropout."""
    alone = accuracy(r).sel(dropout=0, drop=True)
    return alone.sel(arm=SIXTEEN, drop=True) - (alone + gained_by_dropout(r)).sel(arm=PLAIN, drop=True)


def at_half(r: xr.Dataset, arms: list[str]) -> xr.DataArray:
    """Final test accuracy with dropout 0.5 minus without."""
    values = accuracy(r).sel(arm=arms)
    return values.sel(dropout=0.5, drop=True) - values.sel(dropout=0, drop=True)


def mended(r: xr.Dataset, arms: list[str]) -> xr.DataArray:
    """Test accuracy with dropout 0.5: exact statistics minus running ones."""
    return (crossed(r.recalibrated) - accuracy(r)).sel(arm=arms, dropout=0.5).drop_vars("dropout")


def draw_by_size(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """Accuracy by the number of examples of which statistics are taken, a line for each dropout."""
    shown = accuracy(r).sel(arm=list(SIZES)).assign_coords(arm=list(SIZES.values())).rename("value")
    named = shown.assign_coords(dropout=[f"dropout {p:g}" if p else "no dropout" for p in DROPOUTS])
    shades = dict(zip(named.dropout.values, ("#08306b", "#4a90c4", "#e69f00"), strict=True))
    lines(ax, named, x="arm", hue="dropout", palette=shades, style="dropout", markers=True)
    ax.set(ylabel="final test accuracy", title="Accuracy, each at its best rate")
    label_sizes(ax)


def draw_gap(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """The generalization gap at RATE by the number of examples that make statistics, and with noise put back."""
    gaps = gap_at_one_rate(r)
    shown = gaps.sel(arm=list(SIZES)).assign_coords(arm=list(SIZES.values())).rename("gap")
    lines(ax, shown, x="arm", color=SHADES[ALL], marker="o", label="no dropout")
    drawn = gaps.sel(arm=PUT_BACK).values
    ax.vlines(SIZES[SIXTEEN], drawn.min(), drawn.max(), color=SHADES[PUT_BACK])
    ax.plot(SIZES[SIXTEEN], drawn.mean(), "D", color=SHADES[PUT_BACK], label=f"{PUT_BACK}, as of 16")
    ax.set(ylabel="test loss - training loss", title=f"The generalization gap, all at a rate of {RATE:g}")
    label_sizes(ax)


def label_sizes(ax: Axes) -> None:
    """The axis of both, and a legend."""
    ax.set(xscale="log", xlabel="examples of which statistics are taken")
    ax.set_xticks(list(SIZES.values()), map(str, SIZES.values()))
    ax.minorticks_off()
    ax.legend(frameon=False, loc="lower right")


def draw_arms(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """Final test accuracy of every arm without dropout."""
    dots(ax, without(r), "arm", SHADES)
    ax.set(xlabel="final test accuracy", title="Without dropout: is it the noise?")


def draw_dropout(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """Final test accuracy by dropout, with and without batch norm."""
    shown = accuracy(r).sel(arm=[PLAIN, *BOTH]).rename("accuracy")
    lines(ax, shown, x="dropout", hue="arm", palette=SHADES, style="arm", markers=True)
    ax.set(xlabel="dropout", ylabel="final test accuracy", xticks=DROPOUTS, title="Is dropout still needed?")
    ax.legend(frameon=False)


of_accuracy = partial(Claim, measures="final test accuracy, each arm at its best rate", unit="of test accuracy")
at_one = partial(
    Claim, measures=f"final test accuracy, all arms at a rate of {RATE:g}, without dropout", unit="of test accuracy"
)
of_gap = partial(
    Claim,
    measures=f"test loss minus training loss at the end, all arms at a rate of {RATE:g}, without dropout",
    unit="times the gap",
    source=LUO,
)

EXPERIMENT = Experiment(
    title="Batch norm regularizes by the noise of its statistics, and takes the place of dropout.",
    question="Does the noise of batch statistics help a network to generalize, and is dropout still needed?",
    source=f"{IOFFE}; {LUO}; {LI}",
    citation="Sergey Ioffe and Christian Szegedy: Batch Normalization. ICML 2015, arXiv:1502.03167. Ping Luo, Xinjiang"
    " Wang, Wenqi Shao and Zhanglin Peng: Towards Understanding Regularization in Batch Normalization. ICLR 2019,"
    " arXiv:1809.00846. Xiang Li, Shuo Chen, Xiaolin Hu and Jian Yang: Understanding the Disharmony between Dropout and"
    " Batch Normalization by Variance Shift. CVPR 2019, arXiv:1801.05134.",
    theme=WHEN_IT_HELPS,
    answer={
        "cpu": "With statistics of 16 examples in place of all 256 the gap between training and test loss of a small"
        " MLP was 0.81 times as wide at the same learning rate, but its accuracy was not measurably another (93.8%"
        " and 93.5%, each at its best rate). Noise of the same size, put back into statistics of 256, did neither for"
        " certain, and beside batch norm dropout was not needed.",
    },
    reader_questions={
        "Is dropout still needed?": (
            "Not beside batch norm in our small MLP: the dropout that was best on validation changed its accuracy"
            " by -0.2% (-0.6% to 0.2%), and dropout of 0.5 cost 1.2%. Batch norm without dropout was 1.4% more"
            " accurate than no norm with the best dropout."
        ),
        "Is it the noise of the batch that makes batch norm generalize?": (
            "Not noise alone: statistics of 16 examples narrowed the gap between training and test loss of our MLP to"
            " 0.81 at the same rate, and noise of the same size, put back into statistics of 256, left it at 0.98"
            " (0.93 to 1.05). Neither made a difference in accuracy that nine seeds tell."
        ),
    },
    surprise="A first run found an MLP by statistics of 16 examples 0.3% less accurate than by those of 256, and its"
    " interval excluded 0. The same with fresh seeds, for which the search chose another rate, found it 0.3% more"
    " accurate: an interval over seeds does not know what the choice of rates can do.",
    differs="The sources train convolutional networks on CIFAR and ImageNet; here an MLP of three layers learns 3,500"
    " digits for 30 epochs. Luo et al. vary the batch of SGD with that of batch norm, and estimate population"
    " statistics from many examples; here SGD always takes 256, which also stand for the population, and their decay,"
    " which they derive for one layer, has a strength chosen on validation. Noise put back is drawn for each unit by"
    " itself, that of real batches is shared. Running variances are averages of biased ones, as in Flax: too small"
    " where groups are. Where several rates are equally good on validation (500 digits, 2 seeds), the lowest is taken:"
    " in the first run statistics of 16 were as good at 0.1, 0.3 and 0.9. Abstracts and summaries of the sources were"
    " read, and figure 1 of Li et al.; section 3.4 of Ioffe and Szegedy, and that Wu and He 2018 find small batches to"
    " hurt, are as remembered.",
    settings={
        "smoke": Sizes(seeds=2, data="mnist5k", steps=2, interval=1, width=8),
        "cpu": Sizes(seeds=9, first_seed=100, data="mnist5k", steps=390, interval=195),
        "full": Sizes(seeds=9, data="mnist", steps=8_600, interval=860, width=1024),
    },
    grid=Grid(
        task, BATCH_SIZE, {}, {"network": NETWORKS},
        Search("rate", (0.03, 0.1, 0.3), extensions=1, least_steps=10), conclude=by_exact_statistics,
    ),
    stages=lambda settings: [Stage("one rate", partial(at_one_rate, settings))],
    claims=[
        of_accuracy(
            "The noise of batch statistics helps: those of 16 examples generalize better than those of 256.",
            Compared(without, SIXTEEN, ALL), above=0.0, precision=0.002, source=f"{IOFFE}; {LUO}",
            dispute=SMALL_BATCHES,
        ),
        of_accuracy(
            "Too few examples hurt: statistics of 4 generalize worse than those of 16.",
            Compared(without, FOUR, SIXTEEN), below=0.0, precision=0.002, source="Wu and He 2018",
            dispute=SMALL_BATCHES,
        ),
        of_gap(
            "At the same learning rate noise narrows the gap between training and test.",
            Compared(gap_at_one_rate, SIXTEEN, ALL, ratio=True), below=1.0, precision=0.05,
            standalone="At the same learning rate the noise of statistics of 16 examples narrows the gap between"
            " training and test loss.",
        ),
        of_gap(
            "It narrows the gap by a tenth at least.", Compared(gap_at_one_rate, SIXTEEN, ALL, ratio=True), below=0.9,
            standalone="At the same learning rate the noise of statistics of 16 examples narrows the gap between"
            " training and test loss by a tenth at least.",
        ),
        of_gap(
            "Noise put back into statistics of all 256 narrows it as well.",
            Compared(gap_at_one_rate, PUT_BACK, ALL, ratio=True), below=1.0, precision=0.05,
            standalone="Gaussian noise put into the statistics of all 256 examples narrows the gap between training and"
            " test loss.",
        ),
        at_one(
            "It is the noise that helps: put back into statistics of all 256 it helps as well.",
            Compared(accuracy_at_one_rate, PUT_BACK, ALL), above=0.0, precision=0.002, source="a control of ours",
            standalone="It is the noise that makes batch norm generalize: put back into statistics of all 256 examples"
            " it makes the network more accurate.",
        ),
        at_one(
            "And then these are as good as statistics of 16.",
            Compared(accuracy_at_one_rate, PUT_BACK, SIXTEEN), equal=0.005, source="a control of ours",
            standalone="With noise put back into them, statistics of all 256 examples are as good as statistics of 16.",
        ),
        of_accuracy(
            "A decay of the scale helps statistics of all 256.",
            Compared(without, DECAYED, ALL), above=0.0, precision=0.002, source=LUO,
            standalone="A penalty on the scales of batch norm makes a network with statistics of all 256 examples more"
            " accurate.",
        ),
        of_accuracy(
            "With it they are as good as statistics of 16: batch norm is population normalization and such a decay.",
            Compared(without, DECAYED, SIXTEEN), equal=0.005, source=LUO,
            standalone="With a decay of the scale, statistics of all 256 examples are as good as statistics of 16:"
            " batch norm is population normalization and such a decay.",
        ),
        Claim(
            "With batch norm dropout is not needed.",
            lambda r: gained_by_dropout(r).sel(arm=BOTH), below=0.005, unit="of test accuracy", source=IOFFE,
            measures="final test accuracy with batch norm, each at its best rate: the chosen dropout minus none",
            dispute=DROPOUT,
        ),
        Claim(
            "Dropout still helps beside batch norm.",
            lambda r: gained_by_dropout(r).sel(arm=BOTH), above=0.0, precision=0.002, unit="of test accuracy",
            measures="final test accuracy with batch norm, each at its best rate: the chosen dropout minus none",
            source="Zagoruyko and Komodakis 2016, by Li et al. 2018", dispute=DROPOUT,
        ),
        Claim(
            "Batch norm takes the place of dropout.", in_place_of_dropout, above=-0.005, unit="of test accuracy",
            measures="final test accuracy, each at its best rate: statistics of 16 without dropout minus no norm with"
            " the chosen dropout", source=IOFFE,
        ),
        Claim(
            "Dropout gains more without batch norm than with it.",
            Compared(gained_by_dropout, PLAIN, SIXTEEN), above=0.0, precision=0.002, unit="of test accuracy",
            measures="final test accuracy with the chosen dropout minus without, each at its best rate", source=IOFFE,
        ),
        Claim(
            "Dropout and batch norm together are worse than batch norm alone.",
            lambda r: at_half(r, BOTH), below=0.0, precision=0.002, unit="of test accuracy", source=LI,
            measures="final test accuracy with batch norm, each at its best rate: with dropout 0.5 minus without",
        ),
        Claim(
            "That is because dropout shifts the variance between training and test: exact statistics help.",
            lambda r: mended(r, BOTH), above=0.0, precision=0.002, unit="of test accuracy", source=LI,
            measures="test accuracy of networks trained with dropout 0.5: statistics measured without dropout minus"
            " running ones",
            standalone="Dropout harms batch norm because it shifts the variance between training and test: statistics"
            " measured without dropout help.",
        ),
    ],
    tables=[
        table_of(
            "Final test accuracy, by what statistics are taken of and by dropout", accuracy, rows=["arm"],
            columns="dropout", note="In Li et al., figure 1, dropout 0.5 in every block of a DenseNet with batch norm"
            " takes its accuracy on CIFAR-100 from 0.774 to 0.686.",
        ),
        table_of(
            "The same with statistics measured anew on the training digits, without dropout",
            lambda r: crossed(r.recalibrated).sel(arm=list(SIZES)), rows=["arm"], columns="dropout",
        ),
        table_of(
            f"All at a rate of {RATE:g}, without dropout: final test accuracy, and test loss minus training loss",
            lambda r: side_by_side({"accuracy": accuracy_at_one_rate(r), "gap": gap_at_one_rate(r)}),
            rows=["arm"], columns="figure",
        ),
        table_of(
            "Test loss minus training loss at the end, each at its own rate", gap, rows=["arm"], columns="dropout",
            note="The rates differ, and change the gap as well: the table before has one rate for all.",
        ),
        table_of(
            "Statistics of all 256 with something in the place of noise: final test accuracy, each at its own rate",
            lambda r: final(r.test_accuracy).sel(network=[PUT_BACK, *DECAYS]).expand_dims(figure=["accuracy"]),
            rows=["network"], columns="figure",
        ),
    ],
    pictures=[
        panels(
            draw_arms, draw_dropout, file="noise.png", size=(5.6, 3.8),
            title="Does the noise of batch statistics help, and is dropout still needed?",
            caption="MLP on 3,500 digits. All networks take steps of the same 256 examples; those with batch norm"
            " differ in over how many of them statistics are taken. 'Noise put back': statistics of all, plus Gaussian"
            " noise as great as that of statistics of 16. Each network has the rate that is best for it on validation."
            " Left: a dot a seed, a bar their mean. Right: means of the seeds; bands: their range.",
        ),
        panels(
            draw_by_size, draw_gap, file="groups.png", size=(4.6, 3.4),
            title="Over how many examples should statistics be taken?",
            caption="The fewer examples, the more noise. Lines: means of the seeds, bands: their range. Left: each"
            " network at the rate that is best for it on validation. Right: the same batches and weights at one rate,"
            " without dropout; the diamond has statistics of all 256 with noise as great as statistics of 16 have.",
        ),
    ],
)  # fmt: skip
