"""When are running averages good enough for evaluation, and when does batch norm need exact statistics?

Protocol: MLP 784-64-64-64-10, ReLU, batch norm before each, on 55,000 images of Fashion-MNIST; 1,200 steps of SGD.
Batches of 32 and 512 are crossed with a rate of 0.1, of 3.2, and of 3.2 that falls to 0 in a line: Wu and Johnson
change batch (256 to 8192) and rate (32 times) together, and the rate that falls takes the suspected cause away at the
end. The small batch is the first 32 images of the large one, so that all arms make as many steps.

Every 60 steps the same networks are evaluated on 2,500 test images by running averages of several decays and by the
exact statistics of 5,000 training images; so are two averages of the weights over steps, exponential (decay 0.99) and
plain over the second half (SWA). At the end statistics of 64 images up to all 55,000 are compared on all test images.

`python -m experiments run population` takes about three minutes on two cores (10 seeds, fixed without a pilot).
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import optax
import xarray as xr
from matplotlib.axes import Axes

import jaxbn
from experiments.framework.claim import Claim
from experiments.framework.experiment import WHEN_IT_HELPS, Experiment, Grid, Settings, Trained
from experiments.framework.pictures import COLORS, lines, panels
from experiments.framework.results import final
from experiments.framework.tables import table_of
from experiments.training import data, loop, models
from experiments.training import evaluation_statistics as statistics
from jaxbn.training import averaging

SMALL, LARGE = BATCHES = (32, 512)
SLOW, FAST, FALLING = "rate 0.1", "rate 3.2", "rate 3.2 to 0"
SCHEDULES = {
    SLOW: {"rate": 0.1, "falls": 0},
    FAST: {"rate": 3.2, "falls": 0},
    FALLING: {"rate": 3.2, "falls": 1},
}
WIDTHS = (64, 64, 64)
DECAYS = (0.9, 0.5, 0.99)  # of the running averages; training itself needs none
MIDDLE, SHORT, LONG = RUNNING = [f"decay {decay:g}" for decay in DECAYS]
EXACT = "exact"
AVERAGE_DECAY = 0.99  # of the weights
LAST, EMA, SWA = WEIGHTS = ("last weights", "weights' EMA", "weights' SWA")
STATISTICS = [*RUNNING, EXACT]
POPULATION, TEST = 5000, 2500  # images: of training for exact statistics, of test, while it trains
SAMPLES = {64: 1, 256: 4, 1024: 16, 4096: 64, 16384: 256, 55_000: 859}  # images: batches of 64
CHUNK = 64

WU = "Wu and Johnson 2021, section 3"
IZMAILOV = "Izmailov et al. 2018, section 3"


@cache
def network() -> models.Network:
    """The MLP; in training mode it returns the statistics of the batch."""
    norm = jaxbn.batch_norm(decay=0.0)
    return models.mlp(WIDTHS, norm, use_bias=False, activation=jax.nn.relu, weights=models.glorot_weights())


@cache
def task(settings: Settings, batch: int) -> loop.Task:
    """The network trained on the first `batch` images of each batch, at the run's "rate", which "falls" or not."""
    kept = statistics.with_decays(network(), DECAYS)

    def init(run: dict, key: jax.Array, x: jax.Array) -> dict:
        return kept.init(key, x)

    def apply(variables: dict, x: jax.Array, *, train: bool) -> tuple:
        return kept.apply(variables, x[:batch] if train else x, train=train)

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return loop.softmax_loss(logits, labels[: len(logits)])

    def optimizer(run: dict) -> optax.GradientTransformation:
        sgd = optax.sgd(lambda step: run["rate"] * (1 - run["falls"] * step / settings.steps))
        both = averaging(averaging(sgd, decay=AVERAGE_DECAY), decay=None, start=settings.steps // 2)
        # Averages start as the params; a state that is donated may not hold an array twice.
        return both._replace(init=lambda params: jax.tree.map(jnp.copy, both.init(params)))

    def metrics(run: dict, state: dict, arrays: dict) -> dict:
        found = measured(state, arrays)
        return {key(*place): found[i, j] for (i, j), place in PLACES.items()}

    return loop.Task(init, apply, optimizer, loss, metrics)


def key(weights: str, stats: str) -> str:
    """The name of a metric."""
    return f"{weights}, {stats}"


PLACES = {(i, j): (weights, stats) for i, weights in enumerate(WEIGHTS) for j, stats in enumerate(STATISTICS)}


def measured(state: dict, arrays: dict) -> jax.Array:
    """Test accuracy by WEIGHTS and STATISTICS: [3, 4]."""
    count, of = min(POPULATION, len(arrays["train_labels"])), len(arrays["train_labels"])
    images, _ = loop.take(arrays, data.spread(count, of))
    seen = data.spread(min(TEST, len(arrays["test_labels"])), len(arrays["test_labels"]))
    test = arrays["test_images"][seen], arrays["test_labels"][seen]
    average = state["optimizer"]
    three = (state["variables"]["params"], average.inner.average, average.average)
    running = state["variables"]["batch_stats"]

    def by_all(params: list) -> jax.Array:
        first = jax.tree.map(lambda leaf: leaf[0], running)
        _, exact = network().apply({"params": params, "batch_stats": first}, images, train=True)
        stats = jax.tree.map(lambda leaf, one: jnp.concatenate([leaf, one[None]]), running, exact)
        return statistics.accuracies(network().apply, params, stats, *test)

    return jax.lax.map(by_all, jax.tree.map(lambda *leaves: jnp.stack(leaves), *three))


def by_samples(trained: Trained) -> dict:
    """Test accuracy of the last weights by statistics of SAMPLES training images, each number's images at random."""
    arrays = trained.arrays
    test = arrays["test_images"], arrays["test_labels"]
    images = arrays["train_images"].reshape(-1, *test[0].shape[1:])
    batches = statistics.random_batches(images, arrays["train_labels"], CHUNK)

    @jax.jit
    def found(variables: dict, *batches: jax.Array) -> jax.Array:
        def one(variables: dict) -> jax.Array:
            first = jax.tree.map(lambda leaf: leaf[0], variables["batch_stats"])
            stats, _ = statistics.by_batch(network().apply, variables["params"], first, *batches)
            pools = [statistics.pooled(jax.tree.map(lambda leaf, n=n: leaf[:n], stats)) for n in SAMPLES.values()]
            pools = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pools)
            return statistics.accuracies(network().apply, variables["params"], pools, *test)

        return jax.lax.map(one, variables)

    return {"by_samples": (("samples",), found(trained.variables, *batches))}


def at(r: xr.Dataset, weights: str, stats: str, batch: object = BATCHES, schedule: object = FAST) -> xr.DataArray:
    """Test accuracy by one kind of weights and statistics, in some cells."""
    batch = list(batch) if isinstance(batch, tuple) else batch
    return r[key(weights, stats)].sel(batch=batch, schedule=schedule)


def later(array: xr.DataArray) -> xr.DataArray:
    """The points in the second half of training: before, a decay of 0.99 still holds the statistics of the start."""
    return array.isel(step=slice(array.sizes["step"] // 2, None))


def gained(r: xr.Dataset, stats: str, over: str, **cells: object) -> xr.DataArray:
    """What one kind of statistics gains over another with the last weights, mean over the second half of training."""
    return later(at(r, LAST, stats, **cells) - at(r, LAST, over, **cells)).mean("step")


def finally_gained(r: xr.Dataset, first: tuple, second: tuple, **cells: object) -> xr.DataArray:
    """Final test accuracy by one (weights, statistics) minus that by another."""
    return final(at(r, *first, **cells)) - final(at(r, *second, **cells))


def jumps(r: xr.Dataset, stats: str) -> xr.DataArray:
    """Mean change of test accuracy from one point of training to the next, large batch and rate."""
    return abs(later(at(r, LAST, stats, batch=LARGE)).diff("step")).mean("step")


def of_samples(r: xr.Dataset) -> xr.DataArray:
    """Test accuracy by number of images: [samples, batch, schedule, seed]."""
    return r.by_samples.assign_coords(samples=list(SAMPLES))


def samples_lack(r: xr.Dataset, count: int) -> xr.DataArray:
    """Test accuracy by statistics of `count` images minus that by those of all."""
    return of_samples(r).sel(samples=count, drop=True) - of_samples(r).isel(samples=-1, drop=True)


def every_kind(r: xr.Dataset) -> xr.DataArray:
    """Final test accuracy of everything: [weights, statistics, batch, schedule, seed]."""
    rows = [xr.concat([final(r[key(w, s)]).rename("a") for s in STATISTICS], "statistics") for w in WEIGHTS]
    return xr.concat(rows, "weights").assign_coords(weights=list(WEIGHTS), statistics=STATISTICS)


def in_training(r: xr.Dataset) -> xr.DataArray:
    """Test accuracy of the last weights, mean over its second half: [statistics, batch, schedule, seed]."""
    found = [later(r[key(LAST, stats)]).mean("step").rename("accuracy") for stats in STATISTICS]
    return xr.concat(found, "statistics").assign_coords(statistics=STATISTICS)


SHADES = {SHORT: "#e69f00", MIDDLE: COLORS["plain"], LONG: "#7b3294", EXACT: COLORS["batch norm"]}


def draw_training(batch: int, schedule: str, ax: Axes, settings: Settings, r: xr.Dataset) -> None:
    """Test accuracy during training by each of STATISTICS, in one cell."""
    found = [at(r, LAST, stats, batch, schedule).rename("accuracy") for stats in STATISTICS]
    shown = xr.concat(found, "statistics").assign_coords(statistics=STATISTICS)
    first = batch == SMALL  # the first panel has the legend
    lines(ax, shown, x="step", hue="statistics", palette=SHADES, style="statistics", errorbar=None, legend=first)
    ax.set(xlabel="training step", ylabel="test accuracy", title=f"batch {batch}, {schedule}")
    if first:
        ax.legend(title="statistics", frameon=False, loc="lower right")


def draw_weights(ax: Axes, settings: Settings, r: xr.Dataset) -> None:
    """Final accuracy of the three kinds of weights by old and exact statistics; large batch and rate."""
    shown = every_kind(r).sel(batch=LARGE, schedule=FAST)
    for stats, shift in ((MIDDLE, -0.12), (EXACT, 0.12)):
        values = shown.sel(statistics=stats).transpose("weights", "seed").values
        for place, some in enumerate(values):
            ax.plot(some, [place + shift] * len(some), "o", color=SHADES[stats], alpha=0.35, markersize=5)
            ax.plot(some.mean(), place + shift, "|", color=SHADES[stats], markersize=16, markeredgewidth=2.5)
    ax.set_yticks(range(len(WEIGHTS)), WEIGHTS)
    ax.set_ylim(len(WEIGHTS) - 0.5, -0.5)
    ax.set(xlabel="test accuracy at the end", title=f"batch {LARGE}, {FAST}: averaged weights")


of_test = partial(Claim, unit="of test accuracy", precision=0.005)
over_training = partial(
    of_test,
    measures="test accuracy of the same weights by two kinds of statistics, mean over the second half of training",
)
at_the_end = partial(of_test, measures="final test accuracy of the same weights by two kinds of statistics")
OURS = "ours"

UNSTABLE = "in the preset cpu six of ten networks did not learn there (final test accuracy of 0.09 to 0.20)"

EXPERIMENT = Experiment(
    title="When running averages lag behind the weights, and how many examples give exact statistics.",
    question="When are running averages good enough for evaluation, and when does batch norm need exact statistics?",
    source="Wu and Johnson 2021, Rethinking 'Batch' in BatchNorm, section 3; Izmailov et al. 2018",
    citation="Yuxin Wu and Justin Johnson: Rethinking 'Batch' in BatchNorm. arXiv:2105.07576, 2021. Pavel Izmailov,"
    " Dmitrii Podoprikhin, Timur Garipov, Dmitry Vetrov and Andrew Gordon Wilson: Averaging Weights Leads to Wider"
    " Optima and Better Generalization. UAI 2018.",
    theme=WHEN_IT_HELPS,
    answer={
        "cpu": "Exact statistics of the same weights were 1.7 points more accurate than running averages at a batch of"
        " 512 and a large rate (1.4 to 2.1; claimed: over 2), 0.7 to 0.9 at a small rate, and no better once the rate"
        " had fallen to 0. A thousand images gave exact statistics; in stable training averaged weights (SWA) lost 0.3"
        " to 1.9 points by the last weights' running averages.",
    },
    surprise="One would expect a long memory of the running averages to be the better one where batches are small and"
    " steps short. At a batch of 32 and a rate of 0.1 a decay of 0.99 tested 0.9 points worse than one of 0.5 (0.2 to"
    " 1.5).",
    reader_questions={
        "Which decay should the running averages have?": "In our MLP it mattered little at a batch of 512: 0.99, 0.9"
        " and 0.5 were within 0.2 points of each other at either rate, averaged over the second half of training. At a"
        " batch of 32 and a small rate 0.99 lost 0.9 points against 0.9 (0.6 to 1.1), and after the first 60 steps it"
        " was 6 to 8 points behind, since it still remembers its start.",
        "Do averaged weights (EMA, SWA) need new statistics?": "They gained by them in our MLP, if little: with the"
        " running averages of the last weights SWA lost 0.8 points at a batch of 512 and a large rate (0.4 to 1.2),"
        " and 1.9 at a batch of 32 and a small one (1.3 to 2.6). An exponential average did as well with running"
        " averages of its own decay as with exact statistics; for SWA such averages were not tested.",
        "How many examples do population statistics need?": "In our MLP a thousand did as well as 55,000, to within"
        " 0.1 points. A batch of 64 lost 0.6 points on average (0.5 to 0.7), and about one at a training batch of 512.",
    },
    differs="Wu and Johnson train ResNet-50 on ImageNet with momentum, batches of 256 and 8192, for 100 epochs; here a"
    " small MLP makes 1,200 steps. They pool the statistics of small batches, ours during training are of 5,000 images"
    " at once. No rate is searched: what is compared are statistics for the same weights. At a batch of 32 and the"
    f" constant rate of 3.2 training is unstable: {UNSTABLE}, so that figures from that cell say little.",
    settings={
        "smoke": Settings(seeds=2, data="mnist5k", steps=4, interval=1),
        "cpu": Settings(seeds=10, data="fashion_mnist", steps=1200, interval=60),
        "full": Settings(seeds=10, data="fashion_mnist", steps=10_000, interval=500),
    },
    grid=Grid(task, LARGE, {"batch": BATCHES}, {"schedule": SCHEDULES}, conclude=by_samples),
    claims=[
        over_training(
            "With a large batch and rate running averages are worse than exact statistics during training.",
            lambda r: gained(r, EXACT, MIDDLE, batch=LARGE), above=0.02, source=WU,
        ),
        over_training(
            "With a small batch and rate they are as good.",
            lambda r: gained(r, EXACT, MIDDLE, batch=SMALL, schedule=SLOW), equal=0.01, source=WU,
            standalone="With a small batch and rate running averages are as good as exact statistics during training.",
        ),
        over_training(
            "It is the rate that counts: with the large batch exact statistics gain more at the large rate.",
            lambda r: gained(r, EXACT, MIDDLE, batch=LARGE) - gained(r, EXACT, MIDDLE, batch=LARGE, schedule=SLOW),
            above=0.01, source=OURS,
            standalone="It is the rate that makes running averages worse than exact statistics: with the large batch"
            " exact statistics gain more at the large rate.",
        ),
        over_training(
            "And not the batch: at the large rate a small batch suffers as well.",
            lambda r: gained(r, EXACT, MIDDLE, batch=SMALL), above=0.02, source=OURS,
            standalone="It is not the batch that makes running averages worse than exact statistics: at the large rate"
            " they are worse with a small batch as well.",
        ),
        of_test(
            "By running averages test accuracy jumps during training, by exact statistics less.",
            lambda r: jumps(r, MIDDLE) - jumps(r, EXACT), above=0.01, source=WU,
            measures="mean change of test accuracy from one point to the next in the second half of training, large"
            " batch and rate: decay 0.9 minus exact",
        ),
        at_the_end(
            "Once the rate has fallen to 0 running averages are as good as exact statistics.",
            lambda r: finally_gained(r, (LAST, EXACT), (LAST, MIDDLE), schedule=FALLING), equal=0.01, source=WU,
        ),
        over_training(
            "A longer memory is worse at the large rate: a decay of 0.99 loses against 0.9.",
            lambda r: gained(r, LONG, MIDDLE), below=0.0, source=OURS,
            standalone="A longer memory of the running averages is worse at the large rate: a decay of 0.99 loses"
            " against 0.9.",
        ),
        over_training(
            "A shorter memory is better at the large rate: a decay of 0.5 gains over 0.9.",
            lambda r: gained(r, SHORT, MIDDLE), above=0.0, source=OURS,
            standalone="A shorter memory of the running averages is better at the large rate: a decay of 0.5 gains"
            " over 0.9.",
        ),
        at_the_end(
            "No decay is best everywhere: with a small batch and rate a decay of 0.5 loses against 0.99.",
            lambda r: finally_gained(r, (LAST, SHORT), (LAST, LONG), batch=SMALL, schedule=SLOW), below=0.0,
            source=OURS,
            standalone="No decay of the running averages is best everywhere: with a small batch and rate a decay of"
            " 0.5 loses against 0.99.",
        ),
        at_the_end(
            "Averaged weights (SWA) need statistics of their own.",
            lambda r: finally_gained(r, (SWA, EXACT), (SWA, MIDDLE)), above=0.05, source=IZMAILOV,
        ),
        at_the_end(
            "So does an exponential average of the weights.",
            lambda r: finally_gained(r, (EMA, EXACT), (EMA, MIDDLE)), above=0.05, source=OURS,
            standalone="An exponential average of the weights needs batch norm statistics of its own.",
        ),
        at_the_end(
            "It does as well with running averages of its own decay.",
            lambda r: finally_gained(r, (EMA, LONG), (EMA, EXACT)), equal=0.01, source=OURS,
            standalone="An exponential average of the weights does as well with running averages of its own decay as"
            " with exact statistics.",
        ),
        of_test(
            "With exact statistics averaged weights (SWA) are better than the last ones.",
            lambda r: finally_gained(r, (SWA, EXACT), (LAST, EXACT)), above=0.0, source=IZMAILOV,
            measures="final test accuracy of averaged minus last weights, both by exact statistics",
        ),
        of_test(
            "A thousand examples are enough for population statistics.", lambda r: samples_lack(r, 1024), equal=0.005,
            source=f"{WU}, says 1,000 to 10,000",
            measures="final test accuracy by statistics of 1,024 training images minus that by those of all",
        ),
        of_test(
            "A batch of 64 is not.", lambda r: samples_lack(r, 64), below=-0.005, source=OURS,
            measures="final test accuracy by statistics of 64 training images minus that by those of all",
            standalone="A batch of 64 is not enough for population statistics.",
        ),
    ],
    tables=[
        table_of(
            "Test accuracy of the same weights, mean over the second half of training", in_training,
            rows=["batch", "schedule"], columns="statistics", note=f"Batch 32, rate 3.2: {UNSTABLE}.",
        ),
        table_of(
            "Test accuracy at the end, by weights and statistics", every_kind, rows=["batch", "schedule", "weights"],
            columns="statistics",
            note="The statistics of averaged weights were taken during training, or exactly. Batch 32, rate 3.2:"
            f" {UNSTABLE}.",
        ),
        table_of(
            "Test accuracy at the end by number of images from which statistics come", of_samples,
            rows=["batch", "schedule"], columns="samples", note=f"Batch 32, rate 3.2: {UNSTABLE}.",
        ),
    ],
    pictures=[
        panels(
            partial(draw_training, SMALL, SLOW), partial(draw_training, LARGE, FAST),
            partial(draw_training, LARGE, FALLING), draw_weights, file="population.png", size=(4.4, 4.0),
            title="When are running averages good enough for evaluation, and when does batch norm need exact"
            " statistics?",
            caption="Test accuracy of the same networks by running averages of three decays and by exact statistics of"
            " 5,000 training images (lines: means of all seeds). Right: at the end, the last weights and two averages"
            " of them over training, by running averages (decay 0.9, orange) and by exact statistics (blue); a dot is"
            " one network.",
        )
    ],
)  # fmt: skip
