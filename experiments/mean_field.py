"""Does batch norm keep gradients from vanishing or exploding? At the start it makes them explode with depth.

Ioffe and Szegedy conjecture that batch norm leaves gradients their size on the way down. Yang et al. prove the
opposite for wide networks at the start: the squared gradient grows by a factor a layer that depends on the batch size
B and tends to pi / (pi - 1) = 1.467 with ReLU. Without the ReLU it is (B - 2) / (B - 3), which tends to 1.

Protocol: B real digits, 50 hidden layers of equal width, each `x -> relu(batch_norm(x)) W` without scale and bias,
weights Gaussian of variance 2 / width (He et al.); the loss is a random linear function of the output. Measured is the
mean square of the loss's gradient at the input of each layer's norm; growth is its factor per layer between layer 40
and layer 10, far from both ends. Every arm of a seed has the same weights and digits. The controls: the same weights
without norm; weights half and twice as large; the norm's statistics held constant in the backward pass; no activation;
tanh; a bias of 2 before the ReLU (close to linear); float64. Then steps of gradient descent on the digits' labels.

A first run of the same seeds had shown a growth 2% under the limit at the largest size. White noise in place of the
digits there was added after it, to see whether the digits are why; no claim rests on it.

`python -m experiments run mean_field` takes about four minutes on two cores. `full` has the source's 200 networks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from experiments.framework.claim import Claim, Compared
from experiments.framework.experiment import WHAT_IT_IS, Experiment, Settings, Stage
from experiments.framework.pictures import COLORS, lines, panels
from experiments.framework.tables import table_of
from experiments.topics import GRADIENTS
from experiments.training import data
from experiments.training.equal_layers import (
    BATCH,
    CONSTANT,
    LINEAR,
    NONE,
    RELU,
    TANH,
    Arm,
    flow_of_noise,
    flows,
    linear_rate,
    relu_rate,
    trained,
)

RATE_PER_EXAMPLE = 1e-5  # the source's rate is this times the batch size
LIMIT = np.pi / (np.pi - 1)
ARMS = {  # norm, activation, the weights' deviation over He's, bias before the activation
    "plain": Arm(NONE, RELU, 1.0, 0.0),
    "plain, weights halved": Arm(NONE, RELU, 0.5, 0.0),
    "plain, weights doubled": Arm(NONE, RELU, 2.0, 0.0),
    "batch norm": Arm(BATCH, RELU, 1.0, 0.0),
    "batch norm, weights halved": Arm(BATCH, RELU, 0.5, 0.0),
    "batch norm, weights doubled": Arm(BATCH, RELU, 2.0, 0.0),
    "statistics held constant": Arm(CONSTANT, RELU, 1.0, 0.0),
    "batch norm, bias 2": Arm(BATCH, RELU, 1.0, 2.0),
    "batch norm, tanh": Arm(BATCH, TANH, 1.0, 0.0),
    "batch norm, linear": Arm(BATCH, LINEAR, 1.0, 0.0),
}
SCALES = {"halved": ", weights halved", "doubled": ", weights doubled"}
PAIR = CONTROL, MAIN = ["plain", "batch norm"]
IOFFE = "Ioffe and Szegedy 2015, section 3.3"


@dataclass(frozen=True, kw_only=True)
class Sizes(Settings):
    """And the depth; the batches at `width`; the widths at the largest batch; width and batch of the controls."""

    depth: int = 50
    batches: tuple[int, ...]
    width: int
    widths: tuple[int, ...]
    control: tuple[int, int]
    steps: int = 10


def stages(settings: Sizes) -> Iterator[Stage]:
    """One for each size of network and batch, then white noise, the controls, float64 and the steps."""
    largest = max(settings.batches)
    sizes = [(settings.width, batch) for batch in settings.batches]
    sizes += [(width, largest) for width in settings.widths if width != settings.width]
    for size in sizes:
        yield Stage("width {}, batch {}".format(*size), partial(by_size, settings, size))
    yield Stage("white noise", partial(by_noise, settings, (settings.widths[-1], largest)))
    yield Stage("controls", partial(by_arm, settings))
    yield Stage("float64", partial(by_dtype, settings))
    yield Stage("steps", partial(by_step, settings))


def flows_of(settings: Sizes, arms: Sequence[str], size: tuple[int, int], **how: object) -> xr.DataArray:
    """What `flows` says of some of ARMS at one width and batch."""
    chosen = {arm: ARMS[arm] for arm in arms}
    return flows(chosen, data.load(settings.data), settings.every_seed, settings.depth, *size, **how)


def by_size(settings: Sizes, size: tuple[int, int]) -> xr.Dataset:
    """`size` [seed, arm, layer], at one width and batch."""
    return flows_of(settings, [MAIN], size).to_dataset(name="size").assign_coords(width=size[0], batch=size[1])


def by_noise(settings: Sizes, size: tuple[int, int]) -> xr.Dataset:
    """`noise` [seed, layer]: the largest size on white noise."""
    return flows_of(settings, [MAIN], size, measure=flow_of_noise).isel(arm=0, drop=True).to_dataset(name="noise")


def by_arm(settings: Sizes) -> xr.Dataset:
    """`control` [seed, arm, layer], and what the theory says of the one without an activation."""
    controls = flows_of(settings, list(ARMS), settings.control).to_dataset(name="control")
    return controls.assign(linear_theory=linear_rate(settings.control[1]))


def by_dtype(settings: Sizes) -> xr.Dataset:
    """`precise` [seed, arm, layer]: the controls' network in float64."""
    with jax.enable_x64(True):
        return flows_of(settings, PAIR, settings.control, dtype=jnp.float64).to_dataset(name="precise")


def by_step(settings: Sizes) -> xr.Dataset:
    """`steps` [seed, arm, step, layer]."""
    measure = partial(trained, steps=settings.steps, rate=RATE_PER_EXAMPLE * settings.control[1])
    return flows_of(settings, PAIR, settings.control, measure=measure).to_dataset(name="steps")


def growth(log_square: xr.DataArray) -> xr.DataArray:
    """Factor of the squared gradient per layer on the way down, between a fifth and four fifths of the depth."""
    depth = log_square.sizes["layer"]
    low, high = depth // 5, depth - depth // 5
    ends = log_square.sel(layer=[high, low])
    return np.exp(ends.diff("layer").isel(layer=0, drop=True) / (high - low)).rename("growth")


def control(r: xr.Dataset) -> xr.DataArray:
    """Growth of each arm."""
    return growth(r.control)


def largest_size(r: xr.Dataset) -> xr.DataArray:
    """Growth of the widest network with the largest batch."""
    return growth(r["size"].sel(arm=MAIN, drop=True).isel(width=-1, batch=-1, drop=True))


def by_batch(r: xr.Dataset) -> xr.DataArray:
    """Growth by batch, at the width at which all batches were measured."""
    found = r["size"].sel(arm=MAIN, drop=True)
    complete = found.notnull().all(["batch", "seed", "layer"])
    return growth(found.isel(width=complete.values.argmax(), drop=True))


def by_input(r: xr.Dataset) -> xr.DataArray:
    """Growth with the largest batch, by width, and on white noise at the widest: [input, width, seed]."""
    digits = growth(r["size"].sel(arm=MAIN, drop=True).isel(batch=-1, drop=True))
    noise = growth(r.noise).expand_dims(width=digits.width[-1:])
    return xr.concat([digits, noise], "input", join="outer").assign_coords(input=["digits", "white noise"])


def over_linear_theory(r: xr.Dataset) -> xr.DataArray:
    """Growth without an activation over the theory's."""
    return control(r).sel(arm="batch norm, linear", drop=True) / r.linear_theory


def by_scale(r: xr.Dataset, arm: str) -> xr.DataArray:
    """Growth of an arm with weights of half and of twice the size: [scale, seed]."""
    found = [control(r).sel(arm=arm + words, drop=True) for words in SCALES.values()]
    return xr.concat(found, "scale").assign_coords(scale=list(SCALES))


def steadier(r: xr.Dataset) -> xr.DataArray:
    """How much further from 1 the growth is without batch norm than with it, as a logarithm."""
    return abs(np.log(by_scale(r, CONTROL))) - abs(np.log(by_scale(r, MAIN)))


def spans(r: xr.Dataset) -> xr.DataArray:
    """Largest over smallest squared gradient of all layers."""
    return np.exp(r.steps.max("layer") - r.steps.min("layer")).rename("span")


def draw_layers(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """Squared gradient by layer over that of the last layer, at the start."""
    shown = r.control.sel(arm=["plain", "batch norm", "batch norm, linear"])
    shown = np.exp(shown - shown.isel(layer=-1)).rename("square")
    lines(ax, shown, x="layer", hue="arm", palette=SHADES, estimator="median")
    layers = np.array([1, settings.depth])
    ax.plot(layers, LIMIT ** (settings.depth - layers), ":", color="black", label="published: 1.467 per layer")
    ax.set(yscale="log", xlabel="layer (1 is next to the input)", ylabel="squared gradient / that of the last layer")
    ax.set(title=f"At the start, width {settings.control[0]}, batch {settings.control[1]}")
    ax.legend(frameon=False)


def draw_batches(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """Growth by batch, beside the theory's."""
    lines(
        ax,
        by_batch(r),
        x="batch",
        estimator="median",
        color=COLORS["batch norm"],
        marker="o",
        label=f"measured, width {settings.width}",
    )
    batches = np.geomspace(min(settings.batches), max(settings.batches))
    ax.plot(batches, relu_rate(batches), ":", color="black", label="published: theorem 8")
    ax.axhline(LIMIT, color="grey", linewidth=1, label="its limit, 1.467")
    ax.set(xscale="log", xlabel="batch size", ylabel="growth of the squared gradient per layer", title="By batch size")
    ax.set_xticks(settings.batches, map(str, settings.batches))
    ax.minorticks_off()
    ax.legend(frameon=False)


def draw_steps(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """Squared gradient by layer over the largest, before and after steps, with batch norm."""
    shown = r.steps.sel(arm=MAIN, step=[0, 1, settings.steps], drop=True)
    words = ["at the start", "after 1 step", f"after {settings.steps} steps"]
    shown = np.exp(shown - shown.isel(layer=-1)).rename("square").assign_coords(step=words)
    lines(ax, shown, x="layer", hue="step", palette=["#1f5fa8", "#e69f00", "#009e73"], estimator="median")
    ax.set(yscale="log", xlabel="layer (1 is next to the input)", ylabel="squared gradient / that of the last layer")
    ax.set(title="With batch norm, after steps on digits")
    ax.legend(frameon=False)


SHADES = {"plain": COLORS["plain"], "batch norm": COLORS["batch norm"], "batch norm, linear": "#56b4e9"}
BATCHES = (8, 16, 32, 64, 128, 256, 512)
PUBLISHED = xr.DataArray([relu_rate(batch) for batch in BATCHES], {"batch": list(BATCHES)}).expand_dims(arm=[MAIN])
per_layer = partial(Claim, unit="times per layer", ratio=True, measures="growth of the squared gradient per layer")

EXPERIMENT = Experiment(
    title="At the start batch norm makes gradients explode with depth: 1.467-fold a layer in a wide ReLU network.",
    question="Does batch norm keep the gradients of a deep network from vanishing or exploding?",
    source="Yang et al. 2019, theorems 8 and 9 and figures 1, 3 and 4",
    citation="Greg Yang, Jeffrey Pennington, Vinay Rao, Jascha Sohl-Dickstein and Samuel S. Schoenholz,"
    " A Mean Field Theory of Batch Normalization, ICLR 2019, arXiv:1902.08129.",
    theme=WHAT_IT_IS,
    answer={
        "cpu": "At the start batch norm does not: in a ReLU network the squared gradient grew 1.46-fold per layer on"
        " the way down (theory: 1.467), a hundred million times over 50 layers; without batch norm the same weights"
        " kept its size. But that growth is the same for every size of the weights, where without batch norm half or"
        " twice the size changes it 4-fold per layer.",
    },
    surprise="Batch norm's authors conjecture that it leaves gradients their size on the way down. At the start of a"
    " ReLU network it does the opposite: the squared gradient grew 1.46-fold per layer, a hundred million times over"
    " 50 layers, and the same weights without batch norm left it as it was.",
    reader_questions={
        "Does batch norm prevent vanishing and exploding gradients?": "Not at the start: every layer of batch norm and"
        " ReLU multiplied the squared gradient by about 1.46, because it takes the mean out and divides by what is"
        " left, which is small. It does prevent what weights of the wrong size would do, which is worse: without it,"
        " half or twice the right size changed the squared gradient 4-fold per layer.",
        "Why do deep networks with batch norm train although their gradients explode at the start?": "A layer with a"
        " huge gradient takes a huge step, its weights become long, and below batch norm long weights have a small"
        " gradient. After ten steps the lowest fifteen of our 50 layers no longer stood out; in the layers above the"
        " gradient still grew.",
        "Do smaller initial weights keep gradients from exploding with batch norm?": "No, batch norm takes the size of"
        " the weights out, and the growth per layer was the same to three digits with weights of half and twice the"
        " size. A bias of 2 before the ReLU, which makes it nearly linear, brought it from 1.46 down to 1.04.",
    },
    differs="Theirs: 200 networks of width 1,000 for the rates (figure 1). Here 5 networks a size; growth is measured"
    " in the network itself, between layers 10 and 40, where theirs is an eigenvalue. The size and data of their"
    " figure 3 (steps) are not given; its rate is assumed to be that of their figure 2, 1e-5 times the batch.",
    settings={
        "smoke": Sizes(
            seeds=2, data="mnist5k", depth=10, batches=(8, 32), width=64, widths=(64,), control=(64, 32), steps=2
        ),
        "cpu": Sizes(
            seeds=5, first_seed=10, data="mnist5k", batches=BATCHES, width=1000,
            widths=(250, 500, 1000, 2000), control=(500, 128),
        ),
        "full": Sizes(
            seeds=200, first_seed=10, data="mnist", batches=BATCHES, width=1000,
            widths=(250, 500, 1000, 2000), control=(1000, 128),
        ),
    },
    stages=stages,
    claims=[
        per_layer(
            "Batch norm leaves gradients their size on the way down.", lambda r: control(r).sel(arm=MAIN),
            equal=0.05, source=IOFFE + " (conjecture)", dispute=GRADIENTS,
            standalone="Batch norm leaves gradients their size on the way down through a deep network.",
        ),
        per_layer(
            "Batch norm itself makes gradients explode with depth.", Compared(control, ratio=True),
            above=1.3, dispute=GRADIENTS,
        ),
        Claim(
            "Where the weights have the wrong size, gradients stay closer to their size with batch norm than without.",
            steadier, measures="|log growth| without minus with batch norm, weights of half and twice He's size",
            unit="of log growth per layer", above=0.0, precision=0.05, source=IOFFE, dispute=GRADIENTS,
        ),
        per_layer(
            "The explosion is the same whatever the size of the weights.",
            lambda r: by_scale(r, MAIN) / control(r).sel(arm=MAIN),
            measures="growth with weights of half and twice He's size over that with He's",
            equal=0.01, precision=0.005, source="Yang et al. 2019, section 3.1; " + IOFFE,
            standalone="With batch norm the explosion of gradients with depth is the same whatever the size of the"
            " weights.",
        ),
        per_layer(
            "In the limit of wide layers and large batches the growth is pi / (pi - 1) = 1.467.",
            lambda r: largest_size(r) / LIMIT,
            measures="growth of the widest network with the largest batch over pi / (pi - 1)", equal=0.03,
            standalone="In the limit of wide ReLU layers and large batches batch norm makes the squared gradient grow"
            " by pi / (pi - 1) = 1.467 per layer.",
        ),
        per_layer(
            "At every batch size the growth is that of theorem 8.", lambda r: by_batch(r) / relu_rate(r.batch),
            measures="growth over the theory's", equal=0.05,
            standalone="At every batch size batch norm with ReLU makes the squared gradient grow per layer as theorem"
            " 8 of Yang et al. says.",
        ),
        per_layer(
            "Without an activation the growth is (B - 2) / (B - 3).", over_linear_theory,
            measures="growth over the theory's", equal=0.02,
            standalone="With batch norm and no activation the squared gradient grows by (B - 2) / (B - 3) per layer,"
            " at a batch size of B.",
        ),
        per_layer(
            "Other activations explode as well: tanh.", lambda r: control(r).sel(arm="batch norm, tanh"),
            above=1.05, source="Yang et al. 2019, theorem 9",
            standalone="With batch norm gradients explode with depth under other activations as well: tanh.",
        ),
        per_layer(
            "A bias that brings the ReLU close to linear weakens the explosion.",
            Compared(control, "batch norm, bias 2", MAIN, ratio=True), below=0.9, source="Yang et al. 2019, figure 4b",
            standalone="A bias that brings the ReLU close to linear weakens the explosion of gradients with batch"
            " norm.",
        ),
        per_layer(
            "It comes from dividing by the deviation, not from the gradient through the statistics.",
            Compared(control, "statistics held constant", MAIN, ratio=True), equal=0.05,
            source="Luther 2020, Batch Norm Causes Exploding Gradients",
            standalone="The explosion of gradients with batch norm comes from dividing by the deviation, not from the"
            " gradient through the statistics.",
        ),
        Claim(
            "A single gradient step brings the gradients of all layers close together.",
            lambda r: spans(r).sel(arm=MAIN, step=1, drop=True) / spans(r).sel(arm=MAIN, step=0, drop=True),
            measures="largest over smallest squared gradient of all layers, after a step over before",
            unit="times the span", ratio=True, below=0.01, source="Yang et al. 2019, abstract and figure 3",
            standalone="With batch norm a single gradient step brings the gradients of all layers close together.",
        ),
        per_layer(
            "Rounding plays no part: float32 shows what float64 shows.",
            lambda r: control(r).sel(arm=PAIR) / growth(r.precise.sel(arm=PAIR)),
            measures="growth in float32 over float64", equal=0.001, precision=0.0005, source="a control",
            standalone="Rounding plays no part in the explosion of gradients with batch norm: float32 shows what"
            " float64 shows.",
        ),
    ],
    tables=[
        table_of(
            "Growth of the squared gradient per layer, by batch size", lambda r: by_batch(r).expand_dims(arm=[MAIN]),
            rows=["batch"], columns="arm", published=PUBLISHED, note="Published: theorem 8.",
        ),
        table_of(
            "Growth of the squared gradient per layer, by arm",
            lambda r: control(r).expand_dims(figure=["growth"]), rows=["arm"], columns="figure",
        ),
        table_of(
            "Growth of the squared gradient per layer at the largest batch, by width", by_input,
            rows=["width"], columns="input",
        ),
        table_of(
            "Largest over smallest squared gradient of all layers, by training step",
            lambda r: spans(r).sel(arm=PAIR).isel(step=[0, 1, -1]), rows=["arm"], columns="step", form=".2g",
        ),
    ],
    pictures=[
        panels(
            draw_layers, draw_batches, draw_steps, file="mean_field.png",
            title="Does batch norm keep gradients from exploding? Not at the start",
            caption="Line: median of the networks; band: their range. Left: the gradient's mean square from the last of"
            " 50 layers down to the first; the jump at layer 1 comes from how little the digits themselves differ."
            " Middle: its growth per layer between layers 40 and 10; at the largest batch white noise comes closer to"
            " the theory than digits do. Right: the gradient of the labels' cross-entropy before and after steps of"
            " gradient descent.",
        )
    ],
)  # fmt: skip
