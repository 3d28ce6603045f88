"""Fake clock that replaces the module ``time`` of the code under test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Time that passes only while somebody sleeps, and then at once.

    Args:
        one_thread: only the thread that makes the clock moves it; others sleep until it has.
    """

    def __init__(self, *, one_thread: bool = False) -> None:
        self.now = 0.0
        self._mover = threading.get_ident() if one_thread else None
        self._passed = threading.Condition()

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic

    def sleep(self, seconds: float) -> None:
        with self._passed:
            until = self.now + seconds
            if self._mover in (None, threading.get_ident()):
                self.now = until
                self._passed.notify_all()
            else:
                self._passed.wait_for(lambda: self.now >= until)

    @contextmanager
    def running(self) -> Iterator[Clock]:
        """Yield the clock; at the end all sleepers are woken."""
        try:
            yield self
        finally:
            with self._passed:
                self.now = float("inf")
                self._passed.notify_all()
