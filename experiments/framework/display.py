"""What a user sees while an experiment runs."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments.framework import stopping

Track = Callable[[str, int, int], None]  # label, units done, units in all

FIRST_LINE, LONGEST_SILENCE = 5.0, 60.0  # seconds between lines, at first and at most, where there is no terminal


class _Terminal(Console):
    """A console that takes it as a request to stop when nobody reads it any more; Rich would end the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        stopping.silence(sys.stdout)
        stopping.request(signal.SIGPIPE)


def terminal() -> Console:
    """Standard output, for tables and colors."""
    return _Terminal()


@contextmanager
def progress(console: Console) -> Iterator[Track]:
    """Progress bars, one per label, or lines now and then where the console is no terminal.

    Yields `track(label, units done, units in all)`. The first units of a label, in which programs are compiled, do not
    count in the rate that is shown.
    """
    if not console.is_terminal:
        yield lines(lambda line: stopping.say(line, console.file))
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    bars = {}
    with Progress(*columns, console=console) as shown:

        def track(label: str, done: int, total: int) -> None:
            if label not in bars:
                bars[label] = shown.add_task(label, total=total, completed=done, start=False, rate="")
                return
            bar = shown.tasks[bars[label]]
            if not bar.started or bar.total != total:  # work begins, perhaps in the middle: what is done has no speed
                shown.reset(bar.id, total=total, completed=done)
            shown.update(bar.id, completed=done, rate=f"{bar.speed:.1f}/s" if bar.speed else "")

        yield track


class Rate:
    """Units per second, from the second report on: before it programs are compiled.

    Where the number of units falls or grows in all, it begins anew.
    """

    def __init__(self) -> None:
        self.start: tuple[float, int] | None = None
        self.reports, self.done, self.total = 0, 0, 0

    def of(self, done: int, total: int, now: float) -> float | None:
        """The rate once `done` of `total` units are done at the time `now`; None if it is not known."""
        if total != self.total or done < self.done:
            self.reports, self.start = 0, None
        self.reports, self.done, self.total = self.reports + 1, done, total
        if self.reports == 2:
            self.start = now, done
        if self.start is None or now <= self.start[0] or done <= self.start[1]:
            return None
        return (done - self.start[1]) / (now - self.start[0])


def lines(say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> Track:
    """A `track` that says a line when a label begins, now and then, and when it is done.

    Args:
      say: is called with each line.
      clock: the time in seconds.
    """
    rates: dict[str, Rate] = {}
    due, pause = clock() + FIRST_LINE, FIRST_LINE

    def track(label: str, done: int, total: int) -> None:
        nonlocal due, pause
        now, new = clock(), label not in rates
        rate = rates.setdefault(label, Rate()).of(done, total, now)
        if not new and done < total and now < due:
            return
        shown = f"{label}: {done} of {total}"
        if rate:
            shown += f", {rate:.1f}/s" + (f", {_in_words((total - done) / rate)} left" if done < total else "")
        say(shown)
        if now >= due:
            pause = min(2 * pause, LONGEST_SILENCE)
        due = now + pause

    return track


def _in_words(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
