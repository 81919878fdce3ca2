"""Ending in an orderly way: stop requests that are noted while work goes on, and one way out of the process.

Ctrl-C, SIGTERM, SIGHUP and a closed standard output all ask to stop. Inside a `Terminator` the request is noted and
whoever trains saves and then raises `Stopped`; outside, `Stopped` is raised at once.
"""

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import IO

from experiments.framework import lock

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AGAIN = b"\nstopping as soon as this is saved; Ctrl-C again stops at once, and loses what is not saved\n"


class Stopped(BaseException):
    """The process was asked to stop, and what is done is saved.

    Attributes:
      signal: the number of the signal; SIGPIPE for a closed standard output.
      words: what was saved, for the user; may be empty.
    """

    def __init__(self, number: int, words: str = ""):
        super().__init__(number, words)
        self.signal, self.words = int(number), words

    @property
    def status(self) -> int:
        """The exit status, as a shell gives it for the signal."""
        return 128 + self.signal


class Terminator:
    """Notes requests to stop while entered; `received` is the number of the signal, 0 before.

    A second Ctrl-C ends the process at once. Outside of the main thread, signals are left alone.
    """

    def __init__(self) -> None:
        self.received = 0
        self.before: dict = {}

    def __enter__(self) -> "Terminator":
        _active.append(self)
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        _active.remove(self)
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            with contextlib.suppress(OSError):
                os.write(2, AGAIN)  # not print, which may be what was interrupted


_active: list[Terminator] = []


def request(number: int) -> None:
    """Ask to stop: noted by the innermost `Terminator`, or raised as `Stopped` where there is none."""
    if not _active:
        raise Stopped(number)
    _active[-1].received = _active[-1].received or number


@contextlib.contextmanager
def stopping_at_once() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise `Stopped` as Ctrl-C raises KeyboardInterrupt."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(line: str, file: IO[str] | None = None) -> None:
    """Print a line at once, to standard output unless `file` is given.

    Where nobody reads it any more, that is a request to stop.
    """
    stream = sys.stdout if file is None else file
    try:
        print(line, file=stream, flush=True)
    except OSError:  # a closed pipe, or a terminal that is gone
        silence(stream)
        request(signal.SIGPIPE)


def silence(stream: IO[str]) -> None:
    """Let what is still printed vanish instead of failing again."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def end_process(main: Callable[[], int]) -> None:
    """Call `main` and end the process with the status that it returns.

    Everything is flushed and then the process ends without Python's own ending, during which threads of XLA that are
    still running have crashed it (SIGSEGV, SIGABRT) and so changed its status.
    """
    try:
        status = main()
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    leave(status)


def leave(status: int) -> None:
    """End the process at once, after flushing what was printed and letting go of directories."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:  # it was closed when the process began
            continue
        try:
            stream.flush()
        except (OSError, ValueError):
            silence(stream)
    lock.release_all()
    os._exit(status)
