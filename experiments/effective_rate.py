"""Below batch norm the size of the weights has no effect. What then does weight decay do?

If the loss does not depend on the size of w, a step of gradient descent turns w by an angle that goes with the
effective rate, rate / |w|^2. Decay changes |w| alone, and with it the effective rate: so the claim. It is put to the
test by exact replacements for decay: a rate that grows exponentially, and one that replays the effective rate.

Protocol: MLP 196-64-64-10 on digits of 14 x 14 (means of 2 x 2 pixels), batch norm without scale and bias and with
epsilon 0 below each ReLU, the last layer fixed at random, so that the size of no trained weight (16,640) has an effect.
Batch 64, plain gradient descent at rate 0.5. Three decays: over 2,000 steps the weakest shrinks the weights as much as
the usual decay of 5e-4 at rate 0.1 does over 40,000; the strongest drives the growing rate out of float32. All arms
(see `training.rate_and_decay`) start from the same weights and see the same batches. Their outputs are compared on the
test images, normalized by their own statistics: |f - f'| / (|f| + |f'|), 0 where equal, about 0.7 where unrelated.
Networks to which the argument does not apply are the controls: one without batch norm, and one in which scale, bias and
last layer are trained and decay too. Nothing is chosen, so nothing is searched for.

`python -m experiments run effective_rate` took nine minutes on two cores with other work beside it (2,000 steps, 10
seeds, 5,000 digits). By a pilot the claims need 7 seeds, that about steps in float32 12.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from matplotlib.axes import Axes

import jaxbn
from experiments.framework.claim import Claim, Compared
from experiments.framework.experiment import WHAT_IT_IS, Experiment, Settings, Stage
from experiments.framework.pictures import lines, panels
from experiments.framework.results import final, label_cells
from experiments.framework.tables import table_of
from experiments.training import data, loop, models, rate_and_decay

DECAY, GROWING, NONE, REPLAYED, HELD, NUDGED = ARMS = rate_and_decay.ARMS
CONTROLLED = (DECAY, GROWING, NONE)  # arms of the networks beside
BATCH_SIZE, RATE = 64, 0.5
DECAYS = WEAK, STRONG, OVERFLOWING = 0.002, 0.02, 0.05
PARTED = 0.01  # outputs further apart than this are no longer the same
ROUNDING = 1e-6  # two runs in float64 that are closer than this at all steps differ by rounding
FIGURES = ["size", "effective_rate", "loss", "accuracy", "running_accuracy"]


class Kind(NamedTuple):
    """A network: its norm, and whether scale, bias and the last layer are trained too."""

    norm: jaxbn.Normalizer
    whole: bool = False


FREE, DEFAULT, WHOLE, PLAIN = "free in size", "epsilon 1e-5", "all trained", "plain"
NETWORKS = {
    FREE: Kind(jaxbn.batch_norm(epsilon=0.0, use_scale=False, use_bias=False)),
    DEFAULT: Kind(jaxbn.batch_norm(epsilon=1e-5, use_scale=False, use_bias=False)),
    WHOLE: Kind(jaxbn.batch_norm(epsilon=0.0), whole=True),
    PLAIN: Kind(jaxbn.identity()),
}
EXACT, SINGLE = "float64", "float32"


@dataclass(frozen=True, kw_only=True)
class Sizes(Settings):
    """And the widths of the hidden layers, and which networks are trained beside the one whose weights are free."""

    widths: tuple[int, ...] = (64, 64)
    beside: tuple[str, ...] = (DEFAULT, WHOLE, PLAIN)


def stages(settings: Sizes) -> Iterator[Stage]:
    """One stage for each network and precision."""
    trained = [(FREE, EXACT, ARMS), (FREE, SINGLE, ARMS), *((name, EXACT, CONTROLLED) for name in settings.beside)]
    for network, precision, arms in trained:
        yield Stage(f"{network}, {precision}", partial(measured, settings, network, precision, arms))


def measured(settings: Sizes, network: str, precision: str, arms: tuple[str, ...]) -> xr.Dataset:
    """Every metric of `rate_and_decay.train` [seed, step, decay, arm] of one network."""
    kind, arrays = NETWORKS[network], loop.on_device(data.load(settings.data))
    how = {"use_bias": False, "activation": jax.nn.relu, "weights": models.glorot_weights()}
    build = models.mlp(settings.widths, kind.norm, **how)
    shrink = np.asarray([1 - RATE * decay for decay in DECAYS], precision)
    growing = np.stack([rate_and_decay.growing_rates(RATE, float(a), settings.steps) for a in shrink], -1)
    with np.errstate(over="ignore"):
        growing = growing.astype(precision).reshape(-1, settings.interval, len(DECAYS))
    found = []
    for seed in settings.every_seed:
        key, examples = jax.random.fold_in(jax.random.key(seed), 0), len(arrays["train_labels"])
        variables = build.init(key, models.pool2x2(data.pixels(arrays["test_images"][:2])))
        index = loop.batch_indices(jnp.int32(seed), 0, settings.steps, BATCH_SIZE, examples)
        index = index.reshape(-1, settings.interval, BATCH_SIZE)
        with jax.enable_x64(precision == EXACT):
            begun = rate_and_decay.start(seed, jax.tree.map(lambda leaf: np.asarray(leaf, precision), variables), arms)
            rates = np.asarray(RATE, precision), shrink, growing
            one = rate_and_decay.train(build.apply, kind.whole, arms, begun, index, arrays, *rates)
            found.append(jax.device_get(one))
    axes = {name: ("step", "decay", "arm")[-values.ndim :] for name, values in found[0].items()}
    metrics = {name: (("seed", *axes[name]), np.stack([one[name] for one in found])) for name in axes}
    steps = np.arange(settings.interval, settings.steps + 1, settings.interval)
    names = {"seed": settings.every_seed, "step": steps, "decay": list(DECAYS), "arm": list(arms)}
    return xr.Dataset(metrics, names).expand_dims(network=[network], precision=[precision])


def at(values: xr.DataArray, network: str = FREE, precision: str = EXACT) -> xr.DataArray:
    """Those of one network and precision; nan where it was not trained."""
    values = values.reindex(network=list(NETWORKS), arm=list(ARMS))
    return values.sel(network=network, precision=precision, drop=True)


def apart(r: xr.Dataset, arm: str, network: str = FREE) -> xr.DataArray:
    """Distance of the outputs from those with decay (of HELD: from those without), float64."""
    return at(r.apart, network).sel(arm=arm, drop=True)


def lasting(r: xr.Dataset) -> xr.DataArray:
    """The first measured step in float32 at which outputs are PARTED; all steps where they never are."""
    found = at(r.apart, precision=SINGLE)
    return found.step.where(found > PARTED).min("step").fillna(found.step[-1])


def float32_ends(r: xr.Dataset) -> xr.DataArray:
    """The step at which the growing rate breaks down in float32, over the forecast; decays forecast to do so."""
    forecast = {decay: rate_and_decay.last_step_in_range(RATE, 1 - RATE * decay, np.float32) for decay in DECAYS}
    broken = ~np.isfinite(at(r.loss, precision=SINGLE).sel(arm=GROWING, drop=True))
    ends = broken.step.where(broken).min("step").fillna(broken.step[-1])
    forecast = xr.DataArray(list(forecast.values()), {"decay": list(forecast)})
    return ends / forecast.where(forecast < r.step[-1])


def cases(r: xr.Dataset) -> xr.DataArray:
    """Distances of outputs at the end, of every network in every precision that was trained."""
    found = final(r.apart).reindex(network=list(NETWORKS), precision=[EXACT, SINGLE], arm=list(ARMS[1:]))
    return label_cells(found, ("network", "precision"), "case").dropna("case", how="all")


def shown(name: str, ax: Axes, settings: Sizes, r: xr.Dataset, legend: bool, **look: object) -> None:
    """One panel: a metric of the network whose weights are free in size, along the steps."""
    values = at(r[name]).sel(arm=[DECAY, GROWING, REPLAYED, NONE], decay=STRONG)
    lines(ax, values, x="step", hue="arm", style="arm", palette=LOOKS, legend=legend)
    ax.set(yscale="log", xlabel="training step", **look)
    if legend:
        ax.legend(frameon=False)


def draw_apart(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """Distances of outputs in both precisions."""
    values = r.apart.sel(network=FREE, arm=[GROWING, REPLAYED, NONE, NUDGED], decay=STRONG)
    lines(ax, values, x="step", hue="arm", style="precision", palette=LOOKS)
    ax.set(yscale="log", xlabel="training step", ylabel="distance of outputs from those with decay")
    ax.set_title("... and have its outputs, but for rounding")
    ax.legend(frameon=False, fontsize=8)


COLORS = ("#1f5fa8", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#555555")  # told apart by the colour-blind
LOOKS = dict(zip(ARMS, COLORS, strict=True))
rounding = partial(
    Claim, measures="largest distance of outputs over the run, float64", unit="of the outputs", exact=ROUNDING
)
differs = partial(Claim, measures="distance of outputs at the end, float64", unit="of the outputs", above=0.1)

EXPERIMENT = Experiment(
    title="With batch norm, weight decay is a learning rate in disguise.",
    question="What does weight decay do to weights whose size has no effect?",
    source="van Laarhoven 2017; Hoffer et al. 2018; Li and Arora 2020",
    citation="van Laarhoven 2017, L2 regularization versus batch and weight normalization. Hoffer, Banner, Golan and"
    " Soudry 2018, Norm matters: efficient and accurate normalization schemes in deep networks. Li and Arora 2020, An"
    " exponential learning rate schedule for deep learning.",
    theme=WHAT_IT_IS,
    answer={
        "cpu": "Below batch norm weight decay sets the effective learning rate, rate / |w|^2, and does nothing else:"
        " with a growing rate in place of decay a network in float64 had the same outputs to eight digits after 2,000"
        " steps, at weights up to 10^22 times as large. Where scales, biases and the last layer decay too, or without"
        " batch norm, that rate does not replace decay.",
    },
    surprise="A learning rate that grows exponentially replaces weight decay exactly in training, but not at test"
    " time: running statistics lag behind the growing weights. At a decay of 0.02 that cost 2.9 points of test"
    " accuracy (2.1 to 3.6), though by the test images' own statistics both networks are the same.",
    reader_questions={
        "What differs from weight decay?": "Decay makes weights small; batch norm lets the size of the weights below"
        " it have no effect, whatever it is. What is then left of decay is a higher effective learning rate, 5 to 22"
        " times that without in our MLP, where it did not raise test accuracy: at the two stronger decays it was 2.7"
        " and 6.1 points lower.",
        "Is weight decay of use with batch norm?": "Below batch norm it is a second way to set the learning rate, for"
        " which a rate without decay can stand in exactly. Where scales, biases and the last layer of our MLP decayed"
        " too, it did more than that.",
        "Can a learning rate grow exponentially for ever with batch norm?": "Until it leaves the range of its numbers:"
        " float32 ended it within 2% of the step forecast. Up to there our MLP learned as well as with decay, but"
        " running statistics lagged behind the growing weights, which cost up to 3 points of test accuracy.",
    },
    differs="The sources train convolutional networks for CIFAR-10 and ImageNet, for longer and with decay that is"
    " weaker per step; Li and Arora also with momentum. What is tested are their equalities: there is no published"
    " figure to set beside ours.",
    settings={
        "smoke": Sizes(seeds=2, data="mnist5k", steps=8, interval=4, widths=(8,), beside=(PLAIN,)),
        "cpu": Sizes(seeds=10, data="mnist5k", steps=2000, interval=50),
        "full": Sizes(seeds=10, data="mnist", steps=5000, interval=50, widths=(256, 256, 256)),
    },
    stages=stages,
    claims=[
        rounding(
            "A fixed rate with decay is an exponentially growing rate without.",
            lambda r: apart(r, GROWING).max("step"), source="Li and Arora 2020",
            standalone="With batch norm a fixed rate with weight decay is an exponentially growing rate without.",
        ),
        rounding(
            "Decay acts through the effective rate alone: replay it without decay, and the network is the same.",
            lambda r: apart(r, REPLAYED).max("step"), source="van Laarhoven 2017; Hoffer et al. 2018",
            standalone="With batch norm weight decay acts through the effective rate alone: replay it without decay,"
            " and the network is the same.",
        ),
        rounding(
            "With the effective rate held at that without decay, decay changes nothing.",
            lambda r: apart(r, HELD).max("step"), source="van Laarhoven 2017",
            standalone="With batch norm and the effective rate held at that without decay, weight decay changes"
            " nothing.",
        ),
        Claim(
            "Decay keeps up the effective rate, which falls without it.",
            Compared(lambda r: final(at(r.effective_rate)), DECAY, NONE, ratio=True),
            measures="effective rate at the end, float64", unit="times the effective rate", above=2.0,
            source="van Laarhoven 2017",
            standalone="With batch norm weight decay keeps up the effective rate, which falls without it.",
        ),
        differs(
            "Left out and not replaced, decay is missed.", lambda r: final(apart(r, NONE)),
            standalone="With batch norm weight decay that is left out and not replaced is missed: the outputs differ.",
        ),
        differs(
            "Without batch norm, decay is no growing rate.", lambda r: final(apart(r, GROWING, PLAIN)),
            standalone="Without batch norm weight decay is no exponentially growing rate.",
        ),
        differs(
            "Where scale, bias and the last layer decay too, decay is more than a rate.",
            lambda r: final(apart(r, GROWING, WHOLE)),
            standalone="Where batch norm's scale and bias and the last layer decay too, weight decay is more than a"
            " rate.",
        ),
        Claim(
            "In float32 growing rate and decay stay together for as long as rounding lets any two runs.",
            Compared(lasting, GROWING, NUDGED, ratio=True),
            measures=f"steps until outputs are {PARTED:g} apart in float32, at most all",
            unit="times the steps", above=0.5,
            standalone="With batch norm, in float32, an exponentially growing rate and weight decay stay together for"
            " as long as rounding lets any two runs.",
        ),
        Claim(
            "In float32 the growing rate learns as well as decay while its numbers are in range.",
            Compared(lambda r: final(at(r.accuracy, precision=SINGLE)).sel(decay=[WEAK, STRONG]), GROWING, DECAY),
            measures="final test accuracy, normalized by the test images", unit="of test accuracy", equal=0.01,
            source="Li and Arora 2020",
            standalone="With batch norm, in float32, an exponentially growing rate learns as well as weight decay"
            " while its numbers are in range.",
        ),
        Claim(
            "Float32 ends the growing rate when the rate exceeds its largest number, 3.4e38.", float32_ends,
            measures="first measured step with a loss that is not finite, over the step forecast", ratio=True,
            unit="times the forecast", equal=0.1,
            standalone="Float32 ends an exponentially growing rate when the rate exceeds its largest number, 3.4e38.",
        ),
    ],
    tables=[
        table_of(
            "Distance of outputs at the end from those with decay (of 'held rate': from those without)", cases,
            rows=["case", "decay"], columns="arm", form=".1g",
            note="0: equal; about 0.7: unrelated; 1: one of them is not finite.",
        ),
        table_of(
            "Weights free in size, float64, at the end", lambda r: final(at(r[FIGURES])).to_dataarray("figure"),
            rows=["decay", "arm"], columns="figure", form=".3g",
            note="Size and effective rate: geometric means over the units. Accuracies are on test, normalized by the"
            " test images themselves and by running statistics.",
        ),
        table_of(
            f"Steps in float32 until outputs are {PARTED:g} apart from those with decay, at most all",
            lambda r: lasting(r).sel(arm=[GROWING, REPLAYED, NUDGED, NONE]), rows=["decay"], columns="arm", form=".0f",
        ),
    ],
    pictures=[
        panels(
            partial(
                shown, "size", legend=True, title="Without decay the weights may grow ...",
                ylabel="size of a unit's weights, |w|",
            ),
            partial(
                shown, "effective_rate", legend=False, title="... at the effective rate of decay ...",
                ylabel="effective learning rate, rate / |w|$^2$",
            ),
            draw_apart, file="effective_rate.png", size=(5.2, 4.2),
            title="What does weight decay do below batch norm, where the size of the weights has no effect?",
            caption=f"Decay {STRONG:g}, rate {RATE:g}. 'growing rate' and 'replayed rate' have no decay: their weights"
            " grow, but their effective rates are those with decay, and so are their outputs. Right: 0 is equal, 0.7"
            " unrelated; 'nudged' is decay once more, from weights that differ in their last digit: in float32 rounding"
            " drives any two runs apart. Lines: means over seeds; bands: their range.",
        )
    ],
)  # fmt: skip
