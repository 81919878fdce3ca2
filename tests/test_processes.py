"""Real processes on loopback: what they agree on, what happens when one is lost, and how they go on.

Faults come at chosen steps, from inside the process that they hit; the tests marked slow send them at random times.
"""

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from loopback import free_port

from experiments.cluster import processes
from experiments.cluster import train as distributed
from experiments.errors import UserError
from experiments.framework import snapshots
from experiments.training import data
from jaxbn import training

STEPS, INTERVAL, SAVE_EVERY, HEARTBEAT = 40, 5, 10, 5
COMPARED = 10  # after how many steps states are compared: a checkpoint
SETTINGS = distributed.Settings("benefits", steps=STEPS, interval=INTERVAL)
ONE = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
IN_ORDER = np.arange(SETTINGS.batch)
# Promised: one that died is noticed at once, or within the heartbeat's timeout, as a frozen one is. The margin is for
# a machine whose cores are busy.
MARGIN, SECONDS_TO_MEET, SECONDS_FOR_ALL = 30, 30, 240
# A spread sums over the batch in another order, as one process does when its batch is permuted: so many permutations
# are measured, and a spread may be off by SLACK times the worst. No ReLU makes more of that: over these steps the input
# nearest to zero is 3.9e-6 from it, with inputs of size 1 and differences below 1e-6. And it is another program, in
# which each of the steps may round its update (two products and a sum) the other way.
PERMUTATIONS, SLACK = 4, 4
UPDATES = COMPARED * 3 * 2**-24
SIGKILLED, SIGABORTED = -signal.SIGKILL, -signal.SIGABRT
LOST = r"error: process {} of 2 .* one died, froze or lost its connection(.|\n)*What is done is saved in .*:"
LOST += " start all processes again with the same commands"

# The command line, on small data, with faults: at the STEP of PLAN the process does to itself what a machine would.
PROGRAM = """
import json, os, signal, sys
import numpy as np
from experiments import __main__
from experiments.training import data
from experiments.cluster import processes
from experiments.framework import snapshots

plan, dataset, *arguments = sys.argv[1:]
dataset = data.Dataset(*np.load(dataset).values())
data.load = lambda name: dataset
processes.SECONDS_TO_MEET = int(os.environ["SECONDS_TO_MEET"])
plan, asked = json.loads(plan), 0
ask, write = processes.Terminator.requested, snapshots.write_json

def at_every_interval(terminator):
    global asked
    asked += 1
    if asked == plan.get("interval"):
        os.kill(os.getpid(), plan["signal"])
    return ask(terminator)

def before_the_seal(path, value):
    if path.name == plan.get("seal"):
        os.kill(os.getpid(), plan["signal"])
    write(path, value)

processes.Terminator.requested, snapshots.write_json = at_every_interval, before_the_seal
sys.exit(__main__.main(arguments))
"""


class Place(NamedTuple):
    """What the processes of these tests share: the data, and programs once compiled."""

    dataset: str
    cache: str


def at(interval, number):
    """That the process sends itself the signal after so many intervals."""
    return {"interval": interval, "signal": number}


class Pair:
    """Two processes that train together, one device each, over plans for the faults of both."""

    def __init__(self, place, out, plans=({}, {}), arguments=((), ()), port=None):
        port = port or free_port()
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        environment |= {
            "JAX_PLATFORMS": "cpu",
            "SECONDS_TO_MEET": str(SECONDS_TO_MEET),
            "JAX_COMPILATION_CACHE_DIR": place.cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",  # flags and environment are both in use
        }
        command = ["train", SETTINGS.name, "--processes", 2, "--steps", STEPS, "--interval", INTERVAL]
        command += ["--save-every", SAVE_EVERY, "--heartbeat-seconds", HEARTBEAT, "--out", out]
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, json.dumps(plans[number]), place.dataset]
                + [str(word) for word in [*command, "--process", number, *arguments[number]]],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(2)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            with contextlib.suppress(ValueError):  # its output was read before
                process.communicate()

    def ended(self, number, seconds=SECONDS_FOR_ALL):
        """(status, standard output, standard error) of a process that has to end within that time."""
        process = self.processes[number]
        out, error = process.communicate(timeout=seconds)
        return process.returncode, out, error

    def wait_for_state(self, number, letter):
        """Until the process has the state of that letter, as proc(5) has them."""
        deadline = time.monotonic() + SECONDS_FOR_ALL
        while (state := process_state(self.processes[number].pid)) != letter:
            assert time.monotonic() < deadline, f"process {number} is in state {state}"
            time.sleep(0.02)

    def digests(self):
        """What the two hold at the end, and what the first said."""
        ends = [self.ended(number) for number in range(2)]
        assert [status for status, _, _ in ends] == [0, 0], ends
        return [re.search(rf"step {STEPS}, sha256 (\w+)", out)[1] for _, out, _ in ends], ends[0][1]


def process_state(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def sealed(out):
    return sorted(int(path.stem.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*.json"))


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


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


class Terminated(NamedTuple):
    """A run that ended when its second process got SIGTERM in step 15, and how both ended."""

    out: Path
    ends: list


@pytest.fixture(scope="module")
def terminated(tmp_path_factory, place):
    out = tmp_path_factory.mktemp("runs") / "terminated"
    with Pair(place, out, ({}, at(3, signal.SIGTERM))) as pair:
        return Terminated(out, [pair.ended(number) for number in range(2)])


class Alone(NamedTuple):
    """What one process with one device, which sees the whole batch, makes of a run."""

    losses: np.ndarray  # [STEPS / INTERVAL]
    state: training.TrainState  # after COMPARED steps


@pytest.fixture(scope="module")
def alone(dataset):
    """A run by one device, the examples of all batches in the order that is given."""
    built = functools.cache(lambda settings: distributed.network_and_step(settings, ONE, "jit"))

    def run(order, settings=SETTINGS):
        network, step = built(settings)
        state, losses = training.replicate(distributed.start(settings, network, dataset), ONE), []
        for batch in distributed.batches(settings, dataset, 0):
            batch = training.shard_batch(jax.tree.map(lambda leaf: leaf[:, order], batch), ONE, scan=True)
            state, metrics = step(state, batch, jax.random.key(settings.seed))
            losses.append(np.mean(metrics["loss"]))
            if len(losses) * INTERVAL == COMPARED:
                then = jax.device_get(state)
        return Alone(np.asarray(losses), then)

    return run


class Rounding(NamedTuple):
    """One process with the whole batch, and how far from it rounding alone takes a run: norm-wise, relative."""

    run: Alone
    losses: float
    state: dict  # by the leaf's path

    def bound(self, path):
        """On the distance of another spread's leaf after COMPARED steps."""
        return SLACK * self.state[path] + UPDATES


@pytest.fixture(scope="module")
def rounding(alone):
    run = alone(IN_ORDER)
    others = [alone(np.random.default_rng(seed).permutation(SETTINGS.batch)) for seed in range(PERMUTATIONS)]
    losses = max(relative(other.losses, run.losses) for other in others)
    states = [distances(other.state, run.state) for other in others]
    return Rounding(run, losses, {path: max(state[path] for state in states) for path in states[0]})


def relative(actual, expected):
    return np.max(np.abs(actual / expected - 1))


def distances(actual, expected):
    """{path: norm of the difference over the norm} of the leaves of params and batch_stats."""

    def distance(a, b):
        return float(np.linalg.norm(np.float64(a) - np.float64(b)) / np.linalg.norm(np.float64(b)))

    found = jax.tree.map(distance, actual.variables, expected.variables)
    return {jax.tree_util.keystr(path): value for path, value in jax.tree_util.tree_leaves_with_path(found)}


@pytest.fixture
def train(monkeypatch, dataset):
    """Training in this process, on eight devices."""
    monkeypatch.setattr(data, "load", lambda name: dataset)

    def run(out, settings=SETTINGS, **options):
        return distributed.train(settings, out, processes.Cluster(), **{"save_every": SAVE_EVERY, **options})

    return run


def assert_same_run(out, rounding):
    """The losses of one process with the whole batch, to rounding."""
    assert [row["step"] for row in rows(out)] == list(range(INTERVAL, STEPS + 1, INTERVAL))
    assert relative(np.asarray([row["loss"] for row in rows(out)]), rounding.run.losses) < SLACK * rounding.losses


def assert_same_state(actual, rounding):
    """The params and batch_stats of one process with the whole batch, to rounding."""
    found = distances(actual, rounding.run.state)
    wrong = {path: value for path, value in found.items() if value > rounding.bound(path)}
    assert not wrong, f"{wrong}; permutations: {rounding.state}"


# What they agree on.


def test_two_processes_end_with_the_same_state_bit_for_bit(undisturbed):
    _, (first, second) = undisturbed
    assert first == second


def test_the_loss_goes_down(undisturbed):
    losses = [row["loss"] for row in rows(undisturbed[0])]
    assert losses[-1] < losses[0] / 2


def test_two_processes_hold_what_one_with_the_whole_batch_does(terminated, rounding):
    like = training.replicate(rounding.run.state, ONE)
    assert_same_state(snapshots.restore(terminated.out / "checkpoints", COMPARED, like), rounding)


def test_two_processes_report_what_one_with_the_whole_batch_does(undisturbed, rounding):
    assert_same_run(undisturbed[0], rounding)


@pytest.mark.parametrize("spread", ["jit", pytest.param("shard_map", marks=pytest.mark.slow)])
def test_eight_devices_report_what_one_with_the_whole_batch_does(spread, rounding, tmp_path, train):
    train(tmp_path, spread=spread)
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
    shutil.rmtree(out / "checkpoints" / f"step-{STEPS}")
    (out / "checkpoints" / f"step-{STEPS}.json").unlink()
    train(out)
    assert f"continuing from step {STEPS - SAVE_EVERY}" in capfd.readouterr().out
    assert_same_run(out, rounding)
    assert rows(out)[:-2] == rows(undisturbed[0])[:-2]


# Faults.


def test_a_killed_process_ends_the_other_and_both_resume_bit_for_bit(undisturbed, place, tmp_path):
    """From the checkpoint before the newest, which is cut short here as a full disk might."""
    out = tmp_path / "killed"
    with Pair(place, out, ({}, at(5, signal.SIGKILL))) as pair:
        assert pair.ended(1)[0] == SIGKILLED
        status, _, error = pair.ended(0, HEARTBEAT + MARGIN)
    assert status in (processes.PEER_LOST, SIGABORTED)
    assert re.search(LOST.format(0), error), error
    assert sealed(out) == [10, 20]
    largest = max((out / "checkpoints" / "step-20").rglob("*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    with Pair(place, out) as again:
        found, said = again.digests()
    assert "step-20 is damaged" in said
    assert "continuing from step 10" in said
    assert found == undisturbed[1]
    assert (out / "metrics.jsonl").read_text() == (undisturbed[0] / "metrics.jsonl").read_text()


def test_sigterm_to_one_saves_and_ends_both(terminated):
    assert [status for status, _, _ in terminated.ends] == [128 + signal.SIGTERM] * 2, terminated.ends
    for _, said, _ in terminated.ends:
        assert "stopped: saved step 15" in said
    assert sealed(terminated.out) == [10, 15]


def test_a_frozen_process_is_given_up(terminated, undisturbed, place, tmp_path):
    """In a run that continues."""
    out = tmp_path / "frozen"
    shutil.copytree(terminated.out, out)
    with Pair(place, out, ({}, at(3, signal.SIGSTOP))) as pair:
        pair.wait_for_state(1, "T")
        status, said, error = pair.ended(0, HEARTBEAT + MARGIN)
    assert "continuing from step 15" in said
    assert status in (processes.PEER_LOST, SIGABORTED)
    assert re.search(LOST.format(0), error), error
    assert rows(out) == rows(undisturbed[0])[:6]


def test_ctrl_c_saves_and_the_same_command_continues(rounding, tmp_path, train, monkeypatch):
    """In one process."""
    ask, asked = processes.Terminator.requested, []

    def requested(terminator):
        asked.append(terminator)
        if len(asked) == 3:
            signal.raise_signal(signal.SIGINT)
        return ask(terminator)

    monkeypatch.setattr(processes.Terminator, "requested", requested)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as end:
        train(tmp_path)
    assert end.value.code == 128 + signal.SIGINT
    assert signal.getsignal(signal.SIGINT) == before
    assert sealed(tmp_path) == [10, 15]
    train(tmp_path)
    assert_same_run(tmp_path, rounding)


@pytest.mark.slow
def test_a_first_process_killed_before_it_seals_a_checkpoint_leaves_the_one_before(undisturbed, place, tmp_path):
    plan = {"seal": "step-20.json", "signal": signal.SIGKILL}
    with Pair(place, tmp_path, (plan, {})) as pair:
        assert pair.ended(0)[0] == SIGKILLED
        status, _, error = pair.ended(1, HEARTBEAT + MARGIN)
    assert status in (processes.PEER_LOST, SIGABORTED)
    assert re.search(LOST.format(1), error), error
    with Pair(place, tmp_path) as again:
        found, said = again.digests()
    assert "it was not finished" in said
    assert "continuing from step 10" in said
    assert found == undisturbed[1]
    assert rows(tmp_path) == rows(undisturbed[0])


@pytest.mark.slow
def test_a_frozen_first_process_is_given_up(place, tmp_path):
    with Pair(place, tmp_path, (at(3, signal.SIGSTOP), {})) as pair:
        pair.wait_for_state(0, "T")
        status, _, error = pair.ended(1, HEARTBEAT + MARGIN)
    assert status in (processes.PEER_LOST, SIGABORTED)
    assert re.search(LOST.format(1), error), error


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
            assert status == 0 or "error: process" in error, (said, error)
    with Pair(place, tmp_path) as pair:
        assert pair.digests()[0] == undisturbed[1]
    assert rows(tmp_path) == rows(undisturbed[0])


# What users get wrong.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seed", "1"], ["process 1 was started with other settings than process 0"] * 2),
        (["--save-every", "20"], ["process 1 was started with other settings than process 0"] * 2),
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
    with pytest.raises(UserError, match=r"cannot write to .* choose another --out"):
        train(tmp_path / "file" / "out")
