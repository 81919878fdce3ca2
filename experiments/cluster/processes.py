"""Several processes that train together: how they start JAX, agree, and end when one is lost or told to stop."""

import collections
import contextlib
import ctypes
import hashlib
import importlib.metadata
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.cluster import meeting
from experiments.errors import UserError
from experiments.framework import stopping

PEER_LOST = 75  # the exit status (EX_TEMPFAIL): start all processes again

Prepared = TypeVar("Prepared")


class AgreedError(UserError):
    """An error that all processes raise together."""


class Cluster(NamedTuple):
    """Where the processes meet.

    Attributes:
      coordinator: "host:port" that process 0 opens and the others reach; None is one process alone.
      process: this process's number, from 0.
      processes: how many there are.
      heartbeat_seconds: after how long a process that is silent is given up. One that died while others wait for its
        part of a step is noticed at once.
      listen: the host at whose address process 0 listens, where that is not the coordinator's: behind a proxy, say.
    """

    coordinator: str | None = None
    process: int = 0
    processes: int = 1
    heartbeat_seconds: int = 30
    listen: str | None = None

    def __str__(self) -> str:
        return f"process {self.process} of {self.processes}"


def cluster_of(
    coordinator: str | None, process: int | None, count: int | None, heartbeat_seconds: int, listen: str | None = None
) -> Cluster:
    """A Cluster from flags, else from JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID and JAX_NUM_PROCESSES.

    UserError if only some of the three are known or do not fit together.
    """
    if heartbeat_seconds < 1:
        raise UserError(f"--heartbeat-seconds {heartbeat_seconds}: give a whole number from 1 on")
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    process = _number("JAX_PROCESS_ID") if process is None else process
    count = _number("JAX_NUM_PROCESSES") if count is None else count
    if coordinator is None and process is None and count is None:
        return Cluster(heartbeat_seconds=heartbeat_seconds)
    if coordinator is None or process is None or count is None or not 0 <= process < count or ":" not in coordinator:
        raise UserError(
            f"coordinator {coordinator!r}, process {process}, {count} processes: several processes need all three, by"
            " --coordinator HOST:PORT, --process 0 ... N-1 and --processes N, or by JAX_COORDINATOR_ADDRESS,"
            " JAX_PROCESS_ID and JAX_NUM_PROCESSES"
        )
    meeting.address_of(coordinator)
    return Cluster(coordinator, process, count, heartbeat_seconds, listen)


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is None or text.isdigit():
        return None if text is None else int(text)
    raise UserError(f"{variable}={text!r} is not a number")


def join(cluster: Cluster, devices: int | None) -> None:
    """Meet the other processes and start JAX with them; before anything else asks JAX for its devices.

    Process 0 listens at the coordinator's address (or at `cluster.listen`) and at no other. Proxies that the
    environment names are not used.

    Args:
      cluster: the processes.
      devices: how many of the CPU each process makes; None leaves JAX its default.

    Raises:
      UserError: process 0 cannot open its port, the others cannot reach it, or they do not fit together.
    """
    if devices is not None:
        jax.config.update("jax_num_cpu_devices", devices)
    if cluster.coordinator is None:
        return
    host, port = meeting.address_of(cluster.coordinator)
    listen = (cluster.listen or host).strip("[]")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib"))
    own = meeting.Hello(cluster.process, cluster.processes, versions)
    if cluster.process == 0:
        meeting.wait_for_all((listen, port), own, _to_stderr)
    else:
        meeting.come((host, port), own, _to_stderr)
    avoid_proxies(host)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    words = f"error: {cluster} lost another before JAX had started: see what the others say, and start all again"
    with _aborts_as_lost(words), _interruptible():
        jax.distributed.initialize(
            cluster.coordinator,
            num_processes=cluster.processes,
            process_id=cluster.process,
            coordinator_bind_address=f"[{listen}]:{port}" if ":" in listen else f"{listen}:{port}",
            heartbeat_timeout_seconds=cluster.heartbeat_seconds,
            shutdown_timeout_seconds=cluster.heartbeat_seconds,  # a process that ends alone takes the others along
            initialization_timeout=meeting.SECONDS_TO_MEET,
        )


def avoid_proxies(host: str) -> None:
    """Let gRPC, with which JAX's processes talk to process 0, reach `host` without the proxies of the environment."""
    named = [os.environ.get(name) for name in ("no_grpc_proxy", "no_proxy")]
    before = next((value for value in named if value), "")
    os.environ["no_grpc_proxy"] = ",".join(filter(None, [before, host]))  # noqa: SIM112  # gRPC reads small letters
    with contextlib.suppress(AttributeError):  # a flag that other versions of JAX may not have
        jax.config.update("jax_check_proxy_envs", False)  # JAX's warning of what does not happen now


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends the process at once, also where Python would wait for XLA's runtime to return."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def prepare_together(prepare: Callable[[], Prepared]) -> Prepared:
    """What `prepare()` returns here; every process calls this.

    Raises:
      AgreedError: in all processes, if `prepare` failed with a UserError in one of them.
    """
    found, problem = None, None
    try:
        found = prepare()
    except UserError as error:
        problem = error
    failed = np.flatnonzero(_gather(np.int32(problem is not None)))
    if problem is not None:
        raise AgreedError(*problem.args) from problem
    if failed.size:
        raise AgreedError(f"process {failed[0]} cannot start: see what it says")
    return found  # type: ignore[return-value]  # `prepare` has returned it


def check_devices() -> None:
    """Raise an AgreedError, in all processes, where they have different numbers of devices.

    Every process knows the devices of all, and JAX can gather nothing from processes with different numbers.
    """
    counted = collections.Counter(device.process_index for device in jax.devices())
    for process, number in sorted(counted.items()):
        if number != counted[0]:
            raise AgreedError(
                f"process {process} has another number of devices than process 0 ({number}, not {counted[0]}): give all"
                " the same --devices"
            )


def agree(wanted: Mapping[str, object]) -> None:
    """Make sure that all processes were given the same; every process calls this.

    Args:
      wanted: what was given, by names for the user; compared by the repr.

    Raises:
      AgreedError: in all processes, with the first name that differs.
    """
    marks = _gather(np.stack([_mark(value) for value in wanted.values()]))
    for index, (name, value) in enumerate(wanted.items()):
        for process in range(len(marks)):
            if (marks[process, index] != marks[0, index]).any():
                raise AgreedError(
                    f"process {process} was started with another {name} than process 0 (here, in process"
                    f" {jax.process_index()}, it is {value}): give all the same"
                )


def _mark(value: object) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(repr(value).encode()).digest(), np.uint8)


def tell_all(text: str) -> str:
    """The text that process 0 passes, in all processes; every process calls this. At most 1,000 bytes."""
    sent = np.zeros(1000, np.uint8)
    sent[: len(text.encode())] = np.frombuffer(text.encode(), np.uint8)
    return bytes(_gather(sent)[0]).rstrip(b"\0").decode()


def _gather(value: np.ndarray | np.generic) -> np.ndarray:
    """The value of each process: [processes, ...]."""
    if jax.process_count() == 1:
        return np.asarray(value)[None]
    return np.asarray(multihost_utils.process_allgather(value))


def stop_requested(terminator: stopping.Terminator) -> int:
    """The signal that any process has received, 0 for none; every process has to ask."""
    return int(np.max(_gather(np.int32(terminator.received))))


def part_in_peace(cluster: Cluster) -> None:
    """Wait for the others and leave JAX's coordination service, so that none takes this process's end for a loss."""
    if cluster.processes > 1:
        jax.distributed.shutdown()


@contextlib.contextmanager
def giving_up(cluster: Cluster, saved: str) -> Iterator[None]:
    """End this process with a message and the status PEER_LOST if it loses another inside the `with`.

    Args:
      cluster: the processes.
      saved: where what is done is saved.
    """
    if cluster.processes == 1:
        yield
        return
    lost = f"error: {cluster} lost another: one died, froze or lost its connection"
    remedy = f"What is done is saved in {saved}: start all processes again with the same commands to continue."
    with _aborts_as_lost(f"{lost}.\n{remedy}"):
        try:
            yield
        except Exception as error:
            cause = lost_peer(error)
            if cause is None:
                raise
            _leave_as_lost(f"{lost} ({cause}).\n{remedy}")


_said = threading.Lock()  # whoever has it says what there is to say; nobody says it again


def _leave_as_lost(words: str) -> None:
    if not _said.acquire(blocking=False):
        time.sleep(60)  # another thread is about to end the process
    print(words, file=sys.stderr, flush=True)
    stopping.leave(PEER_LOST)


@contextlib.contextmanager
def _aborts_as_lost(words: str) -> Iterator[None]:
    """Where XLA's runtime aborts this process inside, say `words` and end with the status PEER_LOST.

    It does so in a thread of its own when it loses another process outside of a step; the callback that jaxlib 0.10 has
    for that fails with std::bad_cast. A handler of Python's would come too late: abort(3) does not return.
    """
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(number: int) -> None:
        if not _said.acquire(blocking=False):
            time.sleep(60)  # the main thread is about to end the process
        with contextlib.suppress(OSError):
            os.write(2, f"{words}\n".encode(errors="replace"))
        stopping.leave(PEER_LOST)

    before = libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        libc.signal(signal.SIGABRT, before)


def lost_peer(error: BaseException | None) -> str | None:
    """What XLA's runtime said of a lost process, if that is behind the error; else None.

    Eager operations raise it as a ValueError, and orbax raises its own from it.
    """
    while error is not None:
        said = str(error).strip() or type(error).__name__
        own = said.startswith(("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED"))  # of this process's doing
        if (isinstance(error, jax.errors.JaxRuntimeError) and not own) or "Gloo" in said:
            return said.splitlines()[0]
        error = error.__cause__ or error.__context__
    return None
