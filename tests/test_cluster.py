"""How processes find each other, and what of it is refused before any has started."""

import socket

import pytest
from loopback import free_port

from experiments.cluster import processes
from experiments.errors import UserError


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("", 0)) as taken:
        cluster = processes.Cluster(f"localhost:{taken.getsockname()[1]}", 0, 2)
        with pytest.raises(UserError, match=r"process 0 cannot open port .* choose another in --coordinator"):
            processes.join(cluster, None)


def test_a_coordinator_that_is_not_there_is_given_up(monkeypatch, capsys):
    monkeypatch.setattr(processes, "SECONDS_TO_MEET", 0.3)
    with pytest.raises(UserError, match=r"process 0 cannot be reached at localhost:\d+ .* start it"):
        processes.join(processes.Cluster(f"localhost:{free_port()}", 1, 2), None)
    assert "process 1 of 2: waiting for process 0" in capsys.readouterr().out


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
