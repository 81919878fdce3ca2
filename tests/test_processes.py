"""Real processes on loopback: what they agree on, what happens when one is lost, and how they go on.

Faults come at chosen steps, from inside the process that they hit; the tests marked slow send them at random times.
"""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from holder import Holder
from process_pairs import (
    COMPARED,
    HEARTBEAT,
    IN_ORDER,
    INTERVAL,
    LOST,
    MARGIN,
    ONE,
    PERMUTATIONS,
    PROGRAM,
    SAVE_EVERY,
    SAVED,
    SECONDS_FOR_ALL,
    SECONDS_TO_MEET,
    SETTINGS,
    SIGKILLED,
    STEPS,
    Alone,
    Pair,
    Place,
    Rounding,
    Terminated,
    assert_same_run,
    assert_same_state,
    at,
    distances,
    relative,
    rows,
    sealed,
)

from experiments.cluster import processes, recipes
from experiments.cluster import train as distributed
from experiments.errors import GaveUpError, UserError
from experiments.framework import checkpoint, stopping
from experiments.framework.record import open_record
from experiments.training import data
from jaxbn import training


@pytest.fixture(scope="module")
def dataset():
    """256 pictures of ten kinds, with noise."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, 256).astype(np.int32)
    images = random.integers(0, 200, (10, 28, 28, 1))[labels] + random.integers(0, 56, (256, 28, 28, 1))
    images = images.astype(np.uint8)
    return data.Dataset(images, labels, *2 * (images[:64], labels[:64]))


@pytest.fixture(scope="module")
def place(tmp_path_factory, dataset):
    directory = tmp_path_factory.mktemp("place")
    np.savez(directory / "dataset.npz", **dataset._asdict())
    return Place(str(directory / "dataset.npz"), str(directory / "compiled"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, place):
    """The directory of a run of two processes that nothing disturbs, and what each of them held at its end."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    with Pair(place, out) as pair:
        return out, pair.digests()[0]


@pytest.fixture(scope="module")
def terminated(tmp_path_factory, place):
    out = tmp_path_factory.mktemp("runs") / "terminated"
    with Pair(place, out, ({}, at(3, signal.SIGTERM))) as pair:
        return Terminated(out, [pair.ended(number) for number in range(2)])


@pytest.fixture(scope="module")
def alone(dataset):
    """A run by one device, the examples of all batches in the order that is given."""
    built = functools.cache(lambda settings: recipes.network_and_step(settings, ONE, "jit"))

    def run(order, settings=SETTINGS):
        network, step = built(settings)
        state, losses = training.replicate(recipes.start(settings, network, dataset), ONE), []
        for batch in recipes.batches(settings, dataset, 0):
            batch = training.shard_batch(jax.tree.map(lambda leaf: leaf[:, order], batch), ONE, scan=True)
            state, metrics = step(state, batch, jax.random.key(settings.seed))
            losses.append(np.mean(metrics["loss"]))
            if len(losses) * INTERVAL == COMPARED:
                then = jax.device_get(state)
        return Alone(np.asarray(losses), then)

    return run


@pytest.fixture(scope="module")
def rounding(alone):
    run = alone(IN_ORDER)
    others = [alone(np.random.default_rng(seed).permutation(SETTINGS.batch)) for seed in range(PERMUTATIONS)]
    losses = max(relative(other.losses, run.losses) for other in others)
    states = [distances(other.state, run.state) for other in others]
    return Rounding(run, losses, {path: max(state[path] for state in states) for path in states[0]})


@pytest.fixture
def train(monkeypatch, dataset):
    """Training in this process, on eight devices."""
    labels = dataset.train_labels.copy()
    labels[3] = 10
    wrong = dataset._replace(train_labels=labels)
    monkeypatch.setattr(data, "load", lambda name: wrong if name == "labels" else dataset)

    def run(out, settings=SETTINGS, **options):
        options = distributed.Options(**{"save_every": SAVE_EVERY, **options})
        return distributed.train(settings, out, processes.Cluster(), options)

    return run


# What they agree on.


def test_two_processes_end_with_the_same_state_bit_for_bit(undisturbed):
    _, (first, second) = undisturbed
    assert first == second


def test_the_loss_goes_down(undisturbed):
    losses = [row["loss"] for row in rows(undisturbed[0])]
    assert losses[-1] < losses[0] / 2


@pytest.mark.slow
def test_two_processes_hold_what_one_with_the_whole_batch_does(terminated, rounding):
    like = training.replicate(rounding.run.state, ONE)
    assert_same_state(checkpoint.restore(terminated.out / "checkpoints", COMPARED, like), rounding)


def test_two_processes_report_what_one_with_the_whole_batch_does(undisturbed, rounding):
    assert_same_run(undisturbed[0], rounding)


@pytest.mark.parametrize("parallel", ["jit", pytest.param("shard_map", marks=pytest.mark.slow)])
def test_eight_devices_report_what_one_with_the_whole_batch_does(parallel, rounding, tmp_path, train):
    train(tmp_path, parallel=parallel)
    assert_same_run(tmp_path, rounding)


def test_statistics_of_half_the_batch_are_far_beyond_rounding(rounding, alone):
    """Those of a process by itself."""
    halves = alone(IN_ORDER, SETTINGS._replace(steps=COMPARED, group_size=SETTINGS.batch // 2))
    for path, distance in distances(halves.state, rounding.run.state).items():
        assert distance > 500 * rounding.bound(path), path


def test_one_process_with_eight_devices_continues_what_two_with_one_each_began(
    undisturbed, rounding, tmp_path, train, capfd
):
    out = tmp_path / "continued"
    shutil.copytree(undisturbed[0], out)
    shutil.rmtree(out / "checkpoints" / str(STEPS))
    train(out)
    shown = capfd.readouterr().out
    assert f"continuing from step {STEPS - SAVE_EVERY}" in shown
    assert "began on 2 devices and goes on with 8" in shown
    assert_same_run(out, rounding)
    assert rows(out)[:-2] == rows(undisturbed[0])[:-2]


# Faults.


def assert_given_up(end, number):
    """That a process ended with the documented status, and said why once."""
    status, _, error = end
    assert status == processes.PEER_LOST, end
    assert len(re.findall(LOST.format(number), error)) == 1, error
    assert len(re.findall(SAVED, error)) == 1, error


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_both_resume_bit_for_bit(undisturbed, place, tmp_path):
    """From the checkpoint before the newest, which is cut short here as a full disk might."""
    out = tmp_path / "killed"
    with Pair(place, out, ({}, at(5, signal.SIGKILL))) as pair:
        assert pair.ended(1)[0] == SIGKILLED
        assert_given_up(pair.ended(0, HEARTBEAT + MARGIN), 0)
    assert sealed(out) == [10, 20]
    largest = max((out / "checkpoints" / "20").rglob("*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    with Pair(place, out) as again:
        found, said = again.digests()
    assert "continuing from step 10" in said
    assert found == undisturbed[1]
    assert (out / "metrics.jsonl").read_text() == (undisturbed[0] / "metrics.jsonl").read_text()


def test_sigterm_to_one_saves_and_ends_both(terminated):
    assert [status for status, _, _ in terminated.ends] == [128 + signal.SIGTERM] * 2, terminated.ends
    for _, _, error in terminated.ends:
        assert error.count("Stopped (saved step 15). What is done is kept; continue with: python -m experiments") == 1
    assert sealed(terminated.out) == [10, 15]
    assert not (terminated.out / ".lock").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_other_signals_to_the_first_save_and_end_both(number, place, tmp_path):
    with Pair(place, tmp_path, (at(3, number), {})) as pair:
        ends = [pair.ended(process) for process in range(2)]
    assert [status for status, _, _ in ends] == [128 + number] * 2, ends
    assert sealed(tmp_path) == [10, 15]


@pytest.mark.slow
def test_a_frozen_process_is_given_up(terminated, undisturbed, place, tmp_path):
    """In a run that continues."""
    out = tmp_path / "frozen"
    shutil.copytree(terminated.out, out)
    with Pair(place, out, ({}, at(3, signal.SIGSTOP))) as pair:
        pair.wait_for_state(1, "T")
        end = pair.ended(0, HEARTBEAT + MARGIN)
    assert "continuing from step 15" in end[1]
    assert_given_up(end, 0)
    assert rows(out) == rows(undisturbed[0])[:6]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE])
def test_a_signal_saves_and_the_same_command_continues(number, rounding, tmp_path, train, monkeypatch):
    """In one process; SIGPIPE stands for a standard output that nobody reads any more."""
    ask, asked = processes.stop_requested, []

    def requested(terminator):
        asked.append(terminator)
        if len(asked) == 3:
            signal.raise_signal(number) if number != signal.SIGPIPE else stopping.request(number)
        return ask(terminator)

    monkeypatch.setattr(processes, "stop_requested", requested)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(stopping.Stopped, match="saved step 15") as end:
        train(tmp_path)
    assert end.value.status == 128 + number
    assert signal.getsignal(signal.SIGINT) == before
    assert sealed(tmp_path) == [10, 15]
    if number == signal.SIGINT:
        train(tmp_path)
        assert_same_run(tmp_path, rounding)


@pytest.mark.slow
def test_a_first_process_killed_before_it_seals_a_checkpoint_leaves_the_one_before(undisturbed, place, tmp_path):
    plan = {"seal": "20", "signal": signal.SIGKILL}
    with Pair(place, tmp_path, (plan, {})) as pair:
        assert pair.ended(0)[0] == SIGKILLED
        assert_given_up(pair.ended(1, HEARTBEAT + MARGIN), 1)
    with Pair(place, tmp_path) as again:
        found, said = again.digests()
    assert "continuing from step 10" in said
    assert found == undisturbed[1]
    assert rows(tmp_path) == rows(undisturbed[0])


@pytest.mark.slow
def test_a_frozen_first_process_is_given_up(place, tmp_path):
    with Pair(place, tmp_path, (at(3, signal.SIGSTOP), {})) as pair:
        pair.wait_for_state(0, "T")
        assert_given_up(pair.ended(1, HEARTBEAT + MARGIN), 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_kills_at_random_times_change_nothing_in_the_end(seed, undisturbed, place, tmp_path):
    """Before the two have met, while they compile, train, save or end; until they are left to finish."""
    random = np.random.default_rng(seed)
    for _ in range(2):
        with Pair(place, tmp_path) as pair:
            time.sleep(random.uniform(1, 8))
            victim = int(random.integers(2))
            pair.processes[victim].kill()
            pair.ended(victim)
            status, said, error = pair.ended(1 - victim, SECONDS_TO_MEET + MARGIN)
            assert status in (0, UserError.status, processes.PEER_LOST), (status, said, error)
            assert status == 0 or error.count("error: ") == 1, (said, error)
    with Pair(place, tmp_path) as pair:
        assert pair.digests()[0] == undisturbed[1]
    assert rows(tmp_path) == rows(undisturbed[0])


@pytest.mark.slow
def test_a_late_process_of_the_same_number_is_turned_away_and_the_pair_goes_on(undisturbed, place, tmp_path):
    """With a proxy in the environment, which is not used."""
    proxy = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    patient = ("--heartbeat-seconds", "100")  # the one that is held up here is not to be given up
    with Pair(place, tmp_path / "run", ({}, at(3, signal.SIGSTOP)), (patient, patient), proxy) as pair:
        pair.wait_for_state(1, "T")
        late = subprocess.run(pair.processes[1].args, env=pair.environment, capture_output=True, text=True, timeout=120)
        os.kill(pair.processes[1].pid, signal.SIGCONT)
        assert pair.digests()[0] == undisturbed[1]
    assert late.returncode == UserError.status
    assert "one with that number takes part" in late.stderr


# Steps that are refused.


@pytest.fixture
def poisoned(monkeypatch):
    """Training in which the loss of a batch is infinite where its first label is one of these."""

    def poison(labels):
        softmax = recipes.optax.softmax_cross_entropy_with_integer_labels

        def losses(logits, label):
            return jax.numpy.where(jax.numpy.isin(label[0], labels), jax.numpy.inf, softmax(logits, label))

        monkeypatch.setattr(recipes.optax, "softmax_cross_entropy_with_integer_labels", losses)

    return poison


def test_refused_steps_are_counted_and_told(tmp_path, train, poisoned, capfd):
    poisoned(np.arange(3))
    summary = train(tmp_path, parallel="jit")
    refused = summary["refused"]
    assert 0 < refused["count"] < STEPS
    assert refused == json.loads((tmp_path / "summary.json").read_text())["refused"]
    told = [row["refused"] for row in rows(tmp_path) if "refused" in row]
    assert sum(row["count"] for row in told) == refused["count"]
    assert told[0]["first"] == refused["first"]
    assert "loss" in refused["not_finite"]
    shown = capfd.readouterr().out
    assert f"{refused['count']} steps refused, the first at step {refused['first']} (not finite: loss" in shown
    assert all(np.isfinite(row["loss"]) for row in rows(tmp_path) if row["loss"] is not None)


def test_training_gives_up_after_so_many_refused_steps_in_a_row(tmp_path, train, poisoned):
    poisoned(np.arange(10))
    with pytest.raises(GaveUpError, match="gave up at step 10: the last 10 steps were refused") as caught:
        train(tmp_path, parallel="jit", give_up_after=8)
    assert caught.value.status == 1
    assert "Look at the learning rate, the data and the loss" in str(caught.value)
    assert sealed(tmp_path) == [10]
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert json.loads(text.splitlines()[0])["loss"] is None


# What users get wrong.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seed", "1"], ["process 1 was started with another seed than process 0"] * 2),
        (["--save-every", "20"], ["process 1 was started with another save_every than process 0"] * 2),
        (["--devices", "2"], ["process 1 has another number of devices than process 0 (2, not 1)"] * 2),
        (["--out", "elsewhere"], ["process 1 cannot start: see what it says", "not the directory that process 0 uses"]),
    ],
)
def test_processes_with_different_settings_all_say_so(arguments, words, place, tmp_path):
    with Pair(place, tmp_path, arguments=((), arguments)) as pair:
        ends = [pair.ended(number) for number in range(2)]
    assert [status for status, _, _ in ends] == [2, 2], ends
    for (_, _, error), expected in zip(ends, words, strict=True):
        assert expected in error


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "lenet"}, "there is no network 'lenet'; choose one of: benefits"),
        ({"data": "labels"}, "labels has the label 10 at training image 3, where benefits has the classes 0 to 9"),
        ({"steps": 12}, "12 steps are no multiple of the interval of 5"),
        ({"steps": 0}, "--steps 0: give a whole number from 1 on"),
        ({"group_size": 0}, "--group-size 0: give a whole number from 1 on"),
        ({"batch": 60}, "a batch of 60 does not divide into 8 devices"),
        ({"batch": 264}, "mnist5k has 256 examples to train on: pass a smaller --batch"),
        ({"group_size": 3}, "--group-size 3: group_size=3 does not divide"),
    ],
)
def test_bad_settings_are_refused_in_a_line(change, words, tmp_path, train):
    with pytest.raises(UserError, match=words):
        train(tmp_path, SETTINGS._replace(**change))
    assert jax.device_count() == 8


def test_a_directory_with_another_run_is_refused(undisturbed, train):
    with pytest.raises(UserError, match=r"holds another run \(its seed is 0, not 1\): choose another --out"):
        train(undisturbed[0], SETTINGS._replace(seed=1))


def test_a_directory_that_is_no_run_is_refused(tmp_path, train):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds no run"):
        train(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_directory_that_cannot_be_made_is_refused(tmp_path, train):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot use .* choose another --out"):
        train(tmp_path / "file" / "out")


def test_data_that_were_replaced_are_refused(undisturbed, dataset, train, monkeypatch):
    images = dataset.train_images.copy()
    images[0, 0, 0] ^= 1
    monkeypatch.setattr(data, "load", lambda name: dataset._replace(train_images=images))
    with pytest.raises(UserError, match="the data have been replaced since it began"):
        train(undisturbed[0])


def test_another_learning_rate_in_the_code_is_refused(undisturbed, train, monkeypatch):
    edited = recipes.RECIPES["benefits"]._replace(arguments={"learning_rate": 0.5})
    monkeypatch.setitem(recipes.RECIPES, "benefits", edited)
    with pytest.raises(UserError, match=r"its optimizer is \{'name': 'sgd', 'learning_rate': 1.0\}, not"):
        train(undisturbed[0])


def test_other_code_and_versions_are_said(undisturbed, train, monkeypatch, tmp_path, capfd):
    shutil.copytree(undisturbed[0], tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    config["provenance"]["versions"]["jax"] = "0.1"
    path.write_text(json.dumps(config | {"code": "other"}))
    train(tmp_path / "run")
    shown = capfd.readouterr().out
    assert "the code has changed since this run began" in shown
    assert f"versions have changed since this run began: jax 0.1 to {jax.__version__}" in shown


def test_rows_that_were_lost_come_back_from_the_checkpoint(undisturbed, train, tmp_path, capfd):
    out = tmp_path / "run"
    shutil.copytree(undisturbed[0], out)
    os.truncate(out / "metrics.jsonl", 10)
    (out / "progress.json").unlink()
    train(out)
    assert rows(out) == rows(undisturbed[0])
    said = capfd.readouterr().err
    assert "progress.json is missing" in said
    assert "does not hold what was written: its rows are taken from" in said


@pytest.mark.slow
def test_a_file_that_grows_too_large_for_the_disk_is_one_line(place, tmp_path):
    """A real limit, of 50 kB a file, which the arrays exceed."""
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n{PROGRAM}"
    command = [sys.executable, "-c", limited, "{}", place.dataset, "train", SETTINGS.name, "--steps", "10"]
    environment = {**os.environ, "SECONDS_TO_MEET": "1", "JAX_PLATFORMS": "cpu"}
    command += ["--interval", "5", "--out", str(tmp_path / "run")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS_FOR_ALL)
    assert ended.returncode == UserError.status, ended
    assert re.fullmatch(r"error: cannot write the checkpoint .*10 \(File too large\): make room .*\n", ended.stderr)


def test_a_directory_in_use_is_refused(undisturbed, train):
    with Holder(undisturbed[0]), pytest.raises(UserError, match="is in use by process"):
        train(undisturbed[0])


def test_a_full_disk_is_one_line_and_nothing_is_lost(tmp_path, train, rounding, monkeypatch):
    """Full when the second checkpoint is written by orbax."""
    save, calls = checkpoint.ocp.StandardCheckpointer.save, []

    def full(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise ValueError("RESOURCE_EXHAUSTED: Error writing file: No space left on device")
        return save(*arguments, **options)

    monkeypatch.setattr(checkpoint.ocp.StandardCheckpointer, "save", full)
    with pytest.raises(UserError, match=r"cannot write the checkpoint .*20 \(No space left on device\): make room"):
        train(tmp_path)
    assert open_record(tmp_path, json.loads((tmp_path / "config.json").read_text())).place.position == {"step": 10}
    train(tmp_path)
    assert_same_run(tmp_path, rounding)
