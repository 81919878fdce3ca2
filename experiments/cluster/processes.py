"""Several processes that train together: how they meet, agree, and end when one of them is lost or told to stop."""

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.errors import UserError

PEER_LOST = 75  # the exit status (EX_TEMPFAIL): start all processes again
SECONDS_TO_MEET = 120

Prepared = TypeVar("Prepared")


class Cluster(NamedTuple):
    """Where the processes meet.

    Attributes:
      coordinator: "host:port" that process 0 opens and the others reach; None is one process alone.
      process: this process's number, from 0.
      count: of processes.
      heartbeat_seconds: after how long a process that is silent is given up. One that died while others wait for its
        part of a step is noticed at once.
    """

    coordinator: str | None = None
    process: int = 0
    count: int = 1
    heartbeat_seconds: int = 30

    def __str__(self):
        return f"process {self.process} of {self.count}"


def cluster_of(coordinator: str | None, process: int | None, count: int | None, heartbeat_seconds: int) -> Cluster:
    """A Cluster from flags, else from JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID and JAX_NUM_PROCESSES.

    UserError if only some of the three are known or do not fit together.
    """
    if heartbeat_seconds < 1:
        raise UserError(f"--heartbeat-seconds {heartbeat_seconds}: give a whole number from 1 on")
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    process = _number("JAX_PROCESS_ID") if process is None else process
    count = _number("JAX_NUM_PROCESSES") if count is None else count
    known = (coordinator, process, count)
    if known == (None, None, None):
        return Cluster(heartbeat_seconds=heartbeat_seconds)
    if None in known or not 0 <= process < count or ":" not in coordinator:
        raise UserError(
            f"coordinator {coordinator!r}, process {process}, {count} processes: several processes need all three, by"
            " --coordinator HOST:PORT, --process 0 ... N-1 and --processes N, or by JAX_COORDINATOR_ADDRESS,"
            " JAX_PROCESS_ID and JAX_NUM_PROCESSES"
        )
    port = coordinator.rpartition(":")[2]
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise UserError(f"--coordinator {coordinator!r}: expected HOST:PORT with a port from 1 to 65535")
    return Cluster(coordinator, process, count, heartbeat_seconds)


def _number(variable):
    text = os.environ.get(variable)
    if text is None or text.isdigit():
        return None if text is None else int(text)
    raise UserError(f"{variable}={text!r} is not a number")


def join(cluster: Cluster, devices: int | None) -> None:
    """Meet the other processes; before anything else asks JAX for its devices.

    Args:
      cluster: the processes.
      devices: how many of the CPU each process makes; None leaves JAX its default.

    Raises:
      UserError: process 0 cannot open its port, or the others cannot reach it within SECONDS_TO_MEET.
    """
    if devices is not None:
        jax.config.update("jax_num_cpu_devices", devices)
    if cluster.coordinator is None:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    _try_port(cluster) if cluster.process == 0 else _wait_for_port(cluster)
    words = (
        f"error: {cluster} has not met the others at {cluster.coordinator} within {SECONDS_TO_MEET} seconds, or was"
        f" stopped before. Start {cluster.count} processes, numbered from 0, with the same --coordinator and"
        " --processes."
    )
    with LastWords(words), _interruptible():
        jax.distributed.initialize(
            cluster.coordinator,
            num_processes=cluster.count,
            process_id=cluster.process,
            heartbeat_timeout_seconds=cluster.heartbeat_seconds,
            shutdown_timeout_seconds=cluster.heartbeat_seconds,  # a process that ends alone takes the others along
            initialization_timeout=SECONDS_TO_MEET,
        )


def _try_port(cluster):
    """XLA's runtime crashes without a word where the port is taken."""
    port = _port(cluster)
    both = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
    try:
        socket.create_server(("", port), **both).close()
    except OSError as error:
        raise UserError(
            f"process 0 cannot open port {port} ({os.strerror(error.errno)}): choose another in --coordinator, for all"
            " processes"
        ) from None


def _wait_for_port(cluster):
    host = cluster.coordinator.rpartition(":")[0].strip("[]")
    deadline, waiting = time.monotonic() + SECONDS_TO_MEET, False
    while True:
        try:
            socket.create_connection((host, _port(cluster)), timeout=5).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise UserError(
                f"process 0 cannot be reached at {cluster.coordinator} ({reason}; tried for {SECONDS_TO_MEET} seconds):"
                " start it, and give all processes the same --coordinator"
            )
        if not waiting:
            print(f"{cluster}: waiting for process 0 at {cluster.coordinator} ({reason})", flush=True)
            waiting = True
        time.sleep(0.2)


def _port(cluster):
    return int(cluster.coordinator.rpartition(":")[2])


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends the process at once, also where Python would wait for XLA's runtime to return."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def prepare_together(prepare: Callable[[], Prepared], wanted: object) -> Prepared:
    """What `prepare()` returns here; every process calls this.

    Args:
      prepare: what may fail with a UserError in one process and not in another.
      wanted: what all processes have to be given alike; compared by its repr.

    Raises:
      UserError: in all processes, if `wanted` differs or `prepare` failed in one of them.
    """
    found, problem = None, None
    try:
        found = prepare()
    except UserError as error:
        problem = error
    if jax.process_count() > 1:
        _agree(problem, wanted)
    if problem:
        raise problem
    return found


def _agree(problem, wanted):
    mark = np.frombuffer(hashlib.sha256(repr(wanted).encode()).digest(), np.uint8)
    marks = np.asarray(multihost_utils.process_allgather(np.append(mark, np.uint8(problem is not None))))
    for process, row in enumerate(marks):
        if (row[:-1] != marks[0, :-1]).any():
            raise UserError(
                f"process {process} was started with other settings than process 0 (this is process"
                f" {jax.process_index()}: {wanted}): give all the same"
            )
    failed = np.flatnonzero(marks[:, -1])
    if failed.size and not problem:
        raise UserError(f"process {failed[0]} cannot start: see what it says")


class Terminator:
    """Notes SIGTERM and Ctrl-C while entered, so that training can stop between two steps.

    A second Ctrl-C ends the process at once.
    """

    def __init__(self):
        self.received = 0

    def __enter__(self):
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, _):
        self.received = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            # Not print, which may be what was interrupted.
            os.write(2, b"\nstopping after these steps; Ctrl-C again stops at once, and loses them\n")

    def requested(self) -> int:
        """The signal that any process has received, 0 for none; every process has to ask."""
        if jax.process_count() == 1:
            return self.received
        return int(np.max(multihost_utils.process_allgather(np.int32(self.received))))


class LastWords:
    """A child that prints `words` on standard error if this process ends inside the `with`, killed or aborted.

    Where a process loses another outside a step, XLA's runtime aborts it, with a stack trace, before Python can
    explain; the callback that jaxlib 0.10 has for that fails with std::bad_cast.
    """

    def __init__(self, words: str):
        self.words = words

    def __enter__(self):
        script = 'read -r _ || printf "%s\\n" "$1" >&2'
        self.child = subprocess.Popen(
            ["/bin/sh", "-c", script, "sh", self.words],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is not for the child
        )
        return self

    def __exit__(self, *_):
        self.dismiss()

    def dismiss(self) -> None:
        """What there is to say has been said."""
        self.child.communicate(b"\n")


@contextlib.contextmanager
def giving_up(cluster: Cluster, saved: str) -> Iterator[None]:
    """End this process with a message if it loses another inside the `with`, with the status PEER_LOST if it can.

    Args:
      cluster: the processes.
      saved: where what is done is saved.
    """
    if cluster.count == 1:
        yield
        return
    remedy = (
        f"What is done is saved in {saved}: start all processes again with the same commands to continue from there."
    )
    words = f"error: {cluster} was killed, or ended because it lost another: one died, froze or lost its connection"
    with LastWords(f"{words}.\n{remedy}") as last_words:
        try:
            yield
        except Exception as error:
            cause = _lost_peer(error)
            if cause is None:
                raise
            lost = f"error: {cluster} lost another: one died, froze or lost its connection ({cause})"
            print(f"{lost}.\n{remedy}", file=sys.stderr, flush=True)
            last_words.dismiss()
            os._exit(PEER_LOST)  # at exit JAX would wait for the other


def _lost_peer(error: BaseException | None) -> str | None:
    """What XLA's runtime said of a lost process, if that is behind the error; else None.

    Eager operations raise it as a ValueError, and orbax raises its own from it.
    """
    while error is not None:
        said = str(error).strip() or type(error).__name__
        if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in said:
            return said.splitlines()[0]
        error = error.__cause__ or error.__context__
    return None
