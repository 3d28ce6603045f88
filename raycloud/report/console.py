"""Progress of a running job: live bars on a terminal, plain lines in a job's log."""

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


def print_and_log(log: logging.Logger, message: str, level: int = logging.INFO) -> None:
    """Print a message on the console and write it to the log; warnings are printed in yellow."""
    console.print(message, style="yellow" if level >= logging.WARNING else None)
    log.log(level, "%s", message)


class ProgressBars:
    """Interface of named progress bars, which are set to absolute positions."""

    def move(self, name: str, done: int, note: str = "") -> None:
        """Set a bar to ``done`` and show ``note`` beside it."""
        raise NotImplementedError


class _LiveBars(ProgressBars):
    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total = progress, total
        self._tasks: dict[str, int] = {}

    def move(self, name: str, done: int, note: str = "") -> None:
        if name not in self._tasks:
            self._tasks[name] = int(self._progress.add_task(name, total=self._total, note=""))
        self._progress.update(self._tasks[name], completed=done, note=note)  # type: ignore[arg-type]


class _PlainLines(ProgressBars):
    def __init__(self, total: int) -> None:
        self._total, self._printed, self._start = total, {}, time.monotonic()  # type: ignore[var-annotated]

    def move(self, name: str, done: int, note: str = "") -> None:
        last, at = self._printed.get(name, (-1, self._start - _LINE_EVERY_S))
        now = time.monotonic()
        if done != last and (now - at >= _LINE_EVERY_S or done == self._total):
            self._printed[name] = (done, now)
            left = (now - self._start) / max(done, 1) * (self._total - done)
            eta = f"  about {left:.0f} s left" if 0 < done < self._total else ""
            console.print(f"  {name}: {done}/{self._total}  {note}{eta}")


@contextmanager
def progress_bars(total: int) -> Iterator[ProgressBars]:
    """Show progress bars that all end at ``total``."""
    if not console.is_terminal:
        yield _PlainLines(total)
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
def timed(what: str) -> Iterator[None]:
    """Show a spinner while the block runs; then print and log its duration in seconds."""
    start = time.monotonic()
    if console.is_terminal:
        with Progress(SpinnerColumn(), TextColumn("{task.description}"), console=console, transient=True) as progress:
            progress.add_task(what, total=None)
            yield
    else:
        yield
    print_and_log(_LOG, f"{what}: {time.monotonic() - start:.1f} s")
