"""Where the cloud's side reports what it does; on a cluster these are Ray's metrics."""

from __future__ import annotations

from typing import Literal, Protocol

Count = Literal["rows", "errors", "sessions_opened", "sessions_expired"]
Level = Literal["sessions", "queue", "kv_bytes"]
Duration = Literal["step_seconds"]


class Metrics(Protocol):
    """A sink of numbers."""

    def count(self, name: Count, value: float = 1) -> None:
        """Add to a counter."""
        ...

    def level(self, name: Level, value: float) -> None:
        """Set a gauge."""
        ...

    def observe(self, name: Duration, seconds: float) -> None:
        """Add to a distribution."""
        ...


class NoMetrics:
    """Reports nothing."""

    def count(self, name: Count, value: float = 1) -> None:
        """Nothing."""

    def level(self, name: Level, value: float) -> None:
        """Nothing."""

    def observe(self, name: Duration, seconds: float) -> None:
        """Nothing."""
