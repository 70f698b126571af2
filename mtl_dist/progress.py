"""One progress bar for everything that takes long: a live bar on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 60.0


@contextlib.contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Give a function that is told how many items were finished since its last call."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _LinePrinter(what, total).advance
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(what, total=total, rate="")

        def advance(count: int) -> None:
            progress.update(bar, advance=count)
            speed = progress.tasks[0].speed
            progress.update(bar, rate=f"{speed:.0f}/s" if speed else "")

        yield advance


class _LinePrinter:
    def __init__(self, what: str, total: int):
        self.what, self.total, self.finished = what, total, 0
        self.begun = self.last_line = time.monotonic()

    def advance(self, count: int) -> None:
        self.finished += count
        now = time.monotonic()
        is_end = self.finished - count < self.total <= self.finished
        if now - self.last_line < LINE_EVERY_S and not is_end:
            return
        self.last_line = now
        rate = self.finished / max(now - self.begun, 1e-9)
        left = (self.total - self.finished) / max(rate, 1e-9)
        print(f"{self.what}: {self.finished} of {self.total}, {rate:.0f}/s, {left:.0f} s left", flush=True)
