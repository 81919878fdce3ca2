"""Does batch norm know what it does not know? Probabilities averaged over random batch statistics, and simpler ways.

Protocol (Teye, Azizpour and Smith 2018): the network of `noise`, an MLP of two hidden layers of 128 units on digits of
14 x 14 pixels, SGD with momentum 0.9, 390 steps of 256 examples; batch norm takes statistics of groups of 16 examples.
Its probabilities for a digit are averaged over 500 samples, each by the statistics of 16 training digits. Beside them,
of the same trained network: evaluation mode, that is by running statistics, and this with one temperature, chosen on
validation, that divides all logits. The rival: a network without norm that trains with dropout 0.5, and keeps it at
test time for its samples.

Judged on 1,000 test digits: mean log likelihood; expected calibration error in 15 bins (Guo et al. 2017); and how well
entropy tells 1,000 pieces of clothing from digits (the area under the ROC curve). Both networks have the rate that was
best on validation, by the same search.

These claims were first judged as a part of `noise`, with the same seeds, and before that with seeds 0 to 8.

`python -m experiments run uncertainty` takes about a minute and a half on two cores and needs fashion_mnist. 9 seeds,
fixed before any result was seen.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from experiments.framework.claim import Claim, Compared
from experiments.framework.experiment import WHEN_IT_HELPS, Experiment, Grid, Search, Settings, Trained
from experiments.framework.pictures import COLORS, dots, panels
from experiments.framework.tables import table_of
from experiments.training import data, loop, noisy_mlp
from experiments.training.noisy_statistics import kind

GROUP = 16
NORM, DROPOUT = f"batch norm by groups of {GROUP}", "no norm, dropout 0.5"
NETWORKS = {
    NORM: {**kind(GROUP), "decay": 0.0},
    DROPOUT: {**kind(normalize=False, dropout=0.5), "decay": 0.0},
}
HOWS = ONE, SOFTENED, SAMPLED = ("evaluation mode", "one temperature", "mean of samples")
FIGURES = LIKELIHOOD, CALIBRATION, UNKNOWN = ("log likelihood", "calibration error", "clothes told from digits")
SHADES = {ONE: COLORS["batch norm"], SOFTENED: "#e69f00", SAMPLED: "#4dac5e"}
TEYE = "Teye, Azizpour and Smith 2018"


@dataclass(frozen=True, kw_only=True)
class Sizes(Settings):
    """And the width of the network, samples of its predictions, and the data set of unknown images."""

    width: int = 128
    samples: int = 500
    unknown: str = "fashion_mnist"


def task(settings: Sizes) -> loop.Task:
    """`noisy_mlp.task` of the settings' width; a missing data set is told before the training and not after it."""
    data.load(settings.unknown)
    return noisy_mlp.task(settings.width)


def doubts(trained: Trained) -> dict:
    """The FIGURES of every network by each of HOWS, "uncertainty" [runs, how, figure]."""
    settings = trained.settings
    unknown = data.load(settings.unknown).test_images
    unknown = jnp.asarray(unknown[data.spread(noisy_mlp.SEEN, len(unknown))])
    found = []
    for number, run in enumerate(trained.runs):
        variables = jax.tree.map(lambda leaf, number=number: leaf[number], trained.variables)
        how = settings.width, settings.samples, GROUP if run["network"] == NORM else None
        found.append(noisy_mlp.judge_probabilities(*how, variables, run["seed"], trained.arrays, unknown))
    return {"uncertainty": (("how", "figure"), np.array(found))}


def trust(r: xr.Dataset) -> xr.DataArray:
    """All figures of both networks: [network, how, figure, seed]."""
    return r.uncertainty.assign_coords(how=list(HOWS), figure=list(FIGURES))


def of_norm(figure: str, r: xr.Dataset) -> xr.DataArray:
    """One figure of the network with batch norm: [how, seed]."""
    return trust(r).sel(network=NORM, figure=figure, drop=True)


def samples_alike(r: xr.Dataset) -> xr.DataArray:
    """Log likelihood of samples: of batch statistics minus of dropout in the network without norm."""
    samples = trust(r).sel(figure=LIKELIHOOD, how=SAMPLED, drop=True)
    return samples.sel(network=NORM, drop=True) - samples.sel(network=DROPOUT, drop=True)


def draw(figure: str, words: str, ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """One figure of the network with batch norm."""
    dots(ax, of_norm(figure, r), "how", SHADES)
    ax.set(xlabel=words, title=figure.capitalize())


by_samples = partial(Claim, source=TEYE)
AVERAGED = "Probabilities averaged over random batch statistics"

EXPERIMENT = Experiment(
    title="Random batch statistics tell what a network with batch norm does not know.",
    question="Does batch norm know what it does not know?",
    source=TEYE,
    citation="Mattias Teye, Hossein Azizpour and Kevin Smith: Bayesian Uncertainty Estimation for Batch Normalized Deep"
    " Networks. ICML 2018, arXiv:1802.06455.",
    theme=WHEN_IT_HELPS,
    answer={
        "cpu": "Averaged over random batch statistics, the probabilities of a small MLP for test digits were better"
        " than by its running statistics (log likelihood -0.215 in place of -0.264) and better calibrated (error 1.5%"
        " in place of 3.6%). But one temperature that softens all predictions did more for the likelihood (-0.204), and"
        " pieces of clothing were told from digits less often with the samples (83%) than without (85%).",
    },
    reader_questions={
        "Do random batch statistics tell what a network does not know?": (
            "Its probabilities for digits are better calibrated with them (an error of 1.5% in place of 3.6%), but"
            " they do not find images of another kind better: 83% of pairs of a piece of clothing and a digit were told"
            " apart, 85% without them. One temperature for all predictions costs no samples, and gave the better"
            " likelihood and 87%."
        ),
    },
    surprise="A single number, the temperature of all logits, gave test digits a higher likelihood than 500 samples of"
    " random batch statistics did, and told clothes from digits better. The samples were better in calibration alone.",
    differs="The source trains convolutional networks on CIFAR-10 and regresses on tables; here an MLP of three layers"
    " learns 3,500 digits. Its abstract and a summary were read. Running variances are averages of biased ones, as in"
    " Flax: too small where groups are.",
    settings={
        "smoke": Sizes(seeds=2, data="mnist5k", steps=2, interval=1, width=8, samples=3, unknown="mnist5k"),
        "cpu": Sizes(seeds=9, first_seed=100, data="mnist5k", steps=390, interval=195),
        "full": Sizes(seeds=9, data="mnist", steps=8_600, interval=860, width=1024),
    },
    grid=Grid(
        task, 256, {}, {"network": NETWORKS},
        Search("rate", (0.03, 0.1, 0.3), extensions=1, least_steps=10), conclude=doubts,
    ),
    claims=[
        by_samples(
            "Samples over batch statistics give better probabilities than running statistics.",
            Compared(partial(of_norm, LIKELIHOOD), SAMPLED, ONE, "how"), above=0.0, precision=0.005,
            measures="mean log likelihood of test digits", unit="nats a digit",
            standalone=f"{AVERAGED} are better than those by running statistics.",
        ),
        by_samples(
            "They are better calibrated.",
            Compared(partial(of_norm, CALIBRATION), SAMPLED, ONE, "how"), below=0.0, precision=0.002,
            measures="expected calibration error on test digits, 15 bins", unit="of probability",
            standalone=f"{AVERAGED} are better calibrated than those by running statistics.",
        ),
        by_samples(
            "They tell better what the network does not know.",
            Compared(partial(of_norm, UNKNOWN), SAMPLED, ONE, "how"), above=0.0, precision=0.005,
            measures="probability that a piece of clothing has a higher entropy than a digit", unit="of probability",
            standalone=f"{AVERAGED} tell better what the network does not know than those by running statistics.",
        ),
        Claim(
            "They do more than one temperature does.",
            Compared(partial(of_norm, LIKELIHOOD), SAMPLED, SOFTENED, "how"), above=0.0, precision=0.005,
            measures="mean log likelihood of test digits", unit="nats a digit", source="a control of ours",
            standalone=f"{AVERAGED} are better than those of which all logits are divided by one temperature.",
        ),
        by_samples(
            "They are as good as samples over dropout.", samples_alike, equal=0.02, unit="nats a digit",
            measures=f"mean log likelihood of test digits: samples over statistics of {GROUP} minus samples over"
            " dropout 0.5 without norm",
            standalone=f"{AVERAGED} are as good as those averaged over dropout at test time.",
        ),
    ],
    tables=[
        table_of(
            "Can the probabilities be trusted?", trust, rows=["network", "how"], columns="figure", form=".3f",
            note=f"{ONE.capitalize()}: running statistics, no dropout. {UNKNOWN.capitalize()}: probability that a piece"
            " of clothing has the higher entropy.",
        ),
    ],
    pictures=[
        panels(
            partial(draw, LIKELIHOOD, "mean log likelihood of test digits, nats (higher is better)"),
            partial(draw, CALIBRATION, "expected calibration error (lower is better)"),
            partial(draw, UNKNOWN, "area under the ROC curve (higher is better)"),
            file="uncertainty.png", size=(4.6, 3.0),
            title="Does batch norm know what it does not know?",
            caption=f"The same networks (statistics of {GROUP} examples, no dropout) in evaluation mode, that is by"
            " running statistics, with one temperature that softens these probabilities, and averaged over 500 samples,"
            f" each with the statistics of {GROUP} training digits. Unknown are pieces of clothing. A dot a seed, a bar"
            " their mean.",
        ),
    ],
)  # fmt: skip
