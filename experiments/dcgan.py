"""Does a GAN need batch norm to make digits? DCGAN with and without, at the same budget.

Protocol (Radford, Metz and Chintala 2016): noise of 100 numbers, uniform on +-1; generator 4 x 4 to 32 x 32 in three
doublings (ReLU, tanh), discriminator its mirror image (leaky ReLU, 0.2); weights normal with deviation 0.02; Adam at
0.0002 with beta1 0.5; cross-entropy, the generator's in the form that does not saturate. Batch norm in both players but
for the generator's output and the discriminator's first layer; real and made images are normalized apart. Both players
take a step at each batch. The arms of a seed start from the same draw, and see the same digits and the same noise.

Samples are compared with the test digits in the 32 features of a classifier trained here: the Frechet distance, whose
value depends on the classifier (it is not FID); how many of the ten digits it is sure of in 2% of the samples; how much
the samples vary. All but one column of the second table are made by the statistics of their batch.

The controls: He's weights, with which the signal keeps its size without batch norm (a deviation of 0.02 suits the
published width and is far too small for networks this narrow); batch norm in one player alone; five times the rate,
with and without.

No pilot: the seeds are fixed at 5 (3 in `cpu`). `python -m experiments run dcgan` takes about a quarter of an hour on
two cores: width 8, batch 64, 1,200 steps, 61,682 parameters in the generator and 10,994 in the discriminator. `--preset
gpu` takes about five minutes on one GPU: width 32, batch 128, 2,000 steps, 369,602 and 166,850 parameters.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from experiments.framework.claim import Claim, Compared
from experiments.framework.experiment import WHEN_IT_HELPS, Drawn, Experiment, Settings, Stage
from experiments.framework.pictures import COLORS, figure, finish, lines, panels
from experiments.framework.results import final, side_by_side
from experiments.framework.tables import table_of
from experiments.framework.thumbnails import pack, strip, unpack
from experiments.topics import SAMPLES
from experiments.training import adversarial, data, feature_distance, loop
from experiments.training.adversarial import arm

BOTH = {"generator": True, "discriminator": True}
PLAIN, HE, HE_FAST = "plain", "plain, He's weights", "plain, He's weights, rate 0.001"
NORM, NORM_HE, NORM_FAST = "batch norm", "batch norm, He's weights", "batch norm, rate 0.001"
MAKING, JUDGING = "batch norm, generator only", "batch norm, discriminator only"
EVERYWHERE, BARE = "batch norm, every layer", "batch norm, no scale or bias"
ARMS = {
    PLAIN: arm(),
    HE: arm(he=True),
    HE_FAST: arm(he=True, rate=1e-3),
    MAKING: arm(generator=True),
    JUDGING: arm(discriminator=True),
    EVERYWHERE: arm(**BOTH, ends=True),
    NORM: arm(**BOTH),
    BARE: arm(**BOTH, affine=False),
    NORM_HE: arm(**BOTH, he=True),
    NORM_FAST: arm(**BOTH, rate=1e-3),
}
RUNS = {name: np.array([one[name] for one in ARMS.values()], np.float32) for name in ARMS[PLAIN]}
SHOWN = (PLAIN, HE, MAKING, JUDGING, NORM)
LOOKS = {**COLORS, HE: "#e69f00", MAKING: "#009e73", JUDGING: "#cc79a7"}
IN_A_ROW, SHAPE = 12, loop.USUAL_SHAPE[:2]
REAL = "real digits (validation)"
FIGURES = ("distance", "digits", "variety", "sure")
XIANG = "Xiang and Li 2017, abstract"


@dataclass(frozen=True, kw_only=True)
class Sizes(Settings):
    """And the width of both players, examples a step, samples that are judged, steps of the classifier."""

    width: int = 8
    batch: int = 64
    samples: int = 1000
    classifier_steps: int = 1500


def stages(settings: Sizes) -> Iterable[Stage]:
    """The classifier, then the GANs seed by seed."""
    yield Stage("classifier", lambda: real_digits(settings))
    for seed in settings.every_seed:
        yield Stage(f"seed {seed}", partial(trained, settings, seed))


@cache
def seen_of_test(settings: Sizes) -> feature_distance.Seen:
    """What the classifier sees in the test digits."""
    return seen(settings, data.pixels(data.load(settings.data).test_images))


def seen(settings: Sizes, images: np.ndarray | jax.Array) -> feature_distance.Seen:
    """What it sees in these."""
    look = feature_distance.classifier(settings.data, settings.classifier_steps)
    return feature_distance.in_batches(look, images)


def real_digits(settings: Sizes) -> xr.Dataset:
    """The classifier's accuracy on test, and validation digits, as many as samples where there are, as if made."""
    digits, real = data.load(settings.data), seen_of_test(settings)
    count = len(digits.validation_images)
    some = digits.validation_images[data.spread(min(settings.samples, count), count)]
    found = feature_distance.compared(seen(settings, data.pixels(some)), real)
    shown = digits.test_images[data.spread(IN_A_ROW, len(digits.test_images)), ..., 0] / 255
    right = np.mean(real.probabilities.argmax(-1) == digits.test_labels)
    measured = {f"real_{name}": found[name] for name in FIGURES}
    return xr.Dataset({"classifier_accuracy": right, "real_images": pack(shown), **measured})


def measured(settings: Sizes, seed: int, variables: dict, train: bool) -> dict[str, np.ndarray]:
    """FIGURES of every arm, [arms], and its first images."""
    how = {"batches": -(-settings.samples // settings.batch), "batch_size": settings.batch}
    made = adversarial.samples(variables, RUNS, seed, **how, train=train)[:, : settings.samples]
    each = [feature_distance.compared(seen(settings, images), seen_of_test(settings)) for images in made]
    found = {name: np.round([one[name] for one in each], 5) for name in FIGURES}
    return found | {"images": np.asarray(made[:, :IN_A_ROW, ..., 0])}


def trained(settings: Sizes, seed: int) -> xr.Dataset:
    """All arms of one seed: FIGURES [arm, step], those by running averages [arm], losses, images of the first seed."""
    arrays, found = loop.on_device(data.load(settings.data)), []
    states = adversarial.start(RUNS, seed, settings.width)
    for step in range(0, settings.steps, settings.interval):
        drawn = loop.draw(jnp.asarray([seed]), step, settings.interval, settings.batch, len(arrays["train_labels"]))
        states, losses = adversarial.advance(states, RUNS, arrays, seed, step, drawn[0])
        found.append({**measured(settings, seed, states["variables"], True), "losses": np.round(losses, 4)})
    running = measured(settings, seed, states["variables"], False)
    losses = np.stack([one["losses"] for one in found], 1)
    variables = {name: (("arm", "step"), np.stack([one[name] for one in found], 1)) for name in FIGURES}
    variables |= {f"{name}_running": ("arm", running[name]) for name in FIGURES}
    variables |= {f"{name}_loss": (("arm", "step"), losses[..., n]) for n, name in enumerate(adversarial.PLAYERS)}
    axes = {"arm": list(ARMS), "step": np.arange(settings.interval, settings.steps + 1, settings.interval)}
    result = xr.Dataset(variables, axes).expand_dims(seed=[seed])
    shown = {"images": ("arm", list(map(pack, np.nan_to_num(found[-1]["images"]))))}
    return result.assign(shown) if seed == settings.first_seed else result


def distance(r: xr.Dataset) -> xr.DataArray:
    """From samples to test digits, after the last step."""
    return final(r.distance)


def early(r: xr.Dataset) -> xr.DataArray:
    """The same at the first measurement."""
    return r.distance.isel(step=0, drop=True)


def digits(r: xr.Dataset) -> xr.DataArray:
    """How many of the ten digits are made."""
    return final(r.digits)


def with_real(r: xr.Dataset, name: str) -> xr.DataArray:
    """One of FIGURES after the last step, with that of real digits that no network was trained on."""
    real = r[f"real_{name}"].expand_dims(arm=[REAL], seed=r.seed)
    return xr.concat([real.rename(name), final(r[name])], "arm")


def two_ways(r: xr.Dataset) -> xr.DataArray:
    """The distance by running averages over that by the statistics of the batch."""
    return (r.distance_running / distance(r)).sel(arm=NORM)


def draw_samples(settings: Sizes, r: xr.Dataset) -> Drawn:
    """Samples of every arm of the first seed, below real digits."""
    drawn, axes = figure(len(ARMS) + 1, size=(10, 0.5))
    strip(axes[0, 0], unpack(str(r.real_images.item()), SHAPE), "real digits")
    for ax, name in zip(axes[1:, 0], ARMS, strict=True):
        made, far = (float(values.sel(arm=name).mean()) for values in (digits(r), distance(r)))
        images = unpack(str(r.images.sel(arm=name).item()), SHAPE)
        strip(ax, images, name, f"{made:.1f} digits, distance {far:.2g}")
    return finish(
        drawn, "samples.png", "Does a GAN need batch norm to make digits?",
        f"The first {IN_A_ROW} samples of one seed after {settings.steps:,} steps, nothing chosen. Beside them, mean of"
        f" {settings.seeds} seeds: how many of the ten digits are made, and the distance from test digits in the"
        f" features of a classifier trained here. Data: {settings.data}.",
    )  # fmt: skip


def draw_distance(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """The distance along training, with that of real digits."""
    lines(ax, r.distance.sel(arm=list(SHOWN)), x="step", hue="arm", style="arm", palette=LOOKS)
    ax.axhline(float(r.real_distance), color="black", linestyle=":", label="real digits")
    ax.set(yscale="log", xlabel="training step", ylabel="distance from test digits", title="How far samples are")
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(0, 0.3))


def draw_variety(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """The variance of the samples along training."""
    lines(ax, r.variety.sel(arm=list(SHOWN)), x="step", hue="arm", style="arm", palette=LOOKS, legend=False)
    ax.axhline(1.0, color="black", linestyle=":")
    ax.set(
        xlabel="training step",
        ylabel="variance / variance of test digits",
        title="How much they vary: 0 = all alike",
    )


nearer = partial(
    Claim, measures="distance of samples from test digits after the last step", unit="times the distance", below=0.8
)
farther = partial(nearer, below=None, above=1.0, precision=0.1)
over = partial(Compared, distance, ratio=True)

EXPERIMENT = Experiment(
    title="A DCGAN needs batch norm to make varied digits.",
    question="Does a GAN need batch norm to make digits?",
    source="Radford, Metz and Chintala 2016, sections 3, 4 and 8.1; Xiang and Li 2017",
    citation="Alec Radford, Luke Metz and Soumith Chintala: Unsupervised Representation Learning with Deep"
    " Convolutional Generative Adversarial Networks. ICLR 2016. Sitao Xiang and Hao Li: On the Effects of Batch and"
    " Weight Normalization in Generative Adversarial Networks. arXiv 1704.03971, 2017.",
    theme=WHEN_IT_HELPS,
    answer={
        "gpu": "Yes: with batch norm the Frechet distance of a DCGAN's samples from real digits was an eighth of that"
        " without, a quarter where the plain GAN starts from He's weights and 0.57 where both do, and 9.8 of the ten"
        " digits were made instead of 3.8. Both networks need it, but in the generator's output and the"
        " discriminator's input it ruins the samples.",
        "cpu": "Three seeds of a narrow DCGAN after 1,200 steps do not tell: the Frechet distance of samples from real"
        " digits was 36 with batch norm, 64 without (all samples were black), and 17 without it from He's weights. At"
        " five times the rate it was 7.9 with batch norm and 9.8 without it from He's weights, a difference that is"
        " open too.",
    },
    surprise="The DCGAN paper finds a learning rate of 0.001 too high and takes 0.0002. With batch norm our samples"
    " were nearer to real digits at 0.001: the Frechet distance was half in the wider GAN (0.46 to 0.51) and a fifth"
    " in the narrow one (0.15 to 0.33).",
    reader_questions={
        "Why does a GAN need batch norm?": "In part because its initial weights are too small: He's weights alone"
        " halved the Frechet distance of our wider DCGAN's samples from real digits (0.53, 0.35 to 0.78), and where"
        " both start from them batch norm brought it down to 0.57 of that (0.45 to 0.73). Whether it helps against"
        " He's weights at five times the rate, five seeds do not tell: two such GANs made samples that were all alike,"
        " the other three came to distances of 5.4 to 8.4, and batch norm has 2.9.",
        "Which of the two networks of a GAN needs batch norm?": "Both, in our wider DCGAN (in the narrow one three"
        " seeds do not tell). In the discriminator alone the Frechet distance of samples from real digits was 3.5"
        " times that of both (3.1 to 4.0), in the generator alone 19 times, and all samples were alike.",
        "Should a GAN's samples be made with batch statistics or running averages?": "In our DCGAN it made little"
        " difference: the Frechet distance from real digits was 1.07 times as large with running averages (1.00 to"
        " 1.14). Whether that is within 10%, which we would call equal, five seeds do not tell.",
        "Is a learning rate of 0.001 too high for a GAN?": "Not with batch norm: the Frechet distance of our samples"
        " from real digits was half that at the published 0.0002 in the wider DCGAN, and a fifth in the narrow one."
        " Without it, from He's weights, two of five of the wider ones collapsed at 0.001.",
    },
    differs="The sources make photographs of 64 x 64 pixels, in networks 4 (gpu) or 16 (cpu) times as wide, and judge"
    " them by eye, by classifiers or by reconstruction, so no published figure stands beside ours. Both players take a"
    " step at each batch, where the released code lets them take turns. Xiang and Li's claims are about a plain network"
    " of their own (PReLU, RMSProp); here they are judged on DCGAN's, from He's weights.",
    settings={
        "smoke": Sizes(
            seeds=2, data="mnist5k", steps=4, interval=2, width=2, batch=16, samples=64, classifier_steps=20
        ),
        "cpu": Sizes(seeds=3, data="mnist", steps=1200, interval=150),
        "gpu": Sizes(seeds=5, data="mnist", steps=2000, interval=200, width=32, batch=128, samples=2000),
        "full": Sizes(seeds=5, data="mnist", steps=40_000, interval=2000, width=128, batch=128, samples=10_000),
    },
    stages=stages,
    claims=[
        nearer(
            "A GAN makes better digits with batch norm, as published.", over(NORM, PLAIN), dispute=SAMPLES,
            standalone="A DCGAN makes better digits with batch norm, as published, than without.",
        ),
        nearer(
            "It does so where the plain one starts from He's weights too.", over(NORM, HE), dispute=SAMPLES,
            standalone="A DCGAN makes better digits with batch norm than a plain one that starts from He's weights.",
        ),
        nearer(
            "It does so where both start from He's weights.", over(NORM_HE, HE), dispute=SAMPLES,
            standalone="A DCGAN makes better digits with batch norm than without where both start from He's weights.",
        ),
        nearer(
            "It does so where the plain one, from He's weights, has five times the rate.", over(NORM, HE_FAST),
            standalone="A DCGAN makes better digits with batch norm than a plain one, from He's weights, at five times"
            " the rate.",
        ),
        nearer(
            "Part of what batch norm mends is the start: He's weights help the plain GAN.", over(HE, PLAIN),
            standalone="Part of what batch norm mends in a DCGAN is the start: He's weights help the plain one.",
        ),
        Claim(
            "Without batch norm the generator collapses all samples to a single point.",
            lambda r: final(r.variety).sel(arm=PLAIN),
            measures="variance of the samples' features over that of test digits, plain", unit="of the variance",
            below=0.1,
            standalone="Without batch norm the generator of a DCGAN collapses all samples to a single point.",
        ),
        Claim(
            "With batch norm all ten digits are made.", lambda r: digits(r).sel(arm=NORM),
            measures="digits that the classifier is sure of in 2% of the samples", unit="digits", above=9.5,
            standalone="With batch norm a DCGAN makes all ten digits.",
        ),
        Claim(
            "With batch norm more of the digits are made.", Compared(digits, NORM, PLAIN),
            measures="digits that the classifier is sure of in 2% of the samples", unit="digits", above=1.0,
            standalone="With batch norm a DCGAN makes more of the ten digits than without.",
        ),
        nearer(
            "The generator needs it: in the discriminator alone it does not do.", over(NORM, JUDGING),
            standalone="The generator of a DCGAN needs batch norm: in the discriminator alone it does not do.",
        ),
        nearer(
            "The discriminator needs it: in the generator alone it does not do.", over(NORM, MAKING),
            standalone="The discriminator of a DCGAN needs batch norm: in the generator alone it does not do.",
        ),
        farther(
            "In every layer, output and input too, it does harm.", over(EVERYWHERE, NORM), above=1.25, precision=None,
            standalone="In every layer of a DCGAN, output and input too, batch norm does harm.",
        ),
        nearer(
            "Without scale and bias it is better.", over(BARE, NORM), below=1.0, precision=0.1,
            source="Radford, Metz and Chintala 2016, section 8.1",
            standalone="In a DCGAN batch norm is better without scale and bias.",
        ),
        farther(
            "A rate of 0.001 is too high.", over(NORM_FAST, NORM),
            standalone="For a DCGAN with batch norm a rate of 0.001 is too high.",
        ),
        nearer(
            "Batch norm is ahead at the beginning.", Compared(early, NORM, HE, ratio=True), source=XIANG,
            measures="distance of samples from test digits at the first measurement",
            standalone="At the beginning of training a DCGAN with batch norm is ahead of a plain one.",
        ),
        farther(
            "Batch norm makes the trained GAN worse.", over(NORM, HE), source=XIANG, dispute=SAMPLES,
            standalone="Batch norm makes a trained GAN worse.",
        ),
        Claim(
            "Samples made by running averages are as good as those made by the statistics of their batch.", two_ways,
            measures="distance of samples from test digits: running averages over the batch's statistics",
            unit="times the distance", ratio=True, equal=0.1, source="",
            standalone="A DCGAN's samples made by running averages are as good as those made by the statistics of"
            " their batch.",
        ),
    ],
    tables=[
        table_of(
            "Samples after the last step",
            lambda r: side_by_side({name: with_real(r, name) for name in FIGURES}),
            rows=["arm"], columns="figure", form={"distance": ".3g", "digits": ".1f", "variety": ".2f", "sure": ".2f"},
            note="Distance from test digits in the features of a classifier trained here; digits made, of ten; variance"
            " of the features over that of test digits; share of the samples that the classifier is sure of. It may be"
            " sure of a black image too, which then counts as a digit.",
        ),
        table_of(
            "Distance from test digits, by the statistics that the samples are made with",
            lambda r: side_by_side({"of the batch": distance(r), "running averages": r.distance_running}),
            rows=["arm"], columns="figure", form=".3g",
        ),
    ],
    pictures=[
        draw_samples,
        panels(
            draw_distance, draw_variety, file="distance.png",
            title="Do samples come nearer to real digits with batch norm?",
            caption="Line: mean of the seeds; band: their range. Left: Frechet distance in the features of a classifier"
            " trained here, lower is better; dotted: other real digits (validation). Right: dotted: test digits.",
        ),
    ],
)  # fmt: skip
