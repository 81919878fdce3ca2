"""What does batch norm do for a small MLP? Udacity's batch-norm lesson, all 24 cells of it, on real digits.

Protocol: MLP 784-100-100-100-10 on pixels in [0, 1], batch 60, plain SGD; rate {0.01, 1, 2} x activation {relu,
sigmoid} x standard deviation of the normal initial weights {0.05, 5} x {plain, batch norm}. Normalized hidden layers
are dense without bias -> batch norm (decay 0.99, epsilon 0.001) -> activation, the others dense with bias ->
activation; the output layer is plain. Both arms of a seed start from the same weights and see the same batches.

`python -m experiments run benefits` takes two to three minutes on two cores (3,000 steps, 5 seeds, 5,000 digits). With
`--preset full` it is the lesson's own setting, all of MNIST and 50,000 steps, and takes about half an hour for 3 seeds.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr

import jaxbn
from experiments.framework.claim import Claim, Compared
from experiments.framework.costs import step_costs
from experiments.framework.experiment import WHEN_IT_HELPS, Experiment, Grid, Settings, Trained
from experiments.framework.pictures import curves
from experiments.framework.results import final, first_step_with, label_cells
from experiments.framework.tables import table_of
from experiments.training import data, loop, models

BATCH_SIZE = 60
ACTIVATIONS = {"relu": jax.nn.relu, "sigmoid": jax.nn.sigmoid}
ARMS = ("plain", "batch norm")
RUNS = {"std": (0.05, 5.0), "rate": (0.01, 1.0, 2.0)}
CELLS = ("activation", "std", "rate")
LEARNT = 0.9  # test accuracy that counts as having learnt
LESSON = {"rate": 0.01, "std": 0.05}  # of the network (relu, batch norm) that predicts one image at a time
ALONE = ["statistics of the image", "statistics of the population"]

# Test accuracy on all of MNIST after 50,000 steps, one run each.
PUBLISHED = xr.DataArray(
    [
        [[[0.975, 0.980], [0.098, 0.983], [0.101, 0.983]], [[0.098, 0.799], [0.113, 0.921], [0.098, 0.905]]],
        [[[0.827, 0.973], [0.975, 0.981], [0.978, 0.978]], [[0.227, 0.853], [0.896, 0.951], [0.907, 0.958]]],
    ],
    {"activation": list(ACTIVATIONS), **{axis: list(values) for axis, values in RUNS.items()}, "arm": list(ARMS)},
    (*CELLS, "arm"),
)
PUBLISHED_ALONE = xr.DataArray([0.05, 0.97], {"predicts with": ALONE})  # 200 images, after 2,000 steps


@cache
def task(settings: Settings, activation: str, arm: str) -> loop.Task:
    """The network of one arm, its initial weights scaled by the run's "std", under SGD at the run's "rate"."""
    normalized = arm == "batch norm"
    # One image at a time in training mode is a part of the lesson, hence allow_single_value.
    norm = jaxbn.batch_norm(decay=0.99, epsilon=1e-3, allow_single_value=True) if normalized else jaxbn.identity()
    build = partial(models.mlp, (100, 100, 100), norm, use_bias=not normalized, activation=ACTIVATIONS[activation])

    def init(run: dict, key: jax.Array, x: jax.Array) -> dict:
        return build(weights=models.normal_weights(run["std"])).init(key, x)

    apply = build(weights=models.normal_weights(0.0)).apply  # of which only init makes use
    return loop.Task(init, apply, lambda run: optax.sgd(run["rate"]))


def one_at_a_time(trained: Trained) -> dict:
    """Test accuracy of the lesson's network one image at a time, by statistics of the image and of the population."""
    if trained.program != {"activation": "relu", "arm": "batch norm"}:
        return {}
    chosen = np.array([LESSON.items() <= run.items() for run in trained.runs])
    images, labels = trained.arrays["test_images"], trained.arrays["test_labels"]
    images, labels = images[labels >= 0], labels[labels >= 0]  # the rest is padding

    @partial(jax.jit, static_argnums=1)
    @partial(jax.vmap, in_axes=(0, None))
    def accuracy(variables: dict, train: bool) -> jax.Array:
        def predict(image: jax.Array) -> jax.Array:
            return jnp.argmax(trained.task.apply(variables, data.pixels(image[None]), train=train)[0][0])

        return jnp.mean(jax.lax.map(predict, images) == labels)

    found = np.full((len(chosen), 2), np.nan)
    variables = jax.tree.map(lambda leaf: leaf[chosen], trained.variables)
    found[chosen] = np.stack([accuracy(variables, True), accuracy(variables, False)], -1)
    return {"accuracy_alone": (("way",), found)}


def accuracy(r: xr.Dataset, **cells: object) -> xr.DataArray:
    """Final test accuracy in some of the cells."""
    return final(r.test_accuracy).sel(**cells)


def steps_to_learn(r: xr.Dataset) -> xr.DataArray:
    """The first measured step with LEARNT test accuracy."""
    return first_step_with(r.test_accuracy, LEARNT)


def best(r: xr.Dataset) -> xr.DataArray:
    """Final test accuracy of that cell of each arm whose mean validation accuracy is highest."""
    test, validation = (final(v).stack(cell=CELLS) for v in (r.test_accuracy, r.validation_accuracy))
    return test.isel(cell=validation.mean("seed").argmax("cell"), drop=True)


def alone(r: xr.Dataset) -> xr.DataArray:
    """Accuracy of the lesson's network one image at a time."""
    found = r.accuracy_alone.sel(activation="relu", arm="batch norm", **LESSON, drop=True)
    return found.rename(way="predicts with").assign_coords({"predicts with": ALONE})


network = partial(label_cells, axes=("activation", "std"), name="network")
gains = partial(Claim, unit="of test accuracy", above=0.05)
GRID = Grid(task, BATCH_SIZE, {"activation": tuple(ACTIVATIONS), "arm": ARMS}, RUNS, conclude=one_at_a_time)

EXPERIMENT = Experiment(
    title="Batch norm trains an MLP faster, at higher rates, from bad weights and with saturating activations.",
    question="What does batch norm do for a small network that recognizes digits?",
    source="Udacity, Deep Learning Foundations: Batch Normalization - Lesson",
    citation="Udacity, Deep Learning Foundations: Batch Normalization - Lesson (notebook Batch_Normalization_Lesson).",
    theme=WHEN_IT_HELPS,
    answer={
        "cpu": "A small MLP came to 90% of the digits in less than a quarter of the steps with batch norm, and its"
        " best setting named 93.0% against 90.3% without. It gained most where the plain network did badly: with ReLU"
        " at a rate of 2, from initial weights 100 times too large, and with sigmoids at the lowest rate.",
        "full": "On all of MNIST a small MLP took 3.7 times as many steps to 90% without batch norm as with it (2.2 to"
        " 6.1), and its best setting ended at 97.7% against 98.3%. With sigmoids the plain network learned at every"
        " rate, to 82%, 98% and 98%, and batch norm gained much at the lowest rate only (15 points).",
    },
    surprise="Batch norm is said to make saturating activations usable. At learning rates of 1 and 2 a plain MLP of"
    " sigmoids learned nearly as well without it: 98% of MNIST with and without, 90% of 5,000 digits against 91%.",
    reader_questions={
        "Can batch norm be used in MLPs?": "Yes: with its hidden layers normalized our MLP came to 90% of 5,000 digits"
        " in less than a quarter of the steps, and its best setting named 93.0% against 90.3%. On all of MNIST the"
        " plain network took 3.7 times as many steps, and ended 0.6 points lower.",
        "Why does training get shorter although a step is longer?": "Because far fewer steps are needed: our plain MLP"
        " took 4.3 times as many to 90% of 5,000 digits (2.3 to 8.3), and 3.7 times as many on all of MNIST (2.2 to"
        " 6.1). A step with batch norm took 1.1 to 1.2 times as long.",
        "What differs from Xavier initialization?": "Xavier's initialization gives units a good size before the first"
        " step; batch norm does so at every step. From weights of about that size (standard deviation 0.05) our MLP"
        " still learned in less than a quarter of the steps with batch norm, and from weights 100 times as large it"
        " named 64% of the digits on average, against 27% without.",
        "What happens at a batch of 1?": "In a dense layer the mean is then the value itself and the variance 0, so"
        " that every unit puts out its bias, whatever it is shown: one image at a time and by that image's own"
        " statistics our trained MLP named 10% of the digits, which is chance. A convolutional layer still averages"
        " over the positions of the one image, as instance norm does.",
        "Which batch size?": "One whose mean and variance say something of the data: over B examples of a Gaussian the"
        " mean is off by 1 / sqrt(B) standard deviations and the variance by sqrt(2 / B) of itself, which is 13% and"
        " 18% at 60. Our MLP was trained at 60 alone, and learned well; in a convolutional layer they say more, since"
        " they are over positions too.",
        "What must be equal in a fair comparison?": "First weights, order of the batches, number of steps, and the"
        " search for the learning rate: each arm is entitled to its own best rate. In our MLP with ReLU batch norm was"
        " 83 points ahead at a rate of 2, where the plain network is at chance, and about 6 points ahead with each at"
        " its best rate (93.0% against 86.7%); it was 2.7 points ahead of the best plain network of all, one of"
        " sigmoids.",
    },
    differs="The lesson trained every network once, on all of MNIST for 50,000 steps, and predicted 200 images one at"
    " a time after 2,000 steps. The preset full has its data and steps, and three seeds; cpu has 5,000 digits, 3,000"
    " steps and five seeds.",
    settings={
        "smoke": Settings(seeds=2, data="mnist5k", steps=40, interval=20),
        "cpu": Settings(seeds=5, data="mnist5k", steps=3000, interval=50),
        "full": Settings(seeds=3, data="mnist", steps=50_000, interval=250),
    },
    grid=GRID,
    stages=lambda settings: [step_costs(GRID, settings, ARMS, activation="relu")],
    claims=[
        Claim(
            "With batch norm a network learns in fewer steps.",
            Compared(lambda r: steps_to_learn(r).sel(std=0.05), "plain", "batch norm", ratio=True),
            measures=f"steps to {LEARNT:.0%} test accuracy in the cells of std 0.05 in which every run gets there",
            unit="times as many steps", above=1.0, precision=0.2,
            standalone="With batch norm an MLP learns in fewer steps than without.",
        ),
        gains(
            "Batch norm allows higher learning rates.",
            Compared(lambda r: accuracy(r, std=0.05, rate=[1.0, 2.0])),
            measures="final test accuracy at rates 1 and 2, std 0.05",
            standalone="Batch norm allows an MLP higher learning rates.",
        ),
        gains(
            "Batch norm makes bad initial weights trainable.",
            Compared(lambda r: accuracy(r, std=5.0)),
            measures="final test accuracy at std 5",
        ),
        gains(
            "Batch norm makes saturating activations usable.",
            Compared(lambda r: accuracy(r, activation="sigmoid", std=0.05)),
            measures="final test accuracy with sigmoid, std 0.05",
        ),
        Claim(
            "Batch norm gives a better final result.", Compared(best),
            measures="final test accuracy of the best of the 12 cells of each arm, chosen by validation accuracy",
            unit="of test accuracy", above=0.0, precision=0.01,
            standalone="Batch norm gives a better final result than no normalization, each at its best setting.",
        ),
        Claim(
            "A step with batch norm costs more.", Compared(lambda r: r.seconds, ratio=True),
            measures="seconds per network and step (relu), in turns in one process",
            unit="times the seconds", above=1.0, over="round",
            standalone="A training step with batch norm takes longer than one without.",
        ),
        Claim(
            "At test time a network needs population statistics.",
            Compared(alone, ALONE[1], ALONE[0], "predicts with"),
            measures="test accuracy one image at a time (relu, batch norm, std 0.05, rate 0.01)",
            unit="of test accuracy", above=0.5,
            standalone="At test time a network with batch norm needs population statistics.",
        ),
    ],
    tables=[
        table_of("Final test accuracy", accuracy, rows=CELLS, columns="arm", published=PUBLISHED),
        table_of(f"Steps to {LEARNT:.0%} test accuracy", steps_to_learn, rows=CELLS, columns="arm", form=".0f"),
        table_of(
            "Test accuracy, one image at a time (relu, batch norm, std 0.05, rate 0.01)", alone,
            rows=[], columns="predicts with", published=PUBLISHED_ALONE,
        ),
    ],
    pictures=[
        curves(
            lambda r: network(r.test_accuracy), row="network", col="rate", dotted=network(PUBLISHED),
            title="How well does an MLP learn digits, with and without batch norm?",
            caption="Published: one run each on all of MNIST, 50,000 steps.", file="accuracy.png",
            labels={"step": "training step (log scale)", "test_accuracy": "test accuracy"}, logx=True, ylim=(0, 1.02),
        )
    ],
)  # fmt: skip
