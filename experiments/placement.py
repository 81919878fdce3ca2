"""Where should batch norm stand: at XW + b or at X, before or after the activation, in every layer or in one?

Protocol: MLP 784-50-50-50-50-10 on pixels in [0, 1], ReLU or sigmoid, Glorot-uniform weights, batch 60, plain SGD,
batch norm (decay 0.9, epsilon 0.001) at the places of `ARMS`. All arms of a seed start from the same weights and see
the same batches; each has the rate that was best on validation. They are one network with switches, which trains all.
How Gaussian X and XW + b are is measured unit by unit on 1,000 test images, in the hidden layers whose X comes from an
activation (2 to 4): skewness, excess kurtosis and the test of Jarque and Bera.

The exact part: 64 digits, a 3 x 3 convolution to 8 feature maps, a 1 x 1 convolution to 6, batch norm; against a dense
layer on the same values as a matrix [images x positions, 8]. Outputs, running statistics and gradients, in float64.

`python -m experiments run placement` takes four to six minutes on two cores. By three earlier seeds most claims need 3
to 10 seeds, and four of those on accuracy 12 to 50; 10 are taken, the most here. The result's seeds are fresh.
"""

from dataclasses import dataclass
from functools import cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes

import jaxbn
from experiments.framework.claim import Claim, Compared
from experiments.framework.experiment import WHAT_IT_IS, Experiment, Grid, Search, Settings, Stage
from experiments.framework.pictures import COLORS, curves, dots, panels
from experiments.framework.results import final
from experiments.framework.start import at_the_start, from_the_start
from experiments.framework.tables import table_of
from experiments.topics import PLACE
from experiments.training import data, feature_maps, gaussianity, loop
from experiments.training.placed_norm import PlacedNorm, Switches

ACTIVATIONS = {"relu": {"sigmoid": 0}, "sigmoid": {"sigmoid": 1}}
NONE, IMAGE = "no batch norm", "the image only"
FIRST, LAST = "before the first activation", "before the last activation"
XW, X, AFTER = "before every activation (XW + b)", "input X of every layer", "after every activation"
ARMS = (NONE, IMAGE, FIRST, LAST, XW, X, AFTER)
LOOKED_AT = [NONE, XW, AFTER]  # where it is asked how Gaussian X and XW + b are
SITES = ("X", "XW + b")
STATISTICS = ("skewness", "excess kurtosis", "passes the test")
SEEN = 1000  # images on which they are measured
COLOR = {arm: COLORS["batch norm" if arm in (XW, X, AFTER) else "plain"] for arm in ARMS}
SOURCE = "Ioffe and Szegedy 2015, section 3.2; Deep Learning, section 8.7.1"
CAFFENET = "github.com/ducha-aiki/caffenet-benchmark, batchnorm.md"
PUBLISHED = xr.DataArray([0.493 - 0.478], {"activation": ["relu"]})  # ImageNet at 128 pixels, one run each


@dataclass(frozen=True, kw_only=True)
class Sizes(Settings):
    """And the number of hidden layers, two at least, and their width."""

    layers: int = 4
    width: int = 50


def switches(layers: int) -> Switches:
    """Those of all ARMS, each with a first axis [arms]. What comes out of activation i is the input of layer i + 1."""
    x, xw = np.zeros((len(ARMS), layers + 1)), np.zeros((len(ARMS), layers))
    x[ARMS.index(IMAGE), 0] = xw[ARMS.index(FIRST), 0] = xw[ARMS.index(LAST), -1] = 1
    x[ARMS.index(X), :-1] = x[ARMS.index(AFTER), 1:] = xw[ARMS.index(XW)] = 1
    return Switches(np.zeros(len(ARMS)), x, xw)


@cache
def task(settings: Sizes) -> loop.Task:
    """The network whose norms stand at the run's "place", with sigmoid or ReLU, under SGD at its "rate"."""
    network = PlacedNorm(jaxbn.batch_norm(decay=0.9, epsilon=1e-3), settings.layers, settings.width)

    def init(run: dict, key: jax.Array, x: jax.Array) -> dict:
        place = run["place"].astype(int)
        arm = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32)[place], switches(settings.layers))
        return network.init(arm._replace(sigmoid=run["sigmoid"]), key, x)

    def metrics(run: dict, state: dict, arrays: dict) -> dict:
        seen = network.seen(state["variables"], data.pixels(arrays["test_images"][:SEEN]))
        found = dict(zip(SITES, map(gaussianity.summary, seen), strict=True))
        places = product(STATISTICS, SITES, range(settings.layers - 1))
        return {key(statistic, site, i + 2): found[site][statistic][i] for statistic, site, i in places}

    return loop.Task(init, network.apply, lambda run: optax.sgd(run["rate"]), metrics=metrics)


def key(statistic: str, site: str, layer: int) -> str:
    """The name of a metric."""
    return f"{statistic} of {site}, layer {layer}"


def shapes(r: xr.Dataset) -> xr.DataArray:
    """How Gaussian X and XW + b are where LOOKED_AT: [..., step, statistic, site, layer]; the start is step 0."""
    layers = sorted({int(str(name).split()[-1]) for name in r.data_vars if ", layer " in str(name)})
    axes = {"statistic": STATISTICS, "site": SITES, "layer": layers}
    places = xr.Coordinates.from_pandas_multiindex(pd.MultiIndex.from_product(axes.values(), names=list(axes)), "place")
    found = from_the_start(r.sel(arm=LOOKED_AT), [key(*place) for place in product(*axes.values())])
    array = found.to_dataarray("place").drop_vars("place").assign_coords(places).unstack("place")
    return array.rename("shape").sel(statistic=list(STATISTICS))  # unstacked they come in the order of the alphabet


def ends(r: xr.Dataset, statistic: str) -> xr.DataArray:
    """One statistic at the start and at the end, mean over layers."""
    return shapes(r).sel(statistic=statistic, drop=True).isel(step=[0, -1]).mean("layer")


def accuracy(r: xr.Dataset) -> xr.DataArray:
    """Test accuracy after the last step."""
    return final(r.test_accuracy)


def gain(r: xr.Dataset, arm: str, over: str) -> xr.DataArray:
    """Test accuracy of one arm minus that of another."""
    return Compared(accuracy, arm, over)(r)


def draw(activation: str, ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """The accuracy of every arm with one activation."""
    dots(ax, accuracy(r).sel(activation=activation), "arm", COLOR)
    ax.set(xlabel=f"test accuracy after {settings.steps:,} steps", title=f"{activation}: where batch norm stands")


less_gaussian = partial(Claim, source=SOURCE, unit="of the statistic")
better = partial(
    Claim,
    measures="final test accuracy, each arm at its best rate",
    unit="of test accuracy",
    above=0.0,
    precision=0.005,
)
before_or_after = partial(better, dispute=PLACE)
of_every_layer = partial(better, source="Ioffe and Szegedy 2015, section 2")

EXPERIMENT = Experiment(
    title="Batch norm may stand before or after the activation, with one mean and variance per feature map.",
    question="Where should batch norm stand, and can it be used after the activation?",
    source="Ioffe and Szegedy 2015, sections 2 and 3.2; Goodfellow, Bengio and Courville, Deep Learning, section 8.7.1",
    citation="Sergey Ioffe and Christian Szegedy: Batch Normalization: Accelerating Deep Network Training by Reducing"
    " Internal Covariate Shift. ICML 2015. Ian Goodfellow, Yoshua Bengio and Aaron Courville: Deep Learning. MIT Press"
    " 2016, section 8.7.1.",
    theme=WHAT_IT_IS,
    answer={
        "cpu": "Batch norm works on both sides of the activation: in our MLP after it was better with sigmoid (90.7%"
        " of the digits against 89.3%), and with ReLU ten seeds do not tell (91.9% against 92.4%). The input X of a"
        " layer is less Gaussian than XW + b, above all with ReLU, where normalizing XW + b gained 0.8 points over X;"
        " with sigmoid it lost 1.1.",
    },
    surprise="Batch norm is to stand before the activation and in every layer. In an MLP of sigmoids it did better"
    " after the activation than before (1.4 points, 0.8 to 1.9), and a single one before the last activation did"
    " better than one in every layer (2.0 points, 1.5 to 2.5).",
    reader_questions={
        "Can batch norm be used after the activation?": "Yes: in our MLP, each at its best learning rate, after was"
        " 1.4 points more accurate than before with sigmoid (0.8 to 1.9), and with ReLU ten seeds do not tell (-1.1 to"
        " 0.2). A published comparison on ImageNet has after 1.5 points ahead with ReLU, so try both where the last"
        " percent matters.",
        "Is it enough to normalize the images, or one layer?": "The images are not enough: in our MLP batch norm"
        " before every activation gained 1.1 points over that with ReLU (0.1 to 2.1) and 2.3 with sigmoid (1.1 to"
        " 3.5). A single norm before the last activation was 2.0 points better than one in every layer with sigmoid;"
        " with ReLU ten seeds do not tell (-1.1 to 0.2).",
        "What differs from layer and instance norm?": "The formula is the same, the mean and variance are of other"
        " values: batch norm's of one unit over all examples, layer norm's of one example over all units, instance"
        " norm's of one feature map of one example. Batch norm alone lets examples influence each other, and alone"
        " needs other statistics at test time.",
        "Over what does batch norm average in a convolutional layer?": "Over the batch and all positions: a feature"
        " map has one mean and one variance. A 1 x 1 convolution is then exactly a dense layer whose examples are"
        " positions.",
    },
    differs="Both sources give reasons for XW + b and no comparison; the published one is of CaffeNet on ImageNet,"
    " while here 50 units a layer learn 3,500 digits. The preset full has the network and the steps of the paper's"
    " section 4.1. Norms that are switched off are counted among the trained parameters, and get no gradient.",
    settings={
        "smoke": Sizes(seeds=2, data="mnist5k", steps=4, interval=2, layers=2, width=8),
        "cpu": Sizes(seeds=10, data="mnist5k", steps=900, interval=100),
        "full": Sizes(seeds=5, data="mnist", steps=50_000, interval=1000, layers=3, width=100),
    },
    grid=Grid(
        task, 60, {}, {"activation": ACTIVATIONS, "arm": {arm: {"place": n} for n, arm in enumerate(ARMS)}},
        Search("rate", (0.1, 0.3, 1.0, 3.0, 10.0), extensions=1, together=False),
        conclude=at_the_start,
    ),
    stages=lambda settings: [
        Stage("exact", lambda: feature_maps.measured(data.load(settings.data).train_images, settings.every_seed))
    ],
    claims=[
        Claim(
            "A 1 x 1 convolution with batch norm equals a dense layer with batch norm.", lambda r: r.convolution,
            measures="largest relative difference of outputs, statistics and gradients in float64",
            unit="relative", exact=1e-12,
        ),
        Claim(
            "Each feature map has one mean and one variance, those over batch and positions.", lambda r: r.moments,
            measures="largest relative difference of both from those over batch, height and width in float64",
            unit="relative", exact=1e-12,
            standalone="In a convolutional layer batch norm has one mean and one variance for each feature map, those"
            " over batch and positions.",
        ),
        less_gaussian(
            "The input X of a layer is more skewed than XW + b.",
            Compared(partial(ends, statistic="skewness"), "X", "XW + b", "site"), above=0.25,
            measures="size of the skewness, median over units, mean over layers 2 and up, at the start and at the end",
            standalone="The input X of a layer is more skewed than its pre-activation XW + b.",
        ),
        less_gaussian(
            "The tails of X are further from those of a Gaussian than the tails of XW + b.",
            Compared(partial(ends, statistic="excess kurtosis"), "X", "XW + b", "site"), above=0.5,
            measures="size of the excess kurtosis, likewise",
            standalone="The tails of a layer's input X are further from those of a Gaussian than the tails of its"
            " pre-activation XW + b.",
        ),
        less_gaussian(
            "More units of XW + b than of X pass for Gaussian.",
            Compared(partial(ends, statistic="passes the test"), "XW + b", "X", "site"), above=0.05,
            measures=f"share of units that pass the test of Jarque and Bera at 5% on {SEEN:,} images, likewise",
            standalone="More units of a layer's pre-activation XW + b than of its input X pass for Gaussian.",
        ),
        better(
            "It is better to normalize XW + b than X.", Compared(accuracy, XW, X), source=SOURCE,
            standalone="It is better to batch-normalize a layer's pre-activation XW + b than its input X.",
        ),
        better(
            "That is so because X is not Gaussian: XW + b gains more with ReLU than with sigmoid.",
            lambda r: gain(r, XW, X).sel(activation="relu") - gain(r, XW, X).sel(activation="sigmoid"),
            measures="what XW + b gains over X in final test accuracy: with ReLU minus with sigmoid",
            source="Deep Learning, section 8.7.1, names ReLU; the comparison with sigmoid is ours",
            standalone="It is better to batch-normalize XW + b than X because X is not Gaussian: XW + b gains more"
            " with ReLU than with sigmoid.",
        ),
        before_or_after(
            "Batch norm does better before the activation than after it.", Compared(accuracy, XW, AFTER), source=SOURCE,
        ),
        before_or_after(
            "Batch norm does better after a ReLU than before it.",
            Compared(lambda r: accuracy(r).sel(activation="relu"), AFTER, XW), source=CAFFENET,
        ),
        before_or_after(
            "It makes no difference whether batch norm stands before or after the activation.",
            Compared(accuracy, AFTER, XW), above=None, equal=0.01,
            source="the author of github.com/eladhoffer/ImageNet-Training in its issue 14",
        ),
        of_every_layer(
            "To normalize every layer is better than to normalize the input of the network only.",
            Compared(accuracy, XW, IMAGE),
            standalone="Batch norm in every layer is better than batch norm of the input of the network only.",
        ),
        of_every_layer(
            "To normalize every layer is better than to normalize one.",
            lambda r: accuracy(r).sel(arm=XW, drop=True) - accuracy(r).sel(arm=[FIRST, LAST]),
            measures="final test accuracy: XW + b of every layer minus that of the first or the last alone",
            standalone="Batch norm in every layer is better than batch norm in one.",
        ),
        of_every_layer(
            "A single norm already helps.",
            lambda r: accuracy(r).sel(arm=[IMAGE, FIRST, LAST]) - accuracy(r).sel(arm=NONE, drop=True),
            measures="final test accuracy with one norm minus that with none, each arm at its best rate",
            standalone="A single batch norm in a network already helps.",
        ),
    ],
    tables=[
        table_of("Final test accuracy", accuracy, rows=["arm"], columns="activation"),
        table_of(
            "Learning rate chosen on validation", lambda r: r.rate.isel(seed=[0]),
            rows=["arm"], columns="activation", form="g",
        ),
        table_of(
            "Test accuracy that batch norm gains after the activation over before it",
            lambda r: gain(r, AFTER, XW).expand_dims(gain=["gain"]), rows=["activation"], columns="gain",
            published=PUBLISHED.expand_dims(gain=["gain"]),
            note=f"Published: CaffeNet on ImageNet, one run each, 0.493 after and 0.478 before ({CAFFENET}).",
        ),
        table_of(
            "How Gaussian X and XW + b are, at the start and at the end",
            lambda r: shapes(r).isel(step=[0, -1]).mean("arm"),
            rows=["activation", "layer", "step", "site"], columns="statistic", form=".2f",
            note="Sizes of skewness and excess kurtosis, medians over units; share of units that pass for Gaussian.",
        ),
        table_of(
            "Largest relative difference, in units of 1e-15",
            lambda r: 1e15 * r.convolution.expand_dims(between=["1 x 1 convolution and dense layer"]),
            rows=["compared"], columns="between", form=".2f",
        ),
    ],
    pictures=[
        panels(
            partial(draw, "relu"), partial(draw, "sigmoid"), file="placement.png", size=(6.0, 4.6),
            title="Where should batch norm stand, and can it be used after the activation?",
            caption="A dot is a seed, a bar the mean, each arm at the learning rate that was best on validation. Blue:"
            " batch norm in every layer. X of a layer is the image or what comes out of the activation below it. The"
            " scales of the two panels differ.",
        ),
        curves(
            lambda r: shapes(r).mean(["layer", "arm"]), hue="site", row="activation", col="statistic",
            file="gaussian.png", title="Is the input X of a layer less Gaussian than XW + b?",
            caption="Sizes of skewness and excess kurtosis (0 for a Gaussian), medians over units; share of units that"
            " pass a test of normality (0.95 for Gaussians). Layers 2 and up, without norm, with it before and after.",
            labels={"step": "training step", "shape": "value", "site": ""}, facet_kws={"sharey": "col"},
        ),
    ],
)  # fmt: skip
