"""Is there something else that does what batch norm does? Its rivals, and what is confused with it, on equal terms.

Protocol: an MLP 100-100-100, LeNet-5 and a residual network of 8 layers, ReLU, on digits of 14 x 14 pixels (LeNet then
without its second pooling, the residual network with 4, 8 and 16 filters and a first convolution of stride 2); batch
64, plain SGD, 7 epochs. The arms are those of `ARMS`: norms before each ReLU, in every layer but the last; no norm with
Xavier's or He's initial weights, with weight decay 0.001 on all kernels, with standardized inputs, with all three at
once; batch norm with that decay. All arms of a seed start from the same draw, scaled as Xavier's but for He's, and see
the same batches. They are one network with switches; each has the rate that is best on validation, by the same trials
for all on a seed of their own. Weight norm starts from 100 digits, as its authors have it. Instance norm has no meaning
in a dense layer, which stays plain: the MLP has no such arm.

At the end, on training and test digits: the gap between both, what activations get at the start and at the end, whether
the other examples of a batch change the output, and what happens at a third of the contrast.

`python -m experiments run rivals` takes about five minutes on two cores. The preset `long`, 40 epochs with four times
the filters, is for a GPU. Five seeds, fixed beforehand without a pilot.
"""

from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from matplotlib.axes import Axes

import jaxbn
from experiments.framework.claim import Claim, Compared
from experiments.framework.experiment import WHEN_IT_HELPS, Experiment, Grid, Search, Settings, Trained
from experiments.framework.pictures import COLORS, dots, panels
from experiments.framework.results import final, side_by_side
from experiments.framework.start import START
from experiments.framework.tables import table_of
from experiments.topics import IN_THE_END
from experiments.training import data, loop, rival_norms
from experiments.training.rival_norms import (
    BATCH,
    GROUP,
    INSTANCE,
    KINDS,
    LAYER,
    NETWORKS,
    WEIGHT,
    Rivals,
    map_kernels,
)

BATCH_SIZE = 64
STRENGTH = 0.001  # of weight decay
PLAIN, HE, DECAYED, INPUTS, ALL = (
    "none, Xavier's weights",
    "none, He's weights",
    "none, weight decay",
    "none, standardized inputs",
    "none, these three",
)
BATCH_DECAYED = "batch norm, weight decay"


def arm(kind: str = "none", he: int = 0, decay: float = 0.0, standardized: int = 0) -> dict[str, float]:
    """The numbers of a run of one arm."""
    return {"kind": KINDS.index(kind), "he": he, "decay": decay, "standardized": standardized}


ARMS = {
    PLAIN: arm(),
    HE: arm(he=1),
    DECAYED: arm(decay=STRENGTH),
    INPUTS: arm(standardized=1),
    ALL: arm(he=1, decay=STRENGTH, standardized=1),
    BATCH: arm(BATCH),
    BATCH_DECAYED: arm(BATCH, decay=STRENGTH),
    LAYER: arm(LAYER),
    GROUP: arm(GROUP),
    INSTANCE: arm(INSTANCE),
    WEIGHT: arm(WEIGHT),
}
OF_EXAMPLES = [LAYER, GROUP, INSTANCE]  # norms by the moments of single examples
SHADES = {name: COLORS["batch norm" if name.startswith(BATCH) else "plain"] for name in ARMS}
SHADES |= dict.fromkeys((*OF_EXAMPLES, WEIGHT), "#2d8659")
FIRST, SEEN, SHARED = 100, 15 * BATCH_SIZE, 10  # digits: to start weight norm, looked at, common to two batches
ACCURACIES = ("accuracy on training digits", "accuracy on test digits", "accuracy at low contrast")
CONTRAST = 3.0  # by which test digits are divided
GAINS = ("without batch norm", "with batch norm")  # that weight decay brings
CHANGE = "relative change of the outputs for ten digits in training mode when the other 54 of a batch are exchanged"
LOST = "test accuracy minus that on the same digits with a third of their contrast"
COMPARED = [PLAIN, BATCH, *OF_EXAMPLES, WEIGHT]

IOFFE = "Ioffe and Szegedy 2015"
WU = "Wu and He 2018"
# ResNet-50 on ImageNet, batch 32 a device: errors of 23.6% (batch norm), 25.3%, 24.1% and 28.4%.
PUBLISHED = xr.DataArray(
    [[-0.017], [-0.005], [-0.048]], {"arm": [LAYER, GROUP, INSTANCE], "network": ["ResNet-8"]}, ["arm", "network"]
)
FIGURES = {
    "training minus test accuracy": ".3f",
    "input of activations, end over start": ".2f",
    "weights, end over start": ".2f",
    "change by other examples": ".1e",
    "accuracy lost at a third of the contrast": ".3f",
}


@dataclass(frozen=True, kw_only=True)
class Sizes(Settings):
    """And those of the networks, as `rival_norms.Sizes` has them."""

    halved: bool = True
    stages: int = 3
    width: int = 4


@cache
def task(settings: Sizes, network: str) -> loop.Task:
    """One network under the arm of each run, and SGD at its "rate" with its "decay"."""
    images = data.load(settings.data).train_images
    first = np.asarray(images[data.spread(FIRST, len(images))], np.float32) / 255
    moments = float(images.mean() / 255), float(images.std() / 255)
    sizes = rival_norms.Sizes(settings.halved, settings.stages, settings.width)
    rivals = Rivals(NETWORKS[network], sizes, first, moments)

    def optimizer(run: dict) -> optax.GradientTransformation:
        kernels = optax.add_decayed_weights(run["decay"], lambda p: jaxbn.decay_mask({"params": p}, biases=False))
        return optax.chain(kernels, optax.sgd(run["rate"]))

    return loop.Task(rivals.init, rivals.apply, optimizer)


@partial(jax.jit, static_argnums=0)
def look(rivals: Rivals, variables: dict, arrays: dict) -> dict[str, jax.Array]:
    """What is measured of each network, by name; variables: leaves [runs, ...], arrays: of `loop.on_device`."""
    shape = arrays["test_images"].shape[1:]
    train, test = (data.spread(SEEN, len(arrays[f"{part}_labels"])) for part in ("train", "test"))
    digits = arrays["train_images"][train].reshape(-1, *shape), arrays["test_images"][test]
    seen = jnp.concatenate([*digits, digits[1] / CONTRAST])
    labels = jnp.concatenate([arrays["train_labels"][train], *[arrays["test_labels"][test]] * 2])
    # Two batches of training digits that have the first SHARED in common.
    drawn = np.random.default_rng(0).permutation(SEEN)[: 2 * BATCH_SIZE - SHARED]
    both = np.concatenate([drawn[:BATCH_SIZE], drawn[:SHARED], drawn[BATCH_SIZE:]])
    batches = jnp.concatenate([seen, seen[both]]).reshape(-1, BATCH_SIZE, *shape)
    mode = np.arange(len(batches)) >= len(batches) - 2

    def one(variables: dict) -> dict[str, jax.Array]:
        logits, deviations = jax.lax.map(lambda b: rivals.look(variables, data.pixels(b[0]), b[1]), (batches, mode))
        right = jnp.argmax(logits[:-2], -1).ravel() == labels
        here, there = logits[-2:, :SHARED]
        squares = []
        map_kernels(lambda kernel: squares.append(jnp.sum(kernel**2)) or kernel, variables["params"])
        return {
            **dict(zip(ACCURACIES, right.reshape(3, -1).mean(1), strict=True)),
            "influence": jnp.linalg.norm(here - there) / jnp.linalg.norm(here),
            "deviation": jnp.exp(jnp.mean(jnp.log(deviations[-1]))),
            "weights": jnp.sqrt(sum(squares)),
        }

    return jax.lax.map(one, variables)


def concluded(trained: Trained) -> dict:
    """What `look` finds of the trained networks, and of those with which they began: "start: ..."."""
    rivals = trained.task.apply.__self__
    runs = loop.stacked(list(trained.runs), len(trained.runs))
    began = jax.vmap(partial(loop.init_run, trained.task, trained.arrays["test_images"]))(runs)["variables"]
    ended = {name: ((), values) for name, values in look(rivals, trained.variables, trained.arrays).items()}
    start = look(rivals, began, trained.arrays)
    return ended | {f"{START}{name}": ((), start[name]) for name in ("deviation", "weights")}


def defined(values: xr.DataArray) -> xr.DataArray:
    """The values without those of the MLP with instance norm, which is the plain one."""
    return values.where((values.arm != INSTANCE) | (values.network != "MLP"))


def best(r: xr.Dataset) -> xr.DataArray:
    """Test accuracy after the last step, each arm at its best rate."""
    return defined(final(r.test_accuracy))


def early(r: xr.Dataset) -> xr.DataArray:
    """Test accuracy after a third of the steps."""
    return defined(r.test_accuracy.isel(step=0, drop=True))


def gap(r: xr.Dataset) -> xr.DataArray:
    """How much more accurate a network is on training digits than on test digits."""
    return defined(r[ACCURACIES[0]] - r[ACCURACIES[1]])


def growth(r: xr.Dataset, name: str) -> xr.DataArray:
    """A value at the end over that at the start."""
    return defined(r[name] / r[f"{START}{name}"])


def lost(r: xr.Dataset) -> xr.DataArray:
    """Test accuracy minus that on the same digits with a third of their contrast."""
    return defined(r[ACCURACIES[1]] - r[ACCURACIES[2]])


def above(r: xr.Dataset, arms: list[str]) -> xr.DataArray:
    """Final test accuracy of batch norm minus that of some arms."""
    return best(r).sel(arm=BATCH, drop=True) - best(r).sel(arm=arms)


def decay_gains(r: xr.Dataset) -> xr.DataArray:
    """What weight decay gains in final test accuracy, without and with batch norm."""
    gains = [Compared(best, DECAYED, PLAIN)(r), Compared(best, BATCH_DECAYED, BATCH)(r)]
    return xr.concat(gains, "gain").assign_coords(gain=list(GAINS))


def figures(r: xr.Dataset) -> xr.DataArray:
    """What the last table shows of each arm, mean over networks."""
    found = gap(r), growth(r, "deviation"), growth(r, "weights"), defined(r.influence), lost(r)
    return side_by_side(dict(zip(FIGURES, (values.mean("network") for values in found), strict=True)))


def draw_network(network: str, ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """The final test accuracy of every arm with one network."""
    dots(ax, best(r).sel(network=network).dropna("arm"), "arm", SHADES)
    ax.set(xlabel=f"test accuracy after {settings.steps:,} steps", title=network)


def draw_lost(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """What a third of the contrast costs."""
    dots(ax, lost(r).mean("network").sel(arm=COMPARED), "arm", SHADES)
    ax.set(xlabel="test accuracy lost", title="Test digits with a third of their contrast")


def draw_influence(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """How far the other examples of a batch change the outputs."""
    dots(ax, defined(r.influence).mean("network").sel(arm=COMPARED), "arm", SHADES)
    ax.set(xlabel="relative change of the outputs in training", title="The other examples of the batch exchanged")


better = partial(
    Claim, measures="final test accuracy, each arm at its best rate", unit="of test accuracy", precision=0.005
)
sooner = partial(
    Claim,
    measures="test accuracy after a third of the steps, each arm at the rate that is best in the end",
    unit="of test accuracy",
    above=0.0,
    precision=0.01,
)

EXPERIMENT = Experiment(
    title="Initialization, weight decay, standardized inputs and other norms, held against batch norm on equal terms.",
    question="Is there something else that does what batch norm does?",
    source=f"{IOFFE}; Salimans and Kingma 2016; Wu and He 2018",
    citation="Sergey Ioffe and Christian Szegedy: Batch Normalization: Accelerating Deep Network Training by Reducing"
    " Internal Covariate Shift. ICML 2015. Tim Salimans and Diederik P. Kingma: Weight Normalization: A Simple"
    " Reparameterization to Accelerate Training of Deep Neural Networks. NIPS 2016, arXiv:1602.07868. Yuxin Wu and"
    " Kaiming He: Group Normalization. ECCV 2018, arXiv:1803.08494.",
    theme=WHEN_IT_HELPS,
    answer={
        "cpu": "After seven epochs batch norm was 2.4 points more accurate than no norm from Xavier's weights, and 2.2"
        " than none with He's weights, weight decay and standardized inputs together; after a third of the training it"
        " was 13.7 and 5.4 ahead. Group, weight and layer norm and standardized inputs alone were 1.3 to 1.7 behind,"
        " and five seeds do not tell whether those are differences.",
    },
    surprise="He's weights, weight decay and standardized inputs are each recommended for networks without a norm. All"
    " three together were no measurable gain over Xavier's weights alone (0.2 points, -1.0 to 1.3), and stayed 2.2"
    " points behind batch norm (0.8 to 3.7).",
    reader_questions={
        "What differs from Xavier initialization?": "What it gives to activations does not last: in our networks"
        " without a norm the standard deviation of what activations get grew 12-fold in training, with batch norm"
        " 1.04-fold. At the end batch norm was 2.4 points more accurate than Xavier's weights alone (0.1 to 4.7);"
        " whether it was than He's, five seeds do not tell (2.2, -0.1 to 4.5).",
        "What differs from weight decay?": "Weight decay pulls weights towards 0; batch norm sets the size of"
        " activations, whatever the weights. In our networks a decay of 0.001 brought no measurable gain, without a"
        " norm (-1.0 points, -2.1 to 0.1) or with batch norm (-0.1, -1.7 to 1.5), and batch norm was 3.4 points more"
        " accurate than decay alone (1.8 to 4.9).",
        "What differs from layer and instance norm?": "Batch norm sees the other examples of a batch and the contrast"
        " of an image: with the others exchanged our networks' outputs changed by 25%, and at a third of the contrast"
        " they named 14 points fewer of the digits. With layer, group and instance norm both changes were 0; whether"
        " batch norm is more accurate than layer and instance norm, five seeds do not tell (2.9 points, -0.8 to 6.5).",
    },
    differs="The sources train large networks on ImageNet and CIFAR-10 for long; ours are small, and learn 3,500"
    " digits. Wu and He have 32 groups, we have two, since LeNet has six feature maps; instance norm has four"
    " positions in the last stage of our residual network, and 49 in theirs. Their abstract was read; their errors are"
    " as remembered. Weight decay has one strength, which was not searched. Two arms took a rate at the end of the"
    " search: weight norm in LeNet 0.0333, the lowest, and instance norm in ResNet-8 3.33, the highest. What"
    " activations get is measured in ResNet-8 before the shortcut is added. The preset full has all of MNIST and whole"
    " images.",
    settings={
        "smoke": Sizes(seeds=2, data="mnist5k", steps=1, interval=1, stages=1),
        "cpu": Sizes(seeds=5, data="mnist5k", steps=378, interval=126),
        "long": Sizes(seeds=5, data="mnist5k", steps=2160, interval=720, width=16),
        "full": Sizes(seeds=5, data="mnist", steps=17_178, interval=5726, halved=False, width=16),
    },
    grid=Grid(
        task, BATCH_SIZE, {"network": tuple(NETWORKS)}, {"arm": ARMS},
        Search("rate", (0.1, 0.3, 1.0), seeds=1, extensions=1, together=False, least_steps=100),
        conclude=concluded,
    ),
    claims=[
        better(
            "Batch norm gives a better final result.", Compared(best, BATCH, PLAIN), above=0.0,
            source=f"{IOFFE}, abstract; Udacity, Batch Normalization - Lesson", dispute=IN_THE_END,
            standalone="Batch norm gives a better final result than no norm.",
        ),
        better(
            "Batch norm usually does not change the accuracy.", Compared(best, BATCH, PLAIN), equal=0.01,
            source="often taught; of a plain network that catches up in the end tell Salimans and Kingma 2016, section"
            " 5.1",
            dispute=IN_THE_END,
        ),
        sooner(
            "Batch norm is ahead early in training.", Compared(early, BATCH, PLAIN), source=f"{IOFFE}, abstract",
            standalone="Batch norm is ahead of no norm early in training.",
        ),
        better(
            "With a good initialization a network needs no norm: He's does as well.", Compared(best, HE, BATCH),
            equal=0.01, source="after Zhang, Dauphin and Ma 2019, whose initialization for deep residual networks is"
            " another",
            standalone="With a good initialization a network needs no norm: with He's it does as well as with batch"
            " norm.",
        ),
        Claim(
            "What Xavier's initialization gives to activations at the start does not last.",
            lambda r: growth(r, "deviation").sel(arm=PLAIN, drop=True),
            measures="standard deviation of what activations get, geometric mean over layers, without norm: at the end"
            " of the training over that at the start",
            unit="times", above=1.5, ratio=True, source=f"{IOFFE}, section 2, in words",
        ),
        better(
            "Weight decay is no substitute for batch norm.", Compared(best, BATCH, DECAYED), above=0.0,
            source="a control of ours",
        ),
        better(
            "With batch norm weight decay gains less.", Compared(decay_gains, *GAINS, axis="gain"),
            measures="what weight decay gains in final test accuracy", above=0.0,
            source=f"{IOFFE}, section 4.2.1, who weaken it fivefold",
            standalone="Weight decay gains less accuracy with batch norm than without.",
        ),
        better(
            "Batch norm narrows the gap between training and test.", Compared(gap, BATCH, PLAIN), below=0.0,
            measures="final accuracy on training digits minus that on test digits", source=f"{IOFFE}, section 3.4",
            standalone="Batch norm narrows the gap between training and test accuracy.",
        ),
        sooner(
            "Standardized inputs speed up learning.", Compared(early, INPUTS, PLAIN),
            source="LeCun, Bottou, Orr and Müller 1998, section 4.3",
            standalone="Without a norm standardized inputs speed up learning.",
        ),
        better(
            "To standardize the inputs alone is not enough.", Compared(best, BATCH, INPUTS), above=0.0,
            source=f"{IOFFE}, section 2",
            standalone="To standardize the inputs alone is not enough: batch norm in every layer is more accurate.",
        ),
        better(
            "He's weights, weight decay and standardized inputs together do as well as batch norm.",
            Compared(best, ALL, BATCH), equal=0.01, source="a control of ours",
        ),
        better(
            "Batch norm is more accurate than layer norm and instance norm.",
            lambda r: above(r, [LAYER, INSTANCE]), above=0.0,
            measures="final test accuracy, each arm at its best rate: batch norm minus the other", source=WU,
        ),
        better("Group norm does as well as batch norm.", Compared(best, GROUP, BATCH), equal=0.01, source=WU),
        better(
            "Weight norm does as well as batch norm.", Compared(best, WEIGHT, BATCH), equal=0.01,
            source="Salimans and Kingma 2016, section 5.1",
        ),
        Claim(
            "With batch norm the output for an example depends on the others of its batch.",
            lambda r: r.influence.sel(arm=BATCH, drop=True),
            measures=CHANGE, unit="of the outputs", above=0.05, source=f"{IOFFE}, section 3.4",
        ),
        Claim(
            "With layer, group and instance norm it does not.",
            lambda r: defined(r.influence).sel(arm=OF_EXAMPLES), measures=CHANGE, unit="of the outputs", exact=1e-5,
            source=WU,
            standalone="With layer, group and instance norm the output for an example does not depend on the others of"
            " its batch.",
        ),
        better(
            "Layer, group and instance norm do not see the contrast of an image.",
            lambda r: lost(r).sel(arm=OF_EXAMPLES), equal=0.01,
            measures=LOST, source="follows from their formula; Ba, Kiros and Hinton 2016, section 5.1",
        ),
        better(
            "Batch norm sees it.", lambda r: lost(r).sel(arm=BATCH, drop=True), above=0.01, measures=LOST,
            source="follows from its formula; Ba, Kiros and Hinton 2016, section 5.1",
            standalone="Batch norm sees the contrast of an image.",
        ),
    ],
    tables=[
        table_of("Final test accuracy, each arm at its best rate", best, rows=["arm"], columns="network"),
        table_of(
            "Final test accuracy minus that of batch norm, residual network",
            lambda r: -above(r, [a for a in ARMS if a != BATCH]).sel(network=["ResNet-8"]),
            rows=["arm"], columns="network", published=PUBLISHED, form="+.3f",
            note="Published: ResNet-50 on ImageNet, batch 32 a device (Wu and He 2018, table 1, as remembered). On"
            " CIFAR-10 Salimans and Kingma 2016 (table 1, as remembered) have errors of 8.43% without norm, 8.46% with"
            " weight norm and 8.05% with batch norm.",
        ),
        table_of("Test accuracy after a third of the steps", early, rows=["arm"], columns="network"),
        table_of(
            "Learning rate chosen on validation", lambda r: defined(r.rate).isel(seed=[0]),
            rows=["arm"], columns="network", form="g",
        ),
        table_of(
            "What each arm does, mean over networks", figures, rows=["arm"], columns="figure", form=FIGURES,
            note="Instance norm: mean over two, since the MLP has no such arm. Input of activations: standard"
            " deviation, in ResNet-8 before the shortcut is added. Weights: root of the sum of squares, all layers but"
            " the last. Other examples: relative change of the outputs in training mode when the rest of the batch is"
            " exchanged.",
        ),
    ],
    pictures=[
        panels(
            *(partial(draw_network, network) for network in NETWORKS), file="rivals.png", size=(5.4, 4.8),
            title="Is there something else that does what batch norm does?",
            caption="A dot is a seed, a bar the mean, each arm at the learning rate that was best on validation. Red:"
            " no norm, from Xavier's weights but where He's are named; these three: He's weights, weight decay and"
            " standardized inputs. Blue: batch norm. Green: other norms. The scales of the panels differ.",
        ),
        panels(
            draw_influence, draw_lost, file="examples.png", size=(5.4, 3.4),
            title="What differs between batch norm and the norms of single examples?",
            caption="Means over the three networks (instance norm: LeNet and ResNet-8, since the MLP has no such arm);"
            " a dot is a seed, a bar the mean. Left: ten digits stay in a batch of 64, the others are exchanged. Right:"
            " test digits are divided by three, in test mode.",
        ),
    ],
)  # fmt: skip
