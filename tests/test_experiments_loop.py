import shutil
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbn
from experiments.errors import UserError
from experiments.framework import grid, stopping
from experiments.framework.record import open_record
from experiments.training import data, loop, models

EXAMPLES, BATCH = 43, 8  # five batches an epoch, three examples over
CONFIG = {"experiment": "e", "preset": "p", "settings": {}}
RUNS = [{"seed": seed, "rate": rate} for seed in range(3) for rate in (0.1, 1.0)]


def dataset():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 10, EXAMPLES, dtype=np.int32)
    images = generator.integers(0, 256, (EXAMPLES, 3, 3, 1), dtype=np.uint8)
    return data.Dataset(images, labels, images[:20], labels[:20], images[:30], labels[:30])


def task(norm=None):
    norm = norm or jaxbn.batch_norm()
    network = models.mlp((6, 5), norm, use_bias=False, activation=jax.nn.relu, weights=models.normal_weights(0.5))
    return loop.Task(
        lambda run, key, x: network.init(key, x),
        network.apply,
        lambda run: optax.sgd(run["rate"], momentum=0.9),
    )


TASK = task()


def train(directory, schedule, runs=RUNS, the_task=TASK, track=lambda *_: None):
    """Rows and final variables of a grid in `directory`, begun or continued."""
    trained = []

    def conclude(runs, variables, arrays):
        trained.append(jax.tree.map(np.asarray, variables))
        return [{"concluded": len(runs)}]

    record = open_record(directory, CONFIG)
    grid.train_grid(record, "stage", the_task, schedule, runs, dataset(), track, conclude)
    return record.rows(), trained


SCHEDULE = loop.Schedule(steps=12, interval=3, batch_size=BATCH)


def test_an_epoch_draws_every_example_at_most_once():
    indices = loop.batch_indices(jnp.int32(7), jnp.int32(5), 5, BATCH, EXAMPLES)
    assert indices.shape == (5, BATCH)
    assert len(np.unique(indices)) == 5 * BATCH


@pytest.mark.parametrize("steps", [1, 3, 5, 6, 13])
def test_batches_do_not_depend_on_how_the_steps_are_cut(steps):
    whole = loop.batch_indices(jnp.int32(7), jnp.int32(0), 39, BATCH, EXAMPLES)
    pieces = [
        loop.batch_indices(jnp.int32(7), jnp.int32(start), steps, BATCH, EXAMPLES) for start in range(0, 39, steps)
    ]
    np.testing.assert_array_equal(np.concatenate(pieces)[:39], whole)


def test_seeds_and_epochs_draw_differently():
    first = loop.batch_indices(jnp.int32(0), jnp.int32(0), 10, BATCH, EXAMPLES)
    assert not np.array_equal(first[:5], first[5:])
    assert not np.array_equal(first, loop.batch_indices(jnp.int32(1), jnp.int32(0), 10, BATCH, EXAMPLES))


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="batch of 50 cannot be drawn from 43"):
        loop.batch_indices(jnp.int32(0), jnp.int32(0), 1, 50, EXAMPLES)


@jax.jit
def one_step(run, state, images, labels):
    return loop.train_step(TASK, run, state, images, labels)


def by_hand(run, steps):
    """One network, trained by a plain Python loop; its loss at each step and its final state."""
    given = dataset()
    state = loop.init_run(TASK, given.train_images, {name: jnp.asarray(v) for name, v in run.items()})
    indices = loop.batch_indices(jnp.int32(run["seed"]), jnp.int32(0), steps, BATCH, EXAMPLES)
    losses = []
    for index in np.asarray(indices):
        state, loss = one_step(
            run, state, data.pixels(jnp.asarray(given.train_images[index])), given.train_labels[index]
        )
        losses.append(loss)
    return losses, state


@pytest.mark.parametrize("mapped", [False, True])
def test_a_grid_is_its_networks_trained_one_by_one(tmp_path, mapped):
    rows, (trained,) = train(tmp_path / "run", SCHEDULE._replace(mapped=mapped))
    curves = grid.curves(rows, "stage")
    for number, run in enumerate(RUNS):
        losses, state = by_hand(run, SCHEDULE.steps)
        # Twelve float32 steps in two orders of summation, at rates that amplify: 1e-3 is far below the effect of a
        # wrong batch, rate or seed, which is of order 1.
        np.testing.assert_allclose(curves.loss[number], np.mean(np.reshape(losses, (4, 3)), 1), rtol=1e-3)
        ours = jax.tree.map(lambda leaf, number=number: leaf[number], trained)
        chex.assert_trees_all_close(ours, state["variables"], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("largest", "size"), [(7, 6), (15, 15), (1000, 30)])
def test_accuracy_counts_correct_predictions_batch_by_batch(monkeypatch, largest, size):
    monkeypatch.setattr(loop, "EVALUATION_BATCH", largest)
    images, labels = dataset().test_images, dataset().test_labels

    def by_first_pixel(variables, x, *, train):
        assert (len(x), train) == (size, False)
        return jax.nn.one_hot(jnp.round(255 * x[:, 0, 0, 0]).astype(int) % 10, 10), None

    found = loop.accuracy(by_first_pixel, {}, jnp.asarray(images), jnp.asarray(labels))
    np.testing.assert_allclose(found, np.mean(images[:, 0, 0, 0] % 10 == labels), rtol=1e-6)
    assert 0 < found < 1


def test_a_grid_records_both_accuracies_and_the_metrics_of_its_task(tmp_path):
    def metrics(run, state, arrays):
        assert arrays["validation_images"].shape == (20, 3, 3, 1)
        return {"twice_the_rate": 2 * run["rate"], "momentum": optax.tree.norm(state["optimizer"])}

    rows, (trained,) = train(tmp_path / "run", SCHEDULE, the_task=TASK._replace(metrics=metrics))
    found = grid.curves(rows, "stage").metrics
    assert set(found) == {"loss", "validation_accuracy", "test_accuracy", "twice_the_rate", "momentum"}
    np.testing.assert_allclose(found["twice_the_rate"], np.repeat([[0.2], [2.0]] * 3, 4, axis=1))
    assert (found["momentum"] > 0).all()
    for number in range(len(RUNS)):
        variables = jax.tree.map(lambda leaf, number=number: leaf[number], trained)
        for part, images, labels in (("validation", *dataset()[2:4]), ("test", *dataset()[4:])):
            expected = loop.accuracy(TASK.apply, variables, images, labels)
            np.testing.assert_allclose(found[f"{part}_accuracy"][number, -1], expected, rtol=1e-4)


def test_fewer_examples_than_a_batch_are_refused(tmp_path):
    with pytest.raises(UserError, match="43 training images, where a batch takes 44: choose another --data"):
        train(tmp_path / "run", SCHEDULE._replace(batch_size=44))


def test_images_of_a_size_that_the_network_does_not_take_are_refused(tmp_path):
    network = models.lenet(jaxbn.batch_norm(), use_bias=False, activation=jnp.tanh)
    lenet = TASK._replace(init=lambda run, key, x: network.init(key, x), apply=network.apply)
    with pytest.raises(UserError, match=r"takes no images of 3 x 3 x 1 \(.*\): choose another --data"):
        train(tmp_path / "run", SCHEDULE, the_task=lenet)


def test_sigmoid_loss_is_the_mean_over_classes_too():
    logits, labels = jnp.array([[0.0, 0.0, 0.0, 0.0]]), jnp.array([2])
    np.testing.assert_allclose(loop.sigmoid_loss(logits, labels), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(loop.softmax_loss(logits, labels), np.log(4), rtol=1e-6)


def test_a_task_trains_on_its_own_loss(tmp_path):
    rows, _ = train(
        tmp_path / "run", SCHEDULE, the_task=TASK._replace(loss=lambda logits, labels: logits.sum() * 0 + 7)
    )
    np.testing.assert_array_equal(grid.curves(rows, "stage").loss, 7)


def test_parts_are_few_of_equal_size_and_cut_between_seeds():
    assert [len(part) for part in loop.parts_of(RUNS, 5)] == [4, 2]
    assert [len(part) for part in loop.parts_of(RUNS, 1)] == [2, 2, 2]
    assert [len(part) for part in loop.parts_of(RUNS[::2], 2)] == [2, 1]
    assert [len(part) for part in loop.parts_of(RUNS, 64)] == [6]


@pytest.mark.parametrize("runs", [RUNS[:5], [*RUNS[::2], *RUNS[1::2]]])
def test_a_grid_that_is_not_sorted_into_seeds_of_equal_size_is_refused(runs):
    with pytest.raises(ValueError, match="seed after seed"):
        loop.runs_per_seed(runs)


def test_a_grid_in_parts_is_the_grid_at_once(tmp_path):
    whole, _ = train(tmp_path / "whole", SCHEDULE)
    parted, trained = train(tmp_path / "parted", SCHEDULE._replace(runs_at_once=4))
    whole, parted = grid.curves(whole, "stage"), grid.curves(parted, "stage")
    np.testing.assert_allclose(parted.loss, whole.loss, rtol=1e-3)
    assert [len(part["batch_stats"][0]["mean"]) for part in trained] == [4, 2]


def test_nothing_is_traced_again_after_the_first_interval(tmp_path):
    chex.clear_trace_counter()
    # Once to see whether the images fit, once in the training program and once in the evaluation, for three parts of
    # four intervals each.
    counted = TASK._replace(apply=chex.assert_max_traces(n=3)(TASK.apply))
    train(tmp_path / "run", SCHEDULE._replace(runs_at_once=2), RUNS, counted)


class KilledError(Exception):
    pass


def killed_at(interval):
    calls = iter(range(1000))

    def track(*_):
        if next(calls) == interval:
            raise KilledError

    return track


@pytest.mark.parametrize("seconds_between", [0.0, 1e9])
@pytest.mark.parametrize("interval", [0, 1, 3, 4, 6, 9])
def test_an_interrupted_grid_continues_bit_for_bit(tmp_path, monkeypatch, seconds_between, interval):
    schedule = SCHEDULE._replace(runs_at_once=4)  # two parts; each calls track five times
    _, undisturbed = train(tmp_path / "undisturbed", schedule)
    monkeypatch.setattr(grid, "SECONDS_BETWEEN", seconds_between)
    with pytest.raises(KilledError):
        train(tmp_path / "run", schedule, track=killed_at(interval))
    _, trained = train(tmp_path / "run", schedule)
    same = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("undisturbed", "run")]
    assert same[0] == same[1]
    for ours, theirs in zip(reversed(trained), reversed(undisturbed), strict=False):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_finished_stage_is_not_trained_again(tmp_path):
    rows, _ = train(tmp_path / "run", SCHEDULE)
    again, trained = train(tmp_path / "run", SCHEDULE)
    assert again == rows
    assert trained == []


def spoil(path):
    for file in path.rglob("*"):
        if file.is_file():
            file.write_bytes(b"garbage")


def vanish(path):
    shutil.rmtree(path)


def flip(path):
    largest = max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


PARTED = SCHEDULE._replace(runs_at_once=4)  # two parts of four intervals; `track` is called five times in each


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    train(directory / "run", PARTED)
    return (directory / "run" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("damage", [spoil, vanish, flip])
@pytest.mark.parametrize("interval", [3, 8])
def test_a_grid_with_a_damaged_checkpoint_continues_from_the_one_before(
    tmp_path, monkeypatch, capsys, undisturbed, damage, interval
):
    """Or from the start of the stage or part: here the newest checkpoint, or both with their directory, are damaged."""
    monkeypatch.setattr(grid, "SECONDS_BETWEEN", 0.0)
    with pytest.raises(KilledError):
        train(tmp_path / "run", PARTED, track=killed_at(interval))
    checkpoints = tmp_path / "run" / "checkpoints"
    newest = max(checkpoints.iterdir(), key=lambda path: int(path.name))
    damage(checkpoints if damage is vanish else newest)
    train(tmp_path / "run", PARTED)
    assert "continuing from" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == undisturbed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_the_grid_and_ends_it(tmp_path, undisturbed, number):
    calls = iter(range(1000))

    def track(*_):
        if next(calls) == 2:
            signal.raise_signal(number)

    before = [signal.getsignal(each) for each in stopping.SIGNALS]
    with pytest.raises(stopping.Stopped, match="is saved at step 9") as stop:
        train(tmp_path / "run", PARTED, track=track)
    assert stop.value.status == 128 + number
    assert [signal.getsignal(each) for each in stopping.SIGNALS] == before
    assert open_record(tmp_path / "run", CONFIG).place.position == {"stage": "stage", "part": 0, "interval": 3}
    train(tmp_path / "run", PARTED)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == undisturbed


def test_a_run_that_diverges_is_recorded_and_leaves_the_others_alone(tmp_path):
    runs = [{"seed": 0, "rate": 0.1}, {"seed": 0, "rate": float("inf")}]
    rows, _ = train(tmp_path / "run", SCHEDULE, runs)
    loss = grid.curves(rows, "stage").loss
    assert np.isfinite(loss[0]).all()
    assert np.isnan(loss[1, -1])
    assert 0 <= grid.curves(rows, "stage").accuracy[1, -1] <= 1


def test_a_task_may_change_the_variables_after_each_step():
    images, labels = data.pixels(jnp.asarray(dataset().train_images[:BATCH])), dataset().train_labels[:BATCH]
    state = loop.init_run(TASK, dataset().train_images, RUNS[0])
    halved = TASK._replace(after=lambda variables, images: jax.tree.map(lambda leaf: leaf / 2, variables))
    (plain, _), (found, _) = (loop.train_step(task, RUNS[0], state, images, labels) for task in (TASK, halved))
    chex.assert_trees_all_equal(found["variables"], jax.tree.map(lambda leaf: leaf / 2, plain["variables"]))


def test_curves_hold_every_metric_that_was_recorded():
    runs = [{"seed": 0}, {"seed": 1}]
    rows = [
        {"stage": "other", "first": 0, "step": 5, "loss": [9.0, 9.0]},
        {"stage": "stage", "runs": runs},
        {"stage": "stage", "first": 1, "step": 5, "loss": [2.0], "validation_accuracy": [0.2]},
        {"stage": "stage", "first": 0, "step": 5, "loss": [1.0], "validation_accuracy": [0.1]},
    ]
    found = grid.curves(rows, "stage")
    assert found.runs == runs
    np.testing.assert_array_equal(found.steps, [5])
    np.testing.assert_array_equal(found.metrics["validation_accuracy"], [[0.1], [0.2]])
    np.testing.assert_array_equal(found.loss, [[1.0], [2.0]])
