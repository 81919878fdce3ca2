"""What a user sees while an experiment runs and when it is done."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Track = Callable[[str, int, int], None]  # label, units done, units in all


@contextmanager
def progress(console: Console) -> Iterator[Track]:
    """Progress bars, one per label; yields `track(label, units done, units in all)`."""
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
