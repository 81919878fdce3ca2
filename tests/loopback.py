"""Ports of this machine for processes that meet."""

import socket


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
