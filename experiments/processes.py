"""Several processes that train together: how they find each other, and how they end when one of them is lost."""

import os
import signal
import sys
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.errors import UserError

PEER_LOST = 75  # the exit status (EX_TEMPFAIL): start all processes again
TERMINATED = 128 + signal.SIGTERM


class Cluster(NamedTuple):
    """Where the processes meet.

    Attributes:
      coordinator: "host:port" that process 0 opens and the others reach; None is one process alone.
      process: this process's number, from 0.
      count: of processes.
      heartbeat_seconds: after how long a process that has frozen is given up. One that died is noticed at once.
    """

    coordinator: str | None = None
    process: int = 0
    count: int = 1
    heartbeat_seconds: int = 30


def cluster_of(coordinator: str | None, process: int | None, count: int | None, heartbeat_seconds: int) -> Cluster:
    """A Cluster from flags, else from JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID and JAX_NUM_PROCESSES.

    UserError if only some of the three are known or do not fit together.
    """
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
    return Cluster(coordinator, process, count, heartbeat_seconds)


def _number(variable):
    text = os.environ.get(variable)
    if text is None or text.isdigit():
        return None if text is None else int(text)
    raise UserError(f"{variable}={text!r} is not a number")


def join(cluster: Cluster, devices: int | None) -> None:
    """Meet the other processes; before anything else asks JAX for its devices. `devices`: of the CPU, per process."""
    if devices is not None:
        jax.config.update("jax_num_cpu_devices", devices)
    if cluster.coordinator is None:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        cluster.coordinator,
        num_processes=cluster.count,
        process_id=cluster.process,
        heartbeat_timeout_seconds=cluster.heartbeat_seconds,
        initialization_timeout=120,
    )


class Terminator:
    """Notes SIGTERM, so that training can stop between two steps; `requested` asks all processes at once."""

    def __init__(self):
        self.received = False
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_):
        self.received = True

    def requested(self) -> bool:
        """Whether any process has been told to end; every process has to ask."""
        if jax.process_count() == 1:
            return self.received
        return bool(np.any(multihost_utils.process_allgather(np.asarray(self.received))))


def give_up(error: Exception, saved: str) -> None:
    """End this process because another is lost: say so, and do not wait for the other at exit."""
    cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    print(
        f"error: a process of the {jax.process_count()} has died, frozen or lost its connection: {cause}\n{saved};"
        " start all processes again with the same commands to continue from there",
        file=sys.stderr,
        flush=True,
    )
    os._exit(PEER_LOST)
