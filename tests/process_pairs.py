"""Pairs of real processes on loopback with planned faults, and how far rounding alone takes the run that they share."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType
from loopback import free_port

from experiments.cluster import recipes
from jaxbn import training

STEPS, INTERVAL, SAVE_EVERY, HEARTBEAT = 40, 5, 10, 5
COMPARED = 10  # after how many steps states are compared: a checkpoint
SETTINGS = recipes.Settings("benefits", steps=STEPS, interval=INTERVAL)
ONE = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
IN_ORDER = np.arange(SETTINGS.batch)
# Promised: one that died is noticed at once, or within the heartbeat's timeout, as a frozen one is. The margin is for
# a machine whose cores are busy.
MARGIN, SECONDS_TO_MEET, SECONDS_FOR_ALL = 30, 30, 240
# Several devices sum over the batch in another order, as one process does when its batch is permuted: so many
# permutations are measured, and a run may be off by SLACK times the worst. No ReLU makes more of that: over these steps
# the input nearest to zero is 3.9e-6 from it, with inputs of size 1 and differences below 1e-6. And it is another
# program, in which each of the steps may round its update (two products and a sum) the other way.
PERMUTATIONS, SLACK = 4, 4
UPDATES = COMPARED * 3 * 2**-24
ROUNDED = 5e-6  # relative: metrics.jsonl has six digits
SIGKILLED = -signal.SIGKILL
LOST = r"error: process {} of 2 lost another: one died, froze or lost its connection"
SAVED = "What is done is saved in .*: start all processes again with the same commands to continue"

# The command line, on small data, with faults: at the step of its plan the process does to itself what a machine would.
PROGRAM = """
import json, os, sys
import numpy as np
from experiments import __main__
from experiments.cluster import meeting, processes
from experiments.framework import checkpoint, stopping
from experiments.training import data

plan, dataset, *arguments = sys.argv[1:]
dataset = data.Dataset(*np.load(dataset).values())
data.load = lambda name: dataset
meeting.SECONDS_TO_MEET = int(os.environ["SECONDS_TO_MEET"])
plan, asked = json.loads(plan), 0
ask, write = processes.stop_requested, checkpoint.write_json

def at_every_interval(terminator):
    global asked
    asked += 1
    if asked == plan.get("interval"):
        os.kill(os.getpid(), plan["signal"])
    return ask(terminator)

def before_the_seal(path, value):
    if path.parent.name == plan.get("seal"):
        os.kill(os.getpid(), plan["signal"])
    write(path, value)

processes.stop_requested, checkpoint.write_json = at_every_interval, before_the_seal
stopping.end_process(lambda: __main__.main(arguments))
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

    def __init__(self, place, out, plans=({}, {}), arguments=((), ()), more=None):
        port = free_port()
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | (more or {})
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
        self.environment = environment
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


class Terminated(NamedTuple):
    """A run that ended when its second process got SIGTERM in step 15, and how both ended."""

    out: Path
    ends: list


def process_state(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def sealed(out):
    return sorted(int(path.parent.name) for path in (out / "checkpoints").glob("*/seal.json"))


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


class Alone(NamedTuple):
    """What one process with one device, which sees the whole batch, makes of a run."""

    losses: np.ndarray  # [STEPS / INTERVAL]
    state: training.TrainState  # after COMPARED steps


class Rounding(NamedTuple):
    """One process with the whole batch, and how far from it rounding alone takes a run: norm-wise, relative."""

    run: Alone
    losses: float
    state: dict  # by the leaf's path

    def bound(self, path):
        """On the distance of another spread's leaf after COMPARED steps."""
        return SLACK * self.state[path] + UPDATES


def relative(actual, expected):
    return np.max(np.abs(actual / expected - 1))


def distances(actual, expected):
    """{path: norm of the difference over the norm} of the leaves of params and batch_stats."""

    def distance(a, b):
        return float(np.linalg.norm(np.float64(a) - np.float64(b)) / np.linalg.norm(np.float64(b)))

    found = jax.tree.map(distance, actual.variables, expected.variables)
    return {jax.tree_util.keystr(path): value for path, value in jax.tree_util.tree_leaves_with_path(found)}


def assert_same_run(out, rounding):
    """The losses of one process with the whole batch, to rounding."""
    assert [row["step"] for row in rows(out)] == list(range(INTERVAL, STEPS + 1, INTERVAL))
    assert (
        relative(np.asarray([row["loss"] for row in rows(out)]), rounding.run.losses)
        < SLACK * rounding.losses + ROUNDED
    )


def assert_same_state(actual, rounding):
    """The params and batch_stats of one process with the whole batch, to rounding."""
    found = distances(actual, rounding.run.state)
    wrong = {path: value for path, value in found.items() if value > rounding.bound(path)}
    assert not wrong, f"{wrong}; permutations: {rounding.state}"
