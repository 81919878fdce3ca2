"""Does batch norm help between the time steps of a recurrent network? LSTM against BN-LSTM on digits read row by row.

Protocol: an LSTM of 100 units reads a digit of MNIST one row at a time and names it from the last hidden state; batch
100, gradients clipped at norm 1, RMSProp (decay 0.9), 3 epochs. BN-LSTM normalizes W_x x, W_h h and what tanh sees of
the cell, with statistics per time step, a scale that starts at 0.1, and noise of 0.1 on the initial hidden state. Each
control takes one of these away: batch norm of W_x x alone, a scale that starts at 1, no noise, and, in the trained
BN-LSTM, statistics averaged over time. All arms of a seed start from the same weights and see the same batches; each
has the rate that was best on validation. Gradients by the hidden states are measured before the first step, row by row
and pixel by pixel, since the first pixels are black in all images and leave no variance.

`python -m experiments run recurrent --preset gpu` takes about six minutes on a GPU, and more than an hour on two
cores. The preset `cpu`, with 3 seeds and less than an epoch, takes about a quarter of an hour on two cores. The number
of seeds was fixed beforehand, without a pilot. `full` reads pixel by pixel as the source does, `permuted` pixels in a
fixed random order; each takes a GPU the better part of a day.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial

import jax
import numpy as np
import optax
import xarray as xr
from matplotlib.axes import Axes

from experiments.framework.claim import Claim, Compared
from experiments.framework.experiment import WHEN_IT_HELPS, Experiment, Grid, Search, Settings, Stage, Trained
from experiments.framework.pictures import Drawn, curves, lines, palette, panels
from experiments.framework.results import final, first_step_with, side_by_side
from experiments.framework.search import runs_of
from experiments.framework.tables import Table, table_of
from experiments.topics import RECURRENT
from experiments.training import data, loop
from experiments.training.switched_lstm import (
    LARGEST,
    ORDERS,
    PARTS,
    averaged_over_time,
    gradient_sizes,
    sequence,
    switched_lstm,
    switches,
)

LSTM, INPUT, BN, SCALE, NO_NOISE = "LSTM", "BN of the input only", "BN-LSTM", "BN-LSTM, scale of 1", "BN-LSTM, no noise"
ARMS = {
    LSTM: switches(noise=0.0),
    INPUT: switches("input", noise=0.0),
    BN: switches(*PARTS),
    SCALE: switches(*PARTS, scale=1.0),
    NO_NOISE: switches(*PARTS, noise=0.0),
}
BATCH_SIZE = 100
LEARNT = 0.95  # validation accuracy that counts as having learnt
PLACES = 28  # hidden states by which gradients are kept: those after each row of an image
COOIJMANS = "Cooijmans et al. 2017"
LAURENT = "Laurent et al. 2016, abstract"
FIGURE = "figure"
ACCURACIES = "test accuracy", "averaged over time", "of the test images"

# Test accuracy of one run each, chosen by validation; table 1 of the source.
PUBLISHED = xr.DataArray([[0.989, 0.990], [0.902, 0.954]], {"order": ["pixels", "permuted"], "arm": [LSTM, BN]})


@dataclass(frozen=True, kw_only=True)
class Sizes(Settings):
    """And the hidden units, the order in which images are read, and the orders in which gradients are measured."""

    features: int = 100
    order: str = "rows"
    probed: tuple[str, ...] = ("rows", "pixels")


@cache
def task(settings: Sizes) -> loop.Task:
    """The network of the arm whose numbers the run has, under clipped RMSProp at the run's "rate"."""

    def network(images: jax.Array):
        height, width = images.shape[1:3]
        return switched_lstm(settings.features, height if settings.order == "rows" else height * width)

    def init(run: dict, key: jax.Array, images: jax.Array) -> dict:
        return network(images).init(run, key, sequence(images, settings.order))

    def apply(variables: dict, images: jax.Array, *, train: bool) -> tuple[jax.Array, dict]:
        return network(images).apply(variables, sequence(images, settings.order), train=train)

    def optimizer(run: dict) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(1.0), optax.rmsprop(run["rate"], decay=0.9, eps=1e-10))

    return loop.Task(init, apply, optimizer)


def with_other_statistics(trained: Trained) -> dict:
    """Test accuracy of the trained networks with statistics averaged over time, and with those of 1,000 test images."""
    images, labels = trained.arrays["test_images"], trained.arrays["test_labels"]

    def by_batch(variables: dict, images: jax.Array, *, train: bool) -> tuple[jax.Array, dict]:
        return trained.task.apply(variables, images, train=True)

    @jax.jit
    @jax.vmap
    def accuracies(variables: dict) -> tuple[jax.Array, jax.Array]:
        averaged = loop.accuracy(trained.task.apply, averaged_over_time(variables), images, labels)
        return averaged, loop.accuracy(by_batch, variables, images, labels)

    found = accuracies(trained.variables)
    return {name: ((), value) for name, value in zip(("accuracy_averaged", "accuracy_by_batch"), found, strict=True)}


def gradients(settings: Sizes) -> Iterator[Stage]:
    """For each order, how large the gradients are at the start, for all arms and seeds."""
    for order in settings.probed:
        yield Stage(f"gradients, {order}", partial(measured_gradients, settings, order))


def measured_gradients(settings: Sizes, order: str) -> xr.Dataset:
    """Powers of ten of the gradients by the hidden states [order, seed, arm, row] and by the parameters."""
    arrays = loop.on_device(data.load(settings.data))
    runs = runs_of({"arm": ARMS, "rate": (0.0,)}, settings.seeds, settings.first_seed)
    stacked = loop.stacked(runs, len(runs))
    begun = task(Sizes(seeds=0, features=settings.features, order=order))
    states = jax.vmap(partial(loop.init_run, begun, arrays["test_images"]))(stacked)
    batches = loop.draw(stacked["seed"], 0, 1, BATCH_SIZE, len(arrays["train_labels"]))[:, 0]

    def sizes(of_run: tuple[dict, jax.Array]) -> tuple[jax.Array, jax.Array]:
        variables, index = of_run
        images, labels = loop.take(arrays, index)
        read = sequence(images, order)
        network = switched_lstm(settings.features, len(read))
        by_states, by_params = gradient_sizes(network, loop.softmax_loss, variables, read, labels)
        every = len(read) // PLACES
        return by_states[every - 1 :: every], by_params

    # One after the other: a network keeps some gigabytes over 784 time steps.
    found = jax.jit(partial(jax.lax.map, sizes))((states["variables"], batches))
    shape = 1, settings.seeds, len(ARMS)
    by_state, by_params = (np.round(part, 3).reshape(*shape, *part.shape[1:]) for part in map(np.asarray, found))
    axes = ("order", "seed", "arm")
    coordinates = {"order": [order], "seed": list(settings.every_seed), "arm": list(ARMS)}
    variables = {"by_state": ((*axes, "row"), by_state), "by_params": (axes, by_params)}
    return xr.Dataset(variables, {**coordinates, "row": np.arange(1, by_state.shape[-1] + 1)})


def steps_to_learn(r: xr.Dataset) -> xr.DataArray:
    """The first measured step with LEARNT validation accuracy; all steps where there is none."""
    return first_step_with(r.validation_accuracy, LEARNT).fillna(r.step[-1])


def accuracy(r: xr.Dataset) -> xr.DataArray:
    """Test accuracy after the last step."""
    return final(r.test_accuracy)


def reaching_back(r: xr.Dataset) -> xr.DataArray:
    """Powers of ten by which the gradient by the hidden state after the first row exceeds that after the last."""
    return r.by_state.isel(row=0, drop=True) - r.by_state.isel(row=-1, drop=True)


def figures(r: xr.Dataset) -> xr.DataArray:
    """The rate of each arm, its speed, and its accuracy with three kinds of statistics."""
    found = accuracy(r), r.accuracy_averaged, r.accuracy_by_batch
    accuracies = dict(zip(ACCURACIES, found, strict=True))
    return side_by_side({"rate": r.rate, f"steps to {LEARNT:.0%}": steps_to_learn(r), **accuracies})


def sizes_at_start(r: xr.Dataset) -> xr.DataArray:
    """Powers of ten of the gradients of each arm before training."""
    return side_by_side({"first row over last": reaching_back(r), "by all parameters": r.by_params})


def beside_published(settings: Sizes, r: xr.Dataset) -> Table:
    """The accuracies in the order of this run beside the published ones."""
    title = "Final test accuracy by the order in which an image is read"
    ours = accuracy(r).expand_dims(order=[settings.order]).reindex(order=list(ORDERS))
    note = "Published: one run each after up to 200 epochs, pixel by pixel; there is no figure for whole rows."
    return table_of(title, lambda r: ours, rows=["arm"], columns="order", published=PUBLISHED, note=note)(settings, r)


def draw_gradients(order: str, ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """The gradient by the hidden state after each row, relative to the last, for every arm."""
    powers = r.by_state.sel(order=order) - r.by_state.sel(order=order).isel(row=-1)
    arms = list(ARMS)
    look = {"hue": "arm", "hue_order": arms, "style": "arm", "style_order": arms, "palette": palette(arms)}
    lines(ax, powers.rename("powers"), "row", **look)
    title = f"a time step is a {'row' if order == 'rows' else 'pixel'}"
    ax.set(xlabel="rows of the image read", ylabel="relative gradient, powers of ten", title=title)
    if order == settings.probed[0]:
        ax.legend(frameon=False, fontsize=8)
    else:
        ax.get_legend().remove()


def gradient_picture(settings: Sizes, r: xr.Dataset) -> Drawn:
    """A panel for each order."""
    return panels(
        *(partial(draw_gradients, order) for order in settings.probed),
        title="How far back through time does the gradient reach, before any training?",
        caption="The gradient of the loss by the hidden state after each row, over that after the last: 0 is as large,"
        " 3 is 1,000 times larger. The error starts at the last row and goes back to the left. Line: mean of the seeds;"
        " band: their range. Rows that are black in all images have no variance: without noise, batch norm divides by"
        f" sqrt(epsilon) there. What is beyond float32 counts as 10^{LARGEST:g} before it is divided.",
        file="gradients.png", size=(4.6, 3.4),
    )(settings, r)  # fmt: skip


faster = partial(Claim, unit="times as many steps", above=1.0, precision=0.1)
more_accurate = partial(
    Claim, measures="final test accuracy, each arm at its best rate",
    unit="of test accuracy", above=0.0, precision=0.001,
)  # fmt: skip
in_powers = partial(Claim, unit="powers of ten")
STEPS = f"steps to {LEARNT:.0%} validation accuracy (all steps where it is not reached), each arm at its best rate"
REACH = "gradient by the hidden state after the first row over that after the last, before training"

EXPERIMENT = Experiment(
    title="An LSTM learns faster with batch norm between its time steps, and each part of that recipe is needed.",
    question=RECURRENT,
    source="Cooijmans, Ballas, Laurent, Gülçehre and Courville 2017, Recurrent Batch Normalization",
    citation="Tim Cooijmans, Nicolas Ballas, César Laurent, Çağlar Gülçehre and Aaron Courville: Recurrent Batch"
    " Normalization. ICLR 2017, arXiv:1603.09025. César Laurent, Gabriel Pereyra, Philémon Brakel, Ying Zhang and"
    " Yoshua Bengio: Batch Normalized Recurrent Neural Networks. ICASSP 2016, arXiv:1510.01378.",
    theme=WHEN_IT_HELPS,
    answer={
        "gpu": "An LSTM that read digits row by row named 98.1% with batch norm between its time steps and 97.8%"
        " without; ten seeds do not tell whether it learned faster. It needs statistics of each time step (averaged"
        " over time: 85.4%) and noise on its first hidden state (without: 70.4%, or 89.1% by the test images' own"
        " statistics).",
        "cpu": "After less than an epoch three seeds do not tell whether an LSTM with batch norm between its time"
        " steps learns digits faster or better than one without (94.4% named against 95.0%). Batch norm of the input's"
        " term alone took 1.27 times as many steps to 95% (1.01 to 1.59), and without noise on the first hidden state"
        " 54.4% were named.",
    },
    surprise="The scale of an LSTM's batch norm is to start at 0.1, since 1 is said to let the gradient vanish on its"
    " way back through time. Before training, 1 made the gradient that reaches the first row about 50 times larger"
    " than 0.1 did, not smaller; it took 1.33 times as many steps to 95% all the same (1.15 to 1.53).",
    reader_questions={
        "Can batch norm be used in recurrent networks?": "Yes, with statistics for each time step: with batch norm"
        " between its time steps our LSTM named 98.1% of the digits read row by row, without 97.8% (0.1 to 0.5 points"
        " more). Whether that, or batch norm of the input's term alone, learns in fewer steps, ten seeds do not tell"
        " (0.86 to 1.32 and 0.78 to 1.15 times as fast).",
        "Why does batch norm in a recurrent network need statistics for each time step?": "Its activations differ from"
        " one time step to the next. The same trained LSTM named 98.1% of the digits by the statistics of each step,"
        " and 85.4% by their averages over time.",
        "What if a feature has no variance in a batch?": "Batch norm then divides by sqrt(epsilon), and multiplies a"
        " gradient by up to scale / sqrt(epsilon), which is 32 for a scale of 0.1 and an epsilon of 1e-5. In our LSTM,"
        " reading digits pixel by pixel, the gradient grew about 7-fold a step through the black third row and left"
        " the range of float32 soon after; with noise of 0.1 on the first hidden state it was 5 times that by the last"
        " row (0.8 to 31).",
    },
    differs="The source reads pixel by pixel (the presets full and permuted) and trains up to 200 epochs at rate 0.001"
    " on 50,000 images; here 28 rows, 3 epochs, 55,000 images, and a rate for each arm. Statistics at test time are"
    " running averages of decay 0.9, not averages over the training set. The paper speaks of RMSProp with 0.9 momentum;"
    " its released code has no momentum but RMSProp's decay, of 0.9 and later 0.5: here 0.9. Its code also gives forget"
    " gates a bias of 1, as here, and draws the permuted order with replacement, so that about a third of the pixels is"
    " never read; here the order is a permutation. Scales that are switched off count among the trained parameters.",
    settings={
        "smoke": Sizes(seeds=2, data="mnist5k", steps=4, interval=2, features=6, probed=("rows",)),
        "cpu": Sizes(seeds=3, data="mnist", steps=385, interval=55),
        "gpu": Sizes(seeds=10, data="mnist", steps=1650, interval=55),
        "full": Sizes(seeds=3, data="mnist", steps=110_000, interval=2750, order="pixels"),
        "permuted": Sizes(seeds=3, data="mnist", steps=110_000, interval=2750, order="permuted"),
    },
    grid=Grid(
        task, BATCH_SIZE, {}, {"arm": ARMS},
        Search("rate", (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), extensions=1, least_steps=10), conclude=with_other_statistics,
    ),
    stages=gradients,
    claims=[
        faster(
            "BN-LSTM converges faster than LSTM.", Compared(steps_to_learn, LSTM, BN, ratio=True),
            measures=STEPS, dispute=RECURRENT, source=f"{COOIJMANS}, section 5.1",
            standalone="An LSTM with batch norm between its time steps converges faster than one without.",
        ),
        more_accurate(
            "BN-LSTM ends with a better test score than LSTM.", Compared(accuracy, BN, LSTM),
            source=f"{COOIJMANS}, section 5.1",
            standalone="An LSTM with batch norm between its time steps ends with a better test score than one without.",
        ),
        faster(
            "Batch norm of the input's term alone converges faster than none.",
            Compared(steps_to_learn, LSTM, INPUT, ratio=True), measures=STEPS, source=LAURENT,
            standalone="In an LSTM batch norm of the input's term alone converges faster than none.",
        ),
        faster(
            "To normalize between time steps too is beneficial.", Compared(steps_to_learn, INPUT, BN, ratio=True),
            measures=STEPS, dispute=RECURRENT, source=f"{COOIJMANS}, abstract",
            standalone="In an LSTM batch norm between the time steps too is beneficial, beside that of the input's"
            " term alone.",
        ),
        faster(
            "To normalize between time steps too does not help the training.",
            Compared(steps_to_learn, INPUT, BN, ratio=True), above=None, equal=0.1, precision=0.05,
            measures=STEPS, dispute=RECURRENT, source=LAURENT,
            standalone="In an LSTM batch norm between the time steps too does not help the training, beside that of"
            " the input's term alone.",
        ),
        more_accurate(
            "Statistics that are averaged over time degrade performance severely.",
            lambda r: (accuracy(r) - r.accuracy_averaged).sel(arm=BN, drop=True), above=0.05, precision=0.02,
            measures="final test accuracy of BN-LSTM with statistics per time step minus with their averages over time",
            source=f"{COOIJMANS}, section 3",
            standalone="In an LSTM with batch norm, statistics that are averaged over time degrade performance"
            " severely.",
        ),
        in_powers(
            "A scale that starts at 1 lets the gradient vanish on its way back.",
            Compared(reaching_back, SCALE, BN), measures=REACH, below=-1.0, source=f"{COOIJMANS}, section 4",
            standalone="In an LSTM a batch norm scale that starts at 1 lets the gradient vanish on its way back"
            " through time.",
        ),
        more_accurate(
            "A scale that starts at 0.1 trains better than one that starts at 1.", Compared(accuracy, BN, SCALE),
            source=f"{COOIJMANS}, section 4",
            standalone="In an LSTM a batch norm scale that starts at 0.1 trains better than one that starts at 1.",
        ),
        in_powers(
            "Time steps without variance make the gradient explode on its way back.",
            lambda r: reaching_back(r).sel(arm=NO_NOISE, drop=True), above=2.0,
            measures=f"{REACH}, BN-LSTM without noise; beyond float32 counts as {LARGEST:g}",
            source=f"{COOIJMANS}, section 5.1",
            standalone="In an LSTM with batch norm, time steps without variance make the gradient explode on its way"
            " back through time.",
        ),
        in_powers(
            "Noise on the initial hidden state prevents that.",
            lambda r: reaching_back(r).sel(arm=BN, drop=True), below=1.0,
            measures=f"{REACH}, BN-LSTM", source=f"{COOIJMANS}, section 5.1",
            standalone="In an LSTM with batch norm, noise on the initial hidden state keeps the gradient from"
            " exploding at time steps without variance.",
        ),
        in_powers(
            "Without noise the gradient by the parameters explodes too.",
            Compared(lambda r: r.by_params, NO_NOISE, BN), above=1.0,
            measures="norm of the gradient by all parameters, before training",
            source="ours: the source does not say whether the sum over examples explodes, or each one's share alone",
            standalone="In an LSTM with batch norm, without noise on the initial hidden state the gradient by the"
            " parameters explodes too.",
        ),
        more_accurate(
            "Without noise the network learns worse.", Compared(accuracy, BN, NO_NOISE),
            source=f"{COOIJMANS}, section 5.1, by implication",
            standalone="Without noise on its initial hidden state an LSTM with batch norm learns worse.",
        ),
    ],
    tables=[
        table_of(
            "What each arm needs and what it reaches", figures, rows=["arm"], columns=FIGURE,
            form={"rate": "g", f"steps to {LEARNT:.0%}": ".0f"} | dict.fromkeys(ACCURACIES, ".4f"),
            note=f"Rate chosen on validation; steps to {LEARNT:.0%} of the validation images right; test accuracy with"
            " running statistics per time step, with their averages over time, and with the statistics of 1,000 test"
            " images at a time.",
        ),
        beside_published,
        table_of(
            "Gradients before the first step, powers of ten", sizes_at_start,
            rows=["order", "arm"], columns=FIGURE, form=".1f",
            note="By the hidden state after the first row over that after the last; by all parameters."
            f" What is beyond float32 counts as {LARGEST:g} before it is divided.",
        ),
    ],
    pictures=[
        curves(
            lambda r: r.validation_accuracy.drop_sel(arm=NO_NOISE),
            title=RECURRENT, file="accuracy.png", ylim=(0.8, 1.0), height=4.0,
            caption="Each arm at the learning rate that was best on validation; BN-LSTM without noise, which is far"
            " less accurate, is left out. Digits are read row by row (pixel by pixel in the presets full and"
            " permuted).",
            labels={"step": "training step", "validation_accuracy": "validation accuracy"},
        ),
        gradient_picture,
    ],
)  # fmt: skip
