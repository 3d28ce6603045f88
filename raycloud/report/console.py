"""Progress while a job runs: live bars on a terminal, plain lines in a job's log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

console = Console(highlight=False, markup=False, soft_wrap=True)

_LINE_EVERY_S = 15.0
_LOG = logging.getLogger(__name__)


def tell(log: logging.Logger, message: str, level: int = logging.INFO) -> None:
    """Say something to whoever watches, and log it for whoever looks later."""
    console.print(message, style="yellow" if level >= logging.WARNING else None)
    log.log(level, "%s", message)


class Bars:
    """Named bars that are moved to an absolute place."""

    def move(self, name: str, done: int, note: str = "") -> None:
        """Set a bar to ``done`` and put ``note`` beside it."""
        raise NotImplementedError


class _LiveBars(Bars):
    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total = progress, total
        self._tasks: dict[str, int] = {}

    def move(self, name: str, done: int, note: str = "") -> None:
        if name not in self._tasks:
            self._tasks[name] = int(self._progress.add_task(name, total=self._total, note=""))
        self._progress.update(self._tasks[name], completed=done, note=note)  # type: ignore[arg-type]


class _Lines(Bars):
    def __init__(self, total: int) -> None:
        self._total, self._said, self._start = total, {}, time.monotonic()  # type: ignore[var-annotated]

    def move(self, name: str, done: int, note: str = "") -> None:
        said, at = self._said.get(name, (-1, self._start - _LINE_EVERY_S))
        now = time.monotonic()
        if done != said and (now - at >= _LINE_EVERY_S or done == self._total):
            self._said[name] = (done, now)
            left = (now - self._start) / max(done, 1) * (self._total - done)
            eta = f"  about {left:.0f} s left" if 0 < done < self._total else ""
            console.print(f"  {name}: {done}/{self._total}  {note}{eta}")


@contextmanager
def bars(total: int) -> Iterator[Bars]:
    """Progress bars that all end at ``total``."""
    if not console.is_terminal:
        yield _Lines(total)
        return
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield _LiveBars(progress, total)


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner and the seconds of one piece of work; one line when it is done."""
    start = time.monotonic()
    if console.is_terminal:
        with Progress(SpinnerColumn(), TextColumn("{task.description}"), console=console, transient=True) as progress:
            progress.add_task(what, total=None)
            yield
    else:
        yield
    tell(_LOG, f"{what}: {time.monotonic() - start:.1f} s")
