"""How far does a network get that learns nothing but the scales and biases of its batch norm?

Protocol: residual network (option A) of 8 layers with 8, 16 and 32 filters, on digits of 14 x 14 (means of 2 x 2
pixels); He-normal weights, scales uniform on [0, 1] and biases 0, as in the source's code. Batch 64, momentum 0.9, the
rate divided by 10 after half and three quarters of the steps. The arms train everything (19,074 parameters); scales and
biases alone (240); as many weights of the convolutions, two drawn at random for each filter; or the last layer alone
(330). The rest stays at its random start. Each arm's rate is chosen on validation by the same search: 0.03, 0.1, 0.3,
one seed each, and one more beyond an end where the best of an arm lies, twice at most. A feature counts as switched off
where |scale| < 0.01; those scales are then set to 0, to see whether the network misses them. The source trains for
62,400 steps with weight decay 1e-4, which would hardly be felt in a short run: decay is stronger by as much as the run
is shorter. One more arm trains scales and biases without it, to tell what is learned from what decays.

`python -m experiments run affine_only` took eleven minutes on two cores with other work beside it (600 steps, 6 seeds,
5,000 digits). By a pilot that is enough for all claims but the three that compare arms, which would need 11 to 21.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from jax import Array
from matplotlib.axes import Axes

import jaxbn
from experiments.framework.claim import Claim, Compared
from experiments.framework.experiment import WHAT_IT_IS, Experiment, Grid, Search, Settings, Stage
from experiments.framework.pictures import lines, palette, panels
from experiments.framework.results import final, stage_results
from experiments.framework.search import search
from experiments.framework.tables import table_of
from experiments.training import data, loop, models, partly, resnet

BATCH_SIZE = 64
ALL, AFFINE, BARE = "everything", "scale and bias", "scale and bias, no decay"
RANDOM, LAST = "random weights", "last layer"
ARMS = (ALL, AFFINE, BARE, RANDOM, LAST)
SEARCH = Search("rate", (0.03, 0.1, 0.3), seeds=1)
OFF = 0.01  # |scale| of a feature that counts as switched off
PUBLISHED_OFF, SOURCE_STEPS = 1 / 3, 62_400
CHANCE = 0.1
FIGURES = ["rate", "validation_accuracy", "test_accuracy", "off", "accuracy_without", "silent"]
PER_FILTER = 2  # weights drawn at random: as many as there are scales and biases
NORM = jaxbn.batch_norm(decay=0.9, scale_init=jax.nn.initializers.uniform(1.0))


@dataclass(frozen=True, kw_only=True)
class Sizes(Settings):
    """And the network, whether images are halved in size, and weight decay."""

    depth: int = 8
    width: int = 8
    stages: int = 3
    halved: bool = True
    decay: float = 1e-4


def network_of(settings: Sizes, norm: jaxbn.Normalizer) -> models.Network:
    """The residual network, on halved images or whole ones."""
    how = {"width": settings.width, "stages": settings.stages, "convolve": resnet.patch_convolve}
    network = resnet.small_resnet(settings.depth, norm, **how)
    seen = models.pool2x2 if settings.halved else lambda x: x

    def apply(variables: dict, x: Array, *, train: bool) -> tuple[Array, dict]:
        return network.apply(variables, seen(x), train=train)

    return models.Network(lambda key, x: network.init(key, seen(x)), apply)


@cache
def task(settings: Sizes) -> loop.Task:
    """One program for all arms: a run's "marks" say which params move."""
    network = network_of(settings, NORM)

    def optimizer(run: dict) -> optax.GradientTransformation:
        dropped = {settings.steps // 2: 0.1, settings.steps * 3 // 4: 0.1}
        rate = optax.piecewise_constant_schedule(run["rate"], dropped)
        decayed = optax.add_decayed_weights(run["decay"])
        return optax.chain(decayed, partly.moving(run["marks"]), optax.sgd(rate, momentum=0.9))

    return loop.Task(
        lambda run, key, x: network.init(key, x), network.apply, optimizer, metrics=partial(features, settings)
    )


def features(settings: Sizes, run: dict, state: dict, arrays: dict) -> dict[str, Array]:
    """The share of features that are off, and of those below a ReLU that are silent; accuracy without those off."""

    def greatest(variables: dict, x: Array, *, train: bool) -> tuple[Array, Array]:
        y, _ = NORM.apply(variables, x, train=train)
        return y, jnp.max(y, range(y.ndim - 1))

    def switched_off(scale: Array) -> Array:
        return jnp.where(jnp.abs(scale) < OFF, 0, scale)

    # With each layer's greatest outputs in the place of its running statistics, the network returns them.
    showing = network_of(settings, jaxbn.Normalizer(NORM.init, greatest)).apply
    variables, params = state["variables"], state["variables"]["params"]
    norms = {unit: params[unit]["norm"] for unit in params if unit != "head"}
    _, tops = showing(variables, data.pixels(arrays["test_images"]), train=False)
    below_relu = jnp.concatenate([tops[unit] for unit in norms if not unit.endswith("conv2")])
    without = {u: {**params[u], "norm": {**norm, "scale": switched_off(norm["scale"])}} for u, norm in norms.items()}
    variables = {**variables, "params": {**without, "head": params["head"]}}
    accuracy = loop.accuracy(network_of(settings, NORM).apply, variables, arrays["test_images"], arrays["test_labels"])
    size = jnp.abs(jnp.concatenate([norm["scale"] for norm in norms.values()]))
    return {"off": jnp.mean(size < OFF), "silent": jnp.mean(below_relu <= 0), "accuracy_without": accuracy}


def marks_of(arm: str, seed: int, params: dict) -> dict:
    """Marks of what an arm trains."""
    if arm == RANDOM:
        return partly.mark_at_random(params, lambda path: "kernel" in path and "head" not in path, PER_FILTER, seed)
    part = {ALL: "", AFFINE: "norm/", BARE: "norm/", LAST: "head/"}[arm]
    return partly.mark(params, lambda path: part in path)


def train(settings: Sizes, stage: str, program: Mapping, runs: Sequence[dict]) -> list[dict]:
    """Train runs of one arm; the rows that a grid would record."""
    arm, arrays = program["arm"], loop.on_device(data.load(settings.data))
    schedule = loop.Schedule(settings.steps, settings.interval, BATCH_SIZE)

    def further(seed: int, params: dict) -> dict:
        return {"marks": marks_of(arm, seed, params), "decay": np.float32(0 if arm == BARE else settings.decay)}

    return partly.train(task(settings), schedule, arrays, stage, runs, partial(begun, settings), further)


@cache
def begun(settings: Sizes, seed: int) -> dict:
    """The state of a run before its first step: neither arm nor rate plays a part."""
    images = loop.on_device(data.load(settings.data))["test_images"]
    run = {"seed": seed, "rate": 0.0, "decay": 0.0, "marks": None}
    return jax.device_get(loop.init_run(task(settings), images, run))


def measured(settings: Sizes) -> xr.Dataset:
    """Every metric [arm, seed, step] at the rate that was best on validation, and that "rate" [arm, seed]."""
    chosen = search(Grid(task, BATCH_SIZE, {"arm": ARMS}, search=SEARCH), partial(train, settings))
    parts = []
    for arm in ARMS:
        runs = [{"seed": seed, "rate": float(chosen.sel(arm=arm))} for seed in settings.every_seed]
        parts.append(stage_results(train(settings, arm, {"arm": arm}, runs), ()).expand_dims(arm=[arm]))
    return xr.concat(parts, "arm")


def at_end(name: str, arm: str, r: xr.Dataset) -> xr.DataArray:
    """A metric of one arm after the last step."""
    return final(r[name]).sel(arm=arm, drop=True)


def accuracy(r: xr.Dataset) -> xr.DataArray:
    """Test accuracy after the last step."""
    return final(r.test_accuracy)


def draw_accuracy(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """Test accuracy of every arm along the steps."""
    lines(ax, r.test_accuracy, x="step", hue="arm", style="arm", palette=palette(ARMS))
    ax.axhline(CHANCE, color="gray", linestyle=":", label="chance")
    ax.set(xlabel="training step", ylabel="test accuracy", ylim=(0, 1.02), title="What is trained, and how far it gets")
    ax.legend(frameon=False, fontsize=8)


def draw_off(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """The share of features that are switched off, where scales are trained."""
    arms = [ALL, AFFINE, BARE]
    lines(ax, r.off.sel(arm=arms), x="step", hue="arm", style="arm", palette=palette(ARMS))
    ax.axhline(PUBLISHED_OFF, color="gray", linestyle=":", label="published: about a third")
    ax.set(xlabel="training step", ylabel=f"share of features with |scale| < {OFF:g}", ylim=(0, None))
    ax.set_title("Features switched off")
    ax.legend(frameon=False, fontsize=8)


EXPERIMENT = Experiment(
    title="Scale and bias alone teach a random network, and switch off a third of its features.",
    question="How far does a network get that learns nothing but the scales and biases of its batch norm?",
    source="Frankle, Schwab and Morcos 2021",
    citation="Frankle, Schwab and Morcos 2021 (preprint 2020), Training BatchNorm and only BatchNorm: on the expressive"
    " power of random features in CNNs.",
    theme=WHAT_IT_IS,
    answer={
        "cpu": "Part of the way: with everything else left at random, scales and biases of a residual network of 8"
        " layers came to 59% of the digits without weight decay and 32% with it, as many convolution weights to 16%,"
        " all weights to 96%. The 30% of features that ended up switched off were so by weight decay; without it 3%"
        " were.",
    },
    surprise="Where scales and biases alone are trained, a third of the features is said to be switched off, by"
    " learning. In our small network weight decay did it: without decay 3% were switched off (1% to 4%), and the"
    " network named 59% of the digits instead of 32%.",
    reader_questions={
        "Can a network learn with batch norm's scales and biases alone?": "In part: in a residual network of 8 layers"
        " at random weights they came to 32% of the digits with weight decay and 59% without, where all weights came"
        " to 96%, the last layer alone to 38% and as many weights of the convolutions to 16%. The 82% of the source is"
        " of networks that are very deep, on CIFAR-10.",
    },
    differs="The source trains residual networks of 14 to 866 layers for CIFAR-10 (and ImageNet) over 160 epochs, with"
    " rate 0.1 and projections as shortcuts; ours is small and sees digits. Its weight decay is scaled to the length of"
    " the run, and rates are searched for.",
    settings={
        "smoke": Sizes(seeds=2, data="mnist5k", steps=4, interval=4, depth=4, width=2, stages=1),
        "cpu": Sizes(seeds=6, data="mnist5k", steps=600, interval=100, decay=1e-4 * SOURCE_STEPS / 600),
        "full": Sizes(seeds=5, data="cifar10", steps=SOURCE_STEPS, interval=780, depth=110, width=16, halved=False),
    },
    stages=lambda settings: [Stage("training", partial(measured, settings))],
    claims=[
        Claim(
            "Scale and bias alone learn far above chance.", partial(at_end, "test_accuracy", AFFINE),
            measures="test accuracy of scale and bias after the last step (chance: 0.1)", unit="of test accuracy",
            above=0.5, precision=0.1,
            standalone="Batch norm's scale and bias alone learn far above chance in a network of random weights.",
        ),
        Claim(
            "They get further than as many weights drawn at random.", Compared(accuracy, AFFINE, RANDOM),
            measures="final test accuracy", unit="of test accuracy", above=0.1,
            standalone="Batch norm's scales and biases alone get further than as many weights drawn at random.",
        ),
        Claim(
            "They get further than the last layer.", Compared(accuracy, AFFINE, LAST),
            measures="final test accuracy", unit="of test accuracy", above=0.0, precision=0.05,
            standalone="Batch norm's scales and biases alone get further than the last layer alone.",
        ),
        Claim(
            "They do not get as far as all weights together.", Compared(accuracy, ALL, AFFINE),
            measures="final test accuracy", unit="of test accuracy", above=0.0, precision=0.02,
            standalone="Batch norm's scales and biases alone do not get as far as all weights together.",
        ),
        Claim(
            "About a third of the features is switched off.",
            lambda r: at_end("off", AFFINE, r) - PUBLISHED_OFF,
            measures=f"share of features with |scale| < {OFF:g} where scale and bias alone are trained, minus a third",
            unit="of the features", equal=0.1,
            standalone="Where batch norm's scale and bias alone are trained, about a third of the features is switched"
            " off.",
        ),
        Claim(
            "It is learned: without weight decay, too, features are switched off.", partial(at_end, "off", BARE),
            measures=f"share of features with |scale| < {OFF:g}, scale and bias alone, no decay",
            unit="of the features", above=PUBLISHED_OFF - 0.1,
            standalone="Where scale and bias alone are trained, features are switched off by learning: they are"
            " without weight decay, too.",
        ),
        Claim(
            "Where everything is trained, few features are switched off.", partial(at_end, "off", ALL),
            measures=f"share of features with |scale| < {OFF:g}", unit="of the features", below=0.1,
            standalone="Where all of a network is trained, few of batch norm's features are switched off.",
        ),
        Claim(
            "The network does not miss the features that are switched off.",
            lambda r: at_end("accuracy_without", AFFINE, r) - at_end("test_accuracy", AFFINE, r),
            measures="test accuracy with their scales set to 0, minus that with their scales as they are",
            unit="of test accuracy", equal=0.01,
            standalone="A network of which scale and bias alone were trained does not miss the features that are"
            " switched off.",
        ),
    ],
    tables=[
        table_of(
            "After the last step", lambda r: final(r[FIGURES]).to_dataarray("figure"), rows=["arm"], columns="figure",
            form=".3g",
            note=f"'off': share of features with |scale| < {OFF:g}; scales start uniform on [0, 1]. 'accuracy_without':"
            " on test, those scales set to 0. 'silent': share of the features below a ReLU that are 0 on all test"
            " images. 'rate': chosen on validation. Published for CIFAR-10: 82% test accuracy with scale and bias alone"
            " in deep enough networks, about a third off.",
        )
    ],
    pictures=[
        panels(
            draw_accuracy, draw_off, file="affine_only.png", size=(5.6, 4.2),
            title="How far does a random network get that learns nothing but scale and bias?",
            caption="The rest of each network stays as it was drawn at random. 'random weights' are as many as there"
            " are scales and biases. Lines: means over seeds; bands: their range. Published: CIFAR-10, deep networks.",
        )
    ],
)  # fmt: skip
