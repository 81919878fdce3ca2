"""Which batch size, and what happens at a batch of 1? Batch norm and its rivals at batches of 1, 8, 64 and 512.

Small batches are said to hurt batch norm (Wu and He 2018), and small batches are said to be best (Masters and Luschi
2018). A batch is two things: the examples of a step of SGD, and the examples over which mean and variance are taken.
Both are varied apart here, by ghost batches: groups of the batch that are normalized each by itself.

Protocol: digits of 14 x 14 (means of 2 x 2 pixels), three convolutions of 3 x 3 with 8, 12 and 16 channels on maps of
7 x 7, 7 x 7 and 4 x 4, each with a norm and a ReLU, their mean over positions, a dense layer (2,906 parameters in every
arm); plain SGD at a constant rate; 21,000 examples (six epochs) whatever the batch size, so that small batches make
more steps. Running statistics average over 1,024 examples at every batch size. Renorm: r at most 3, d at most 5, after
an epoch of batch norm; group norm: 4 groups of channels.

The rate is base x sqrt(batch). Every arm at every batch size tries the same six bases, which lie a factor sqrt(8)
apart, with 2 seeds, and one more beyond an end where the best of one arm lies; the best on validation is taken for 5
fresh seeds. Batch sizes lie a factor 8 apart, so that "the same rate" at the next one is one base lower, and Hoffer's
rule, rate by sqrt(batch), the same base. The number of seeds was fixed beforehand, without a pilot.

`python -m experiments run batch_size` takes about six minutes on two cores (5 seeds, 5,000 digits).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from matplotlib.axes import Axes

import jaxbn
from experiments.framework.claim import Claim, Compared
from experiments.framework.experiment import WHEN_IT_HELPS, Experiment, Settings, Stage
from experiments.framework.pictures import COLORS, dots, lines, panels
from experiments.framework.results import label_cells, side_by_side
from experiments.framework.search import FIRST_SEED, beyond
from experiments.framework.tables import table_of
from experiments.topics import SMALL_BATCHES
from experiments.training import batch_sizes, data
from experiments.training.pooled_norm import kind

BATCHES = ONE, SMALL, USUAL, LARGE = (1, 8, 64, 512)
BASES = tuple(float(f"{8 ** (k / 2):.3g}") for k in range(-6, 0))
NORM, RENORM, GROUP_NORM, NONE = "batch norm", "renorm", "group norm", "none"
ARMS = (NORM, RENORM, GROUP_NORM, NONE)
GHOSTS = {size: f"ghost batches of {size}" for size in BATCHES[:-1]}
FACTOR = f"sqrt({LARGE // USUAL})"
REGIMES = BASELINE, SAME_RATE, ROOT, GHOST, AS_MANY = (
    f"batch {USUAL}", f"batch {LARGE}, same rate", f"... rate x {FACTOR}",
    f"... and ghost batches of {USUAL}", "... and as many updates",
)  # fmt: skip
SHADES = {NORM: COLORS[NORM], RENORM: "#e69f00", GROUP_NORM: "#4dac5e", NONE: COLORS["plain"]}
BY_BATCH = {SMALL: "#e69f00", USUAL: "#4dac5e", LARGE: "#9970ab"}
STATISTICS = {"running": "test", "exact": "exact", "of each image": "own"}
WU = "Wu and He 2018 (Group Normalization), abstract"
MASTERS = "Masters and Luschi 2018, abstract"
HOFFER = "Hoffer, Hubara and Soudry 2017"
RENORMALIZATION = "Ioffe 2017 (Batch Renormalization)"
OURS = "a control of ours"
# Table 1 as remembered: a dense network on MNIST, batches of 128 and 4,096; not checked in the source.
PUBLISHED = xr.DataArray(
    [[0.9827], [0.9705], [0.9755], [0.9760], [0.9853]], {"regime": list(REGIMES), "figure": ["test accuracy"]}
)


@dataclass(frozen=True, kw_only=True)
class Sizes(Settings):
    """And more to set.

    Attributes:
      examples: of training, as many as a run sees of them.
      channels: of the convolutions.
      bases: that are tried.
      searched: seeds of the search.
      largest: larger batches are cut down to this, so as to see in seconds whether everything runs.
    """

    examples: int = 21_000
    channels: tuple[int, ...] = (8, 12, 16)
    bases: tuple[float, ...] = BASES
    searched: int = 2
    largest: int = LARGE


def arms_of(batch: int) -> dict[str, dict[str, float]]:
    """The normalizers at one batch size, as numbers of a run."""
    ghosts = {name: kind(size) for size, name in GHOSTS.items() if size < batch}
    renorm, by_channels = kind(batch, r_max=3.0, d_max=5.0), kind(by_channels=True)
    return {NORM: kind(batch), **ghosts, RENORM: renorm, GROUP_NORM: by_channels, NONE: kind(normalize=False)}


def train(settings: Sizes, batch: int, runs: list[dict], axes: dict, times: int = 1) -> xr.Dataset:
    """Every accuracy of `batch_sizes.Measured` of runs with a "base", over these axes; the last one varies fastest."""
    runs = [{**run, "rate": run["base"] * batch**0.5} for run in runs]
    one, dataset = batch_sizes.task(settings.channels), data.load(settings.data)
    batch = min(batch, settings.largest)
    found = batch_sizes.train(one, dataset, batch, settings.examples // batch, runs, times=times)
    shape = [len(values) for values in axes.values()]
    return xr.Dataset({name: (list(axes), v.reshape(shape)) for name, v in found._asdict().items()}, axes)


@cache
def searched(settings: Sizes, batch: int) -> xr.DataArray:
    """Validation accuracy, mean over the seeds of the search: [arm, base].

    Where the best base of one arm lies at an end, all arms try one more there, once.
    """
    found = validated(settings, batch, settings.bases)
    best = found.argmax("base")
    more = beyond(settings.bases, bool((best == 0).any()), bool((best == len(settings.bases) - 1).any()))
    return xr.concat([found, validated(settings, batch, more)], "base").sortby("base") if more else found


def validated(settings: Sizes, batch: int, bases: tuple[float, ...]) -> xr.DataArray:
    """Validation accuracy of every arm at some bases: [arm, base]."""
    arms, seeds = arms_of(batch), range(FIRST_SEED, FIRST_SEED + settings.searched)
    runs = [{"seed": s, "base": base, **arm} for arm in arms.values() for base in bases for s in seeds]
    axes = {"arm": list(arms), "base": list(bases), "seed": list(seeds)}
    return train(settings, batch, runs, axes).validation.mean("seed")


def trained(settings: Sizes, batch: int) -> xr.Dataset:
    """Every arm at the base that was best on validation, with fresh seeds: accuracies [seed, batch, arm]."""
    arms, search = arms_of(batch), searched(settings, batch)
    best = search.idxmax("base")
    runs = [{"seed": s, "base": float(best.sel(arm=a)), **arm} for s in settings.every_seed for a, arm in arms.items()]
    found = train(settings, batch, runs, {"seed": settings.every_seed, "arm": list(arms)})
    return found.assign(rate=best * batch**0.5, search=search).expand_dims(batch=[batch])


def regimes(settings: Sizes) -> xr.Dataset:
    """Hoffer's ways to mend a large batch, from the rate that was best at the usual one: [seed, regime]."""
    base = float(searched(settings, USUAL).sel(arm=NORM).idxmax("base"))
    whole, ghost = kind(LARGE), kind(USUAL)
    ways = {SAME_RATE: (base * (USUAL / LARGE) ** 0.5, whole), ROOT: (base, whole), GHOST: (base, ghost)}
    runs = [{"seed": s, "base": base, **arm} for s in settings.every_seed for base, arm in ways.values()]
    once = train(settings, LARGE, runs, {"seed": settings.every_seed, "regime": list(ways)})
    runs = [{"seed": s, "base": base, **ghost} for s in settings.every_seed]
    longer = train(settings, LARGE, runs, {"seed": settings.every_seed, "regime": [AS_MANY]}, LARGE // USUAL)
    both = xr.concat([once, longer], "regime")
    return both[["test", "train"]].rename(test="regime_test", train="regime_train")


def alone(settings: Sizes) -> xr.Dataset:
    """What batch norm does with one and two examples, in float64: largest differences, each [seed]."""
    found = [one_example(data.load(settings.data).train_images, seed) for seed in settings.every_seed]
    named = {name: ("seed", [one[name] for one in found]) for name in found[0]}
    return xr.Dataset(named, {"seed": settings.every_seed})


def one_example(images: np.ndarray, seed: int) -> dict[str, float]:
    """`alone` with random weights, scale and bias of one seed."""
    rng = np.random.default_rng(seed)
    x = images[rng.choice(len(images), 8, replace=False)].reshape(8, 28, 28, -1) / 255.0
    weights, direction = rng.normal(size=(x[0].size, 20)) / 10, rng.normal(size=20)
    params = {name: rng.uniform(0.5, 2, 20) for name in ("scale", "bias")}
    with jax.enable_x64(True):
        return {name: float(value) for name, value in _differences(x, weights, params, direction).items()}


@jax.jit
def _differences(x, weights, params, direction) -> dict[str, jax.Array]:
    def layer(norm: jaxbn.Normalizer, h: jax.Array, params: dict) -> jax.Array:
        return norm.apply({**norm.init(jax.random.key(0), h), "params": params}, h, train=True)[0]

    def dense(weights: jax.Array, one: jax.Array) -> jax.Array:
        return layer(jaxbn.batch_norm(allow_single_value=True), one.reshape(1, -1) @ weights, params)[0]

    output = jax.vmap(partial(dense, weights))(x)
    gradient = jax.grad(lambda weights: jnp.vdot(dense(weights, x[0]), direction))(weights)
    pair = jaxbn.batch_norm(epsilon=0.0, use_scale=False, use_bias=False)
    signs = layer(pair, x[:2].reshape(2, -1) @ weights, {})
    maps = x[:1, ..., :1] @ weights[:1]  # of a convolution of 1 x 1
    by_batch, by_image = (layer(norm, maps, params) for norm in (jaxbn.batch_norm(), jaxbn.instance_norm()))
    return {
        "dense_output": jnp.max(jnp.abs(output - params["bias"][None])),
        "dense_gradient": jnp.max(jnp.abs(gradient)),
        "pair": jnp.max(jnp.abs(jnp.abs(signs) - 1)),
        "convolution": jnp.max(jnp.abs(by_batch - by_image)) / jnp.max(jnp.abs(by_image)),
    }


def stages(settings: Sizes) -> Iterator[Stage]:
    """One for each batch size, then Hoffer's regimes, then single examples."""
    for batch in BATCHES:
        yield Stage(f"batch {batch}", partial(trained, settings, batch))
    yield Stage("regimes", partial(regimes, settings))
    yield Stage("alone", partial(alone, settings))


def on_test(r: xr.Dataset) -> xr.DataArray:
    """Test accuracy of the four arms: [batch, arm, seed]."""
    return r.test.sel(arm=list(ARMS)).rename("test accuracy")


def apart(r: xr.Dataset) -> xr.DataArray:
    """Test accuracy of batch norm by both batches: SGD's, and the examples that share statistics; nan where more."""
    ghosts = [r.test.sel(arm=name, drop=True).expand_dims(shared=[size]) for size, name in GHOSTS.items()]
    whole = r.test.sel(arm=NORM, drop=True)
    of_ghosts = xr.concat(ghosts, "shared").reindex(shared=list(BATCHES))
    return of_ghosts.where(of_ghosts.shared != of_ghosts.batch, whole).rename("test accuracy")


def worse_by_fewer(r: xr.Dataset) -> xr.DataArray:
    """Whole batches minus ghost batches of 8 and 1, at the same batch of SGD."""
    both = apart(r).sel(batch=[SMALL, USUAL, LARGE])
    whole = r.test.sel(arm=NORM, batch=[SMALL, USUAL, LARGE], drop=True)
    few = both.sel(shared=[ONE, SMALL])
    return (whole - few).where(few.shared < few.batch)


def better_by_small_steps(r: xr.Dataset) -> xr.DataArray:
    """The smallest batch of SGD minus larger ones, where the same number of examples share statistics."""
    both = apart(r).sel(shared=[ONE, SMALL])
    least = r.test.sel(arm=NORM, batch=[ONE, SMALL], drop=True).rename(batch="shared")
    return (least - both).where(both.batch > both.shared)


def best_is_small(r: xr.Dataset) -> xr.DataArray:
    """A batch of 8 minus those outside of 2 to 32."""
    values = on_test(r).sel(arm=[NORM, GROUP_NORM, NONE])
    return values.sel(batch=SMALL, drop=True) - values.sel(batch=[ONE, USUAL, LARGE])


def by_regime(r: xr.Dataset, name: str = "test") -> xr.DataArray:
    """Accuracy in Hoffer's regimes: [regime, seed]."""
    baseline = r[name].sel(arm=NORM, batch=USUAL, drop=True).expand_dims(regime=[BASELINE])
    return xr.concat([baseline, r[f"regime_{name}"]], "regime").sel(regime=list(REGIMES))


def by_statistics(r: xr.Dataset) -> xr.DataArray:
    """Test accuracy of batch norm by the statistics that normalize at test time: [batch, seed, statistics]."""
    found = {name: r[values].sel(arm=NORM, drop=True).rename("accuracy") for name, values in STATISTICS.items()}
    return side_by_side(found).rename(figure="statistics")


def with_ghosts(r: xr.Dataset) -> xr.DataArray:
    """The same of every network with batch norm, those with ghost batches too: [trained, seed, statistics]."""
    arms = [NORM, *GHOSTS.values()]
    found = side_by_side({name: r[values].sel(arm=arms) for name, values in STATISTICS.items()})
    return label_cells(found.rename(figure="statistics"), ["batch", "arm"], "trained").dropna("trained", how="all")


def draw_batches(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """Every arm by batch size."""
    looks = dict(hue="arm", palette=SHADES, style="arm", markers=True, dashes=False, err_style="bars")
    lines(ax, on_test(r), x="batch", **looks)
    own = float(by_statistics(r).sel(batch=ONE, statistics="of each image").mean("seed"))
    ax.plot(ONE, own, "o", markerfacecolor="none", color=COLORS[NORM], label="batch norm, each test image alone")
    of_batches(ax, "batch size", "All at equally many examples")
    ax.legend(frameon=False, fontsize=8)


def draw_apart(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """Both batches of batch norm."""
    both = apart(r).sel(batch=list(BY_BATCH)).rename(batch="batch of SGD")
    looks = dict(
        hue="batch of SGD", palette=BY_BATCH, style="batch of SGD", markers=True, dashes=False, err_style="bars"
    )
    lines(ax, both, x="shared", **looks)
    of_batches(ax, "examples that share mean and variance", "Batch norm: SGD's batch and its own")
    ax.legend(title="batch of SGD", frameon=False)


def of_batches(ax: Axes, words: str, title: str) -> None:
    """An axis of batch sizes."""
    ax.set(xscale="log", xlabel=words, ylabel="test accuracy", title=title)
    ax.set_xticks(BATCHES, map(str, BATCHES))
    ax.minorticks_off()


def draw_regimes(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """Hoffer's regimes, ours and the published ones."""
    dots(ax, by_regime(r), "regime", dict.fromkeys(REGIMES, COLORS[NORM]))
    theirs = PUBLISHED.sel(figure="test accuracy")
    ax.plot(theirs, np.arange(len(REGIMES)) + 0.25, "D", markerfacecolor="none", color="black", label="published")
    ax.set(xlabel="test accuracy", title="What a large batch loses")
    ax.margins(x=0.15)
    ax.legend(frameon=False, loc="best", fontsize=8)


accuracy = partial(Claim, unit="of test accuracy", precision=0.005)
best_of = partial(accuracy, above=0.0, measures="final test accuracy, each at its best rate, equally many examples")
regime = partial(accuracy, source=HOFFER, measures="final test accuracy, rates from the best one of batch 64")
at_one = partial(accuracy, source=OURS, measures=f"final test accuracy of batch norm trained at a batch of {ONE}")
single = partial(Claim, exact=1e-12, unit="absolute", source="what the formula says")
small, large = [ONE, SMALL], [USUAL, LARGE]

EXPERIMENT = Experiment(
    title="Batch norm by the batch of SGD and by the number of examples that share mean and variance.",
    question="Which batch size, and what happens at a batch of 1?",
    source="Wu and He 2018; Masters and Luschi 2018; Hoffer, Hubara and Soudry 2017; Ioffe 2017",
    citation="Yuxin Wu and Kaiming He: Group Normalization. ECCV 2018, arXiv:1803.08494. Dominic Masters and Carlo"
    " Luschi: Revisiting Small Batch Training for Deep Neural Networks. 2018, arXiv:1804.07612. Elad Hoffer, Itay"
    " Hubara and Daniel Soudry: Train longer, generalize better. NIPS 2017, arXiv:1705.08741. Sergey Ioffe: Batch"
    " Renormalization. NIPS 2017, arXiv:1702.03275.",
    theme=WHEN_IT_HELPS,
    answer={
        "cpu": "At equally many examples batch norm tested best at a batch of 64 or 8 (0.91, 0.89), group norm and no"
        " norm at 8 or 1 (0.90, 0.88), and all far worse at 512 (0.69, 0.44, 0.22). Normalized image by image in steps"
        " of 64, a network tested at 0.47, but at 0.91 by each test image's own statistics: it had learned, and"
        " running statistics did not fit it.",
    },
    surprise="Small batches are said to hurt batch norm, and by running averages a convolutional network that was"
    " trained at a batch of 1 named only 0.67 of the test digits. By the statistics of each test image the same network"
    " named 0.90: it had learned, and the averages did not fit it.",
    reader_questions={
        "Which batch size?": "In these experiments 64 or 8 with batch norm, 8 with renorm (0.93, the highest mean),"
        " and 8 or 1 with group norm or no norm; 512 lost with all of them, for batch norm until it saw eight times as"
        " many examples (in ghost batches of 64, 0.85 instead of 0.45). Fewer examples than a step's can share mean"
        " and variance: in steps of 64, five seeds do not tell 8 of them from 64 (0.89 against 0.91), but running"
        " statistics did not fit what was normalized by single images (0.47).",
        "What happens at a batch of 1?": "In a dense layer batch norm outputs its bias and passes no gradient on; with"
        " two examples it says only which of them is larger. A convolution still averages over positions, which is"
        " instance norm: in these experiments it learned, for it named 0.90 of the test digits by the statistics of"
        " each image, but only 0.67 by running statistics.",
    },
    differs="The sources train deep networks on ImageNet or CIFAR for many epochs, with momentum, weight decay and"
    " falling rates; here three convolutions learn 3,500 digits for six epochs without. Abstracts were read; Hoffer's"
    " table, a dense network on MNIST at batches of 128 and 4,096, is given as remembered. The preset full has all of"
    " MNIST and more channels, bases and seeds.",
    settings={
        "smoke": Sizes(
            seeds=2, data="mnist5k", examples=16, channels=(4,), bases=(0.02, 0.05), searched=1, largest=SMALL
        ),
        "cpu": Sizes(seeds=5, data="mnist5k"),
        "full": Sizes(
            seeds=10, data="mnist", examples=550_000, channels=(16, 32, 64), bases=(*BASES, 1.0), searched=3
        ),
    },
    stages=stages,
    claims=[
        best_of(
            "Small batches hurt batch norm: at the same batch of SGD, statistics of fewer examples are worse.",
            worse_by_fewer, source=WU, dispute=SMALL_BATCHES,
            measures="final test accuracy, each at its best rate: whole batch minus ghost batches of 8 and of 1",
        ),
        best_of(
            "Small batches hurt batch norm where both batches shrink together, as they usually do.",
            lambda r: (on_test(r).sel(batch=USUAL, drop=True) - on_test(r).sel(batch=small)).sel(arm=NORM, drop=True),
            source=WU, dispute=SMALL_BATCHES,
            measures=f"final test accuracy of batch norm, each at its best rate: batch {USUAL} minus smaller ones",
            standalone="Small batches hurt batch norm where the batch of SGD and the examples that share mean and"
            " variance shrink together, as they usually do.",
        ),
        best_of(
            "The best batch sizes lie between 2 and 32.", best_is_small, source=MASTERS,
            measures=f"final test accuracy, each at its best rate: batch {SMALL} minus those outside of 2 to 32",
        ),
        best_of(
            "Small batches of SGD help where equally many examples share statistics.", better_by_small_steps,
            source=MASTERS + ", without its second cause",
            measures="final test accuracy of batch norm, each at its best rate: the smallest batch minus larger ones"
            " in ghost batches of that size",
            standalone="With batch norm, small batches of SGD help where equally many examples share mean and"
            " variance.",
        ),
        best_of(
            "Where batches are small, group norm is better than batch norm.",
            Compared(lambda r: on_test(r).sel(batch=small), GROUP_NORM, NORM), source=WU,
        ),
        best_of(
            "Where batches are large, batch norm is better than group norm.",
            Compared(lambda r: on_test(r).sel(batch=large), NORM, GROUP_NORM), source=WU,
        ),
        accuracy(
            "Group norm does as well at any batch size.",
            lambda r: (on_test(r) - on_test(r).sel(batch=USUAL)).sel(arm=GROUP_NORM, batch=[ONE, SMALL, LARGE]),
            equal=0.01, source=WU,
            measures=f"final test accuracy of group norm, each at its best rate, minus that at batch {USUAL}",
            standalone="Group norm is equally accurate at any batch size.",
        ),
        best_of(
            "Where batches are small, renorm is better than batch norm.",
            Compared(lambda r: on_test(r).sel(batch=small), RENORM, NORM), source=RENORMALIZATION,
        ),
        accuracy(
            "Where batches are large, renorm is as good as batch norm.",
            Compared(lambda r: on_test(r).sel(batch=large), RENORM, NORM), equal=0.01, source=RENORMALIZATION,
            measures="final test accuracy, each at its best rate, equally many examples",
        ),
        regime(
            "At the same rate and equally many epochs a large batch loses accuracy.",
            Compared(by_regime, BASELINE, SAME_RATE, "regime"), above=0.0,
            standalone="With batch norm, at the same rate and equally many epochs, a large batch loses accuracy.",
        ),
        regime(
            "A rate that grows with the square root of the batch wins some of it back.",
            Compared(by_regime, ROOT, SAME_RATE, "regime"), above=0.0,
            standalone="A learning rate that grows with the square root of the batch wins back some of the accuracy"
            " that a large batch loses.",
        ),
        regime(
            "Ghost batches win back more.", Compared(by_regime, GHOST, ROOT, "regime"), above=0.0,
            standalone="Ghost batches win back more of the accuracy that a large batch loses than a rate that grows"
            " with the square root of the batch does alone.",
        ),
        regime(
            "With as many updates nothing is lost.", Compared(by_regime, AS_MANY, BASELINE, "regime"), above=-0.005,
            standalone="With ghost batches and as many updates as a small batch has, a large batch loses no accuracy.",
        ),
        best_of(
            "The loss is none of batch norm's: a large batch loses without it, too, even at its own best rate.",
            lambda r: (on_test(r).sel(batch=USUAL, drop=True) - on_test(r).sel(batch=LARGE, drop=True)).sel(
                arm=[NORM, GROUP_NORM, NONE]
            ),
            source=OURS, measures=f"final test accuracy, each at its best rate: batch {USUAL} minus batch {LARGE}",
            standalone="What a large batch loses is not batch norm's fault: it loses accuracy without batch norm, too,"
            " even at its own best rate.",
        ),
        single(
            "At a batch of 1 batch norm in a dense layer puts out its bias, whatever it is shown.",
            lambda r: r.dense_output, measures="largest difference of the output from the bias, in float64",
        ),
        single(
            "At a batch of 1 no gradient gets below batch norm in a dense layer.",
            lambda r: r.dense_gradient, measures="largest gradient of the layer's weights, in float64",
        ),
        single(
            "At a batch of 2 a dense layer with batch norm says only which of the two examples is larger.",
            lambda r: r.pair, measures="largest difference of the normalized values from 1 and -1, epsilon 0",
        ),
        single(
            "At a batch of 1 batch norm of feature maps is instance norm.",
            lambda r: r.convolution, measures="largest difference of outputs in training, in float64", unit="relative",
        ),
        at_one(
            "A convolutional network with batch norm learns at a batch of 1, too.",
            lambda r: on_test(r).sel(arm=NORM, batch=ONE, drop=True), above=0.5,
        ),
        at_one(
            "At test time it is then better by the statistics of each image, as in training, than by running ones.",
            Compared(lambda r: by_statistics(r).sel(batch=ONE, drop=True), "of each image", "running", "statistics"),
            above=0.0,
            standalone="A convolutional network with batch norm that was trained at a batch of 1 tests better by the"
            " statistics of each image, as in training, than by running ones.",
        ),
        at_one(
            "Exact statistics of the data do no better than the running ones.",
            Compared(lambda r: by_statistics(r).sel(batch=ONE, drop=True), "exact", "running", "statistics"),
            equal=0.01,
            standalone="A convolutional network with batch norm that was trained at a batch of 1 tests no better by"
            " exact statistics of the data than by running ones.",
        ),
        at_one(
            f"That is due to the batch of 1: trained at {USUAL}, the network is worse by the statistics of each image.",
            Compared(lambda r: by_statistics(r).sel(batch=USUAL, drop=True), "of each image", "running", "statistics"),
            below=0.0, measures=f"final test accuracy of batch norm trained at a batch of {USUAL}",
            standalone="It is training at a batch of 1 that makes the statistics of each image the better ones at test"
            f" time: trained at {USUAL}, a network with batch norm is worse by them.",
        ),
    ],
    tables=[
        table_of(
            "Final test accuracy by batch size, each at its best rate", on_test, rows=["batch"], columns="arm",
            note="21,000 examples in the preset cpu, whatever the batch size.",
        ),
        table_of(
            "Final validation accuracy of the same networks", lambda r: r.validation.sel(arm=list(ARMS)),
            rows=["batch"], columns="arm",
        ),
        table_of(
            "Batch norm: final test accuracy by SGD's batch and by the number of examples that share mean and variance",
            apart, rows=["batch"], columns="shared",
        ),
        table_of(
            "Ways to mend a large batch",
            lambda r: side_by_side({f"{name} accuracy": by_regime(r, name).rename("a") for name in ("test", "train")}),
            rows=["regime"], columns="figure", published=PUBLISHED,
            note="Rates from the best one at batch 64. The last row sees eight times as many examples. Published:"
            " Hoffer et al., table 1, a dense network on MNIST, batches of 128 and 4,096; as remembered.",
        ),
        table_of(
            "Batch norm at test time: accuracy by the statistics that normalize", with_ghosts,
            rows=["trained"], columns="statistics",
            note="Running averages over 1,024 examples; exact ones of 1,000 training images; those of each test image."
            " Ghost batches: so many examples of a batch share mean and variance in training.",
        ),
        table_of(
            "Learning rate chosen on validation", lambda r: r.rate.expand_dims(seed=[0]),
            rows=["arm"], columns="batch", form=".3g",
        ),
    ],
    pictures=[
        panels(
            draw_batches, draw_apart, draw_regimes, file="batch_size.png", size=(4.5, 3.7),
            title="Which batch size, and what happens at a batch of 1?",
            caption="Three convolutions learn 3,500 digits. Left and middle: equally many examples, each point at the"
            " learning rate that was best on validation; lines: means of the seeds, bars: their range. Hollow: trained"
            " at a batch of 1, tested by the statistics of each image. Middle: groups of a batch are normalized each by"
            " itself. Right: rates follow from the best one of batch 64, and the last row sees eight times as many"
            " examples; a dot a seed, a bar the mean; published: a dense network on all of MNIST, batches of 128 and"
            " 4,096 (Hoffer et al. 2017, as remembered).",
        )
    ],
)  # fmt: skip
