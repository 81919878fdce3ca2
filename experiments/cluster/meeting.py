"""How processes find each other before JAX starts: each says its number and how many there are, and waits for all.

Process 0 listens at the coordinator's address until all have come, tells them to go, and leaves the address to JAX's
coordination service. Who comes later finds that service there and is told so: a second process of the same number would
otherwise end the run of the first. A message is one line of JSON. Nothing here proves who somebody is.
"""

import contextlib
import errno
import json
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from experiments.errors import UserError

SECONDS_TO_MEET = 120
LONGEST_MESSAGE = 4096  # bytes
SECONDS_TO_SPEAK = 10  # after which a connection that has said nothing is closed
PAUSE = 0.2  # seconds between two tries to reach process 0

Say = Callable[[str], None]


class Hello(NamedTuple):
    """What a process says of itself; all but the number has to be alike.

    Attributes:
      process: its number, from 0.
      processes: how many there are.
      versions: of Python packages, in words.
    """

    process: int
    processes: int
    versions: str


def address_of(text: str) -> tuple[str, int]:
    """HOST:PORT, with brackets around an IPv6 host, as host and port; UserError if it is none."""
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise UserError(f"--coordinator {text!r}: expected HOST:PORT with a port from 1 to 65535")
    return host.strip("[]"), int(port)


def wait_for_all(listen: tuple[str, int], own: Hello, say: Say) -> None:
    """As process 0, wait until all others have come, and tell them to go.

    Args:
      listen: host and port to listen at, and at no other of this machine's addresses.
      own: what this process would say.
      say: is called with a line for the user.

    Raises:
      UserError: the address cannot be used, or somebody is missing after SECONDS_TO_MEET.
    """
    with contextlib.ExitStack() as stack:
        door = _Door(own, say)
        for server in _listen(*listen):
            stack.enter_context(server)
            door.add_server(server)
        stack.callback(door.close)
        deadline, told = time.monotonic() + SECONDS_TO_MEET, 0.0
        while door.missing():
            if time.monotonic() > deadline:
                raise UserError(
                    f"process {_numbers(door.missing())} of {own.processes} did not come to {listen[0]}:{listen[1]}"
                    f" within {SECONDS_TO_MEET} seconds: start them, with the same --coordinator and --processes"
                )
            door.attend(PAUSE)
            if door.missing() and time.monotonic() - told > SECONDS_TO_MEET / 4:
                say(f"process 0 of {own.processes}: waiting for process {_numbers(door.missing())}")
                told = time.monotonic()
        door.send_off()


def come(to: tuple[str, int], own: Hello, say: Say) -> None:
    """As any other process, come to process 0 and wait until all have.

    Args:
      to: host and port of process 0.
      own: what this process says.
      say: is called with a line for the user.

    Raises:
      UserError: process 0 cannot be reached within SECONDS_TO_MEET, does not let this process in, or is not there.
    """
    name = f"process {own.process} of {own.processes}"
    where = f"{to[0]}:{to[1]}"
    deadline, told, reason = time.monotonic() + SECONDS_TO_MEET, False, "it does not answer"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(to, timeout=5) as connection:
                connection.sendall(_line(own._asdict()))
                connection.settimeout(max(deadline - time.monotonic(), PAUSE))
                answer = _answer(connection)
            if answer == {"go": True}:
                return
            if "refused" in answer:
                raise UserError(f"{name} is not let in by process 0: {answer['refused']}")
            if answer:
                raise UserError(
                    f"what answers at {where} is not waiting for {name}: the processes have met there before, and one"
                    " with that number takes part; or another program has the port. Wait until they end, or choose"
                    " another port in --coordinator, for all processes"
                )
            reason = "it closed the connection"
        except OSError as error:
            reason = error.strerror or str(error)
        if not told:
            say(f"{name}: waiting for process 0 at {where} ({reason})")
            told = True
        time.sleep(PAUSE)
    raise UserError(
        f"process 0 cannot be reached at {where} ({reason}; tried for {SECONDS_TO_MEET} seconds): start it, and give"
        " all processes the same --coordinator"
    )


class _Guest:
    """A connection to process 0, what it has sent so far, and the number it gave."""

    def __init__(self, connection: socket.socket):
        self.connection, self.received, self.process = connection, b"", -1
        self.since = time.monotonic()


class _Door:
    """Process 0's side: who has come. A connection that says nothing sensible is closed, and does no harm."""

    def __init__(self, own: Hello, say: Say):
        self.own, self.say = own, say
        self.selector = selectors.DefaultSelector()
        self.guests: dict[int, _Guest] = {}  # by their numbers

    def add_server(self, server: socket.socket) -> None:
        server.setblocking(False)
        self.selector.register(server, selectors.EVENT_READ, None)

    def missing(self) -> list[int]:
        return [number for number in range(1, self.own.processes) if number not in self.guests]

    def attend(self, seconds: float) -> None:
        for key, _ in self.selector.select(seconds):
            if key.data is None:
                self._let_in(key.fileobj)
            else:
                self._hear(key.data)
        for guest in self._everyone():
            if guest.process < 0 and time.monotonic() - guest.since > SECONDS_TO_SPEAK:
                self._dismiss(guest)

    def send_off(self) -> None:
        """Tell all to go, and wait shortly until they hang up, so that the port is free at once."""
        for guest in self.guests.values():
            with contextlib.suppress(OSError):
                guest.connection.setblocking(True)
                guest.connection.settimeout(2)
                guest.connection.sendall(_line({"go": True}))
                while guest.connection.recv(64):
                    pass

    def close(self) -> None:
        for guest in self._everyone():
            self._dismiss(guest)
        self.selector.close()

    def _everyone(self) -> list[_Guest]:
        return [key.data for key in self.selector.get_map().values() if key.data is not None]

    def _let_in(self, server) -> None:
        with contextlib.suppress(OSError):
            connection, _ = server.accept()
            connection.setblocking(False)
            self.selector.register(connection, selectors.EVENT_READ, _Guest(connection))

    def _dismiss(self, guest: _Guest, why: str = "") -> None:
        if why:
            with contextlib.suppress(OSError):
                guest.connection.sendall(_line({"refused": why}))
        self.selector.unregister(guest.connection)
        guest.connection.close()
        if self.guests.get(guest.process) is guest:
            del self.guests[guest.process]

    def _hear(self, guest: _Guest) -> None:
        try:
            heard = guest.connection.recv(LONGEST_MESSAGE)
        except BlockingIOError:
            return
        except OSError:
            heard = b""
        guest.received += heard
        if not heard or guest.process >= 0 or len(guest.received) > LONGEST_MESSAGE:
            self._dismiss(guest)  # it hung up, or said more than it should
        elif guest.received.endswith(b"\n"):
            self._admit(guest)

    def _admit(self, guest: _Guest) -> None:
        try:
            hello = Hello(**json.loads(guest.received))
            number = int(hello.process)
        except (ValueError, TypeError):
            self._dismiss(guest)
            return
        if number in self.guests:
            self._hear(self.guests[number])  # it may have hung up meanwhile
        if hello.processes != self.own.processes:
            why = f"process 0 was started with --processes {self.own.processes}, and it with {hello.processes}"
        elif number in self.guests or not 0 < number < self.own.processes:
            why = f"process {number} is there already: give each process a --process of its own"
        elif hello.versions != self.own.versions:
            why = f"process 0 has {self.own.versions}, and it has {hello.versions}: install the same versions"
        else:
            guest.process = number
            self.guests[number] = guest
            return
        self.say(f"process 0: did not let in process {number} of {hello.processes}: {why}")
        self._dismiss(guest, why)


def _listen(host: str, port: int) -> Iterator[socket.socket]:
    """Sockets at each address of the host; UserError if there is none of this machine that can be used."""
    remedy, opened, problem = "choose another in --coordinator, for all processes", 0, None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UserError(f"process 0 cannot listen at {host}:{port} ({error.strerror or error}): {remedy}") from None
    for family, _, _, _, address in dict.fromkeys(found):
        try:
            yield socket.create_server(address[:2], family=family)
            opened += 1
        except OSError as error:
            problem = problem if isinstance(problem, OSError) and problem.errno == errno.EADDRINUSE else error
    if isinstance(problem, OSError) and (not opened or problem.errno == errno.EADDRINUSE):
        if problem.errno == errno.EADDRNOTAVAIL:
            remedy = "start process 0 on the machine of that address, or give --listen an address of this one"
        raise UserError(f"process 0 cannot open port {port} of {host} ({problem.strerror}): {remedy}")


def _line(message: dict) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _answer(connection: socket.socket) -> dict:
    """The answer of process 0; empty if it hung up; {"other": True} if it is something else."""
    received = b""
    while not received.endswith(b"\n"):
        heard = connection.recv(LONGEST_MESSAGE)
        if not heard:
            break
        received += heard
        if not received.startswith(b"{") or len(received) > LONGEST_MESSAGE:
            return {"other": True}
    try:
        answer = json.loads(received) if received else {}
    except ValueError:
        return {"other": True}
    return answer if isinstance(answer, dict) else {"other": True}


def _numbers(missing: list[int]) -> str:
    return ", ".join(map(str, missing))
