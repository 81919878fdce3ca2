"""How processes find each other, and what of it is refused before any has started."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest
from loopback import free_port

from experiments.cluster import meeting, processes
from experiments.errors import UserError
from experiments.framework import stopping

VERSIONS = "jax 1"


class Meeting:
    """Process 0 of some, waiting in a thread for the others."""

    def __init__(self, count):
        self.port, self.said, self.error = free_port(), [], None
        self.own = meeting.Hello(0, count, VERSIONS)
        self.thread = threading.Thread(target=self._wait, daemon=True)
        self.thread.start()

    def _wait(self):
        try:
            meeting.wait_for_all(("localhost", self.port), self.own, self.said.append)
        except UserError as error:
            self.error = error

    def come(self, process, count=None, versions=VERSIONS):
        hello = meeting.Hello(process, count or self.own.processes, versions)
        meeting.come(("localhost", self.port), hello, self.said.append)

    def comes(self, process):
        """The same in a thread."""
        thread = threading.Thread(target=self.come, args=(process,), daemon=True)
        thread.start()
        return thread

    def connect(self):
        deadline = time.monotonic() + 10
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                return socket.create_connection(("localhost", self.port))
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def hello(self, process):
        """A connection over which a process has said its number, and which process 0 has heard."""
        connection = self.connect()
        hello = meeting.Hello(process, self.own.processes, VERSIONS)
        connection.sendall(json.dumps(hello._asdict()).encode() + b"\n")
        time.sleep(0.3)
        return connection

    def is_over(self, seconds=10):
        self.thread.join(seconds)
        return not self.thread.is_alive() and self.error is None


def test_all_go_when_all_have_come():
    meets = Meeting(3)
    first = meets.comes(1)
    first.join(0.5)
    assert first.is_alive()
    meets.come(2)
    first.join(10)
    assert not first.is_alive()
    assert meets.is_over()


def test_the_port_is_free_at_once_after_the_meeting():
    meets = Meeting(2)
    meets.come(1)
    assert meets.is_over()
    socket.create_server(("localhost", meets.port)).close()


@pytest.mark.parametrize(
    ("process", "count", "versions", "words"),
    [
        (2, 3, VERSIONS, "process 0 was started with --processes 2, and it with 3"),
        (1, 3, VERSIONS, "process 0 was started with --processes 2, and it with 3"),
        (0, 2, VERSIONS, "process 0 is there already"),
        (1, 2, "jax 2", "process 0 has jax 1, and it has jax 2: install the same versions"),
    ],
)
def test_a_process_that_does_not_fit_is_turned_away_and_does_not_end_the_meeting(process, count, versions, words):
    meets = Meeting(2)
    with pytest.raises(UserError, match=f"is not let in by process 0: {words}"):
        meets.come(process, count, versions)
    assert any(words in line for line in meets.said)
    meets.come(1)
    assert meets.is_over()


def test_a_second_process_of_the_same_number_is_turned_away():
    meets = Meeting(3)
    with meets.hello(1):
        with pytest.raises(UserError, match="process 1 is there already: give each process a --process of its own"):
            meets.come(1)
        assert not meets.is_over(0)


def test_a_process_that_was_killed_may_come_again():
    meets = Meeting(3)
    meets.hello(1).close()
    again = meets.comes(1)
    meets.come(2)
    again.join(10)
    assert not again.is_alive()
    assert meets.is_over()


def test_a_late_process_is_told_that_the_others_have_met():
    """Something else listens there then: what it says is no line of JSON."""
    with socket.create_server(("localhost", 0)) as server:

        def greet():
            connection, _ = server.accept()
            connection.sendall(b"\x00\x00\x12\x04\x00\x00\x00\x00\x00")
            connection.recv(100)
            connection.close()

        threading.Thread(target=greet, daemon=True).start()
        with pytest.raises(UserError, match="the processes have met there before, and one with that number takes part"):
            meeting.come(server.getsockname()[:2], meeting.Hello(1, 2, VERSIONS), lambda line: None)


GARBAGE = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"\n",
    b"{}\n",
    b'{"process": []}\n',
    b"[1]\n",
    b"x" * 10_000,
    b"",
    os.urandom(300),
]


def test_garbage_and_silence_do_not_disturb_the_meeting():
    meets = Meeting(2)
    silent = [meets.connect() for _ in range(20)]
    for garbage in GARBAGE * 30:
        with meets.connect() as connection, contextlib.suppress(OSError):
            connection.sendall(garbage)
    meets.come(1)
    assert meets.is_over()
    for connection in silent:
        connection.close()


def test_who_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(meeting, "SECONDS_TO_MEET", 0.5)
    meets = Meeting(4)
    with meets.hello(2):
        meets.thread.join(10)
    assert "process 1, 3 of 4 did not come to localhost" in str(meets.error)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_process_0_listens_at_the_given_address_alone(host):
    port = free_port()
    servers = list(meeting._listen(host, port))
    try:
        socket.create_connection((host, port)).close()
        with pytest.raises(ConnectionRefusedError):  # another address of this machine
            socket.create_connection(("127.0.0.2", port))
    finally:
        for server in servers:
            server.close()


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("", 0)) as taken:
        cluster = processes.Cluster(f"localhost:{taken.getsockname()[1]}", 0, 2)
        with pytest.raises(UserError, match=r"process 0 cannot open port .* choose another in --coordinator"):
            processes.join(cluster, None)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("192.0.2.1", "start process 0 on the machine of that address"),
        ("nowhere.invalid", "process 0 cannot listen at"),
    ],
)
def test_an_address_that_is_not_of_this_machine_is_refused(address, words):
    with pytest.raises(UserError, match=words):
        processes.join(processes.Cluster(f"{address}:{free_port()}", 0, 2), None)


def test_a_coordinator_that_is_not_there_is_given_up(monkeypatch, capsys):
    monkeypatch.setattr(meeting, "SECONDS_TO_MEET", 0.3)
    with pytest.raises(UserError, match=r"process 0 cannot be reached at localhost:\d+ .* start it"):
        processes.join(processes.Cluster(f"localhost:{free_port()}", 1, 2), None)
    assert "process 1 of 2: waiting for process 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "after"),
    [({}, "h"), ({"no_proxy": "a,b"}, "a,b,h"), ({"no_proxy": "a", "no_grpc_proxy": "c"}, "c,h")],
)
def test_proxies_of_the_environment_are_not_used(monkeypatch, before, after):
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("no_grpc_proxy", before.get("no_grpc_proxy", ""))  # so that it is put back
    processes.avoid_proxies("h")
    assert os.environ["no_grpc_proxy"] == after  # noqa: SIM112  # gRPC reads small letters


@pytest.mark.parametrize(
    "given", [("localhost:1234", None, None), (None, 0, 2), ("localhost:1234", 2, 2), ("localhost", 0, 2)]
)
def test_processes_that_cannot_meet_are_refused(given, monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID", "JAX_NUM_PROCESSES"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="several processes need all three"):
        processes.cluster_of(*given, heartbeat_seconds=5)


@pytest.mark.parametrize("port", ["", "abc", "0", "99999"])
def test_a_port_that_is_none_is_refused(port):
    with pytest.raises(UserError, match="expected HOST:PORT with a port from 1 to 65535"):
        processes.cluster_of(f"localhost:{port}", 0, 2, heartbeat_seconds=5)


def test_processes_meet_by_environment_alone(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1234")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    assert processes.cluster_of(None, None, None, 5) == processes.Cluster("localhost:1234", 1, 2, 5)


def test_one_process_needs_nothing(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID", "JAX_NUM_PROCESSES"):
        monkeypatch.delenv(name, raising=False)
    assert processes.cluster_of(None, None, None, 5) == processes.Cluster(heartbeat_seconds=5)


@pytest.fixture
def beside(monkeypatch):
    """Let the next gathering find what another process, with number 1, passes."""

    def another(passes):
        monkeypatch.setattr(
            processes, "_gather", lambda value: np.stack([np.asarray(value), np.asarray(passes(value))])
        )

    return another


@pytest.mark.parametrize("name", ["seed", "devices", "data", "code"])
def test_what_another_process_was_given_differently_is_named(beside, name):
    given = {"seed": 0, "devices": 1, "data": "a", "code": "b"}
    beside(lambda _: np.stack([processes._mark(value) for value in {**given, name: "other"}.values()]))
    with pytest.raises(processes.AgreedError, match=f"process 1 was started with another {name} than process 0"):
        processes.agree(given)


@pytest.mark.parametrize(
    ("owners", "right"), [([0, 0, 1, 1], True), ([0, 1, 1], False), ([0, 0, 1], False), ([0], True)]
)
def test_processes_have_equal_numbers_of_devices(monkeypatch, owners, right):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(process_index=owner) for owner in owners])
    if right:
        processes.check_devices()
        return
    with pytest.raises(processes.AgreedError, match="process 1 has another number of devices than process 0"):
        processes.check_devices()


def test_processes_that_were_given_the_same_agree(beside):
    beside(lambda marks: marks)
    processes.agree({"seed": 0, "data": "a"})
    assert processes.prepare_together(lambda: 3) == 3
    assert processes.tell_all("t\u00f6ken") == "t\u00f6ken"


def test_what_fails_in_one_process_fails_in_all(beside):
    beside(lambda _: 1)
    with pytest.raises(processes.AgreedError, match="process 1 cannot start: see what it says"):
        processes.prepare_together(lambda: 3)

    def fail():
        raise UserError("no data")

    beside(lambda _: 0)
    with pytest.raises(processes.AgreedError, match="no data"):
        processes.prepare_together(fail)


def test_a_signal_to_any_process_stops_all(beside):
    with stopping.Terminator() as terminator:
        beside(lambda _: 15)
        assert processes.stop_requested(terminator) == 15


ABORTING = """
import ctypes, threading, time
from experiments.cluster import processes
with processes._aborts_as_lost("words"):
    threading.Thread(target=ctypes.CDLL(None).abort).start()
    time.sleep(60)
"""


def test_an_abort_by_the_runtime_ends_with_the_documented_status_and_one_message():
    ended = subprocess.run([sys.executable, "-c", ABORTING], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (processes.PEER_LOST, "words\n")


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer\nmore"), True),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: a task died"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), False),
        (ValueError("a defect"), False),
    ],
)
def test_a_lost_process_is_told_from_other_errors(error, lost):
    assert (processes.lost_peer(error) is not None) == lost
    outer = RuntimeError("orbax")
    outer.__cause__ = error
    assert (processes.lost_peer(outer) is not None) == lost
