"""Metrics of a session server; on a cluster the sink is Ray's metrics."""

from __future__ import annotations

from typing import Literal, Protocol


class SessionMetrics(Protocol):
    """Metrics sink of a session server."""

    def count(self, name: Literal["errors", "sessions_opened", "sessions_expired"], value: float = 1) -> None:
        """Add to a counter."""
        ...

    def level(self, name: Literal["sessions"], value: float) -> None:
        """Set a gauge."""
        ...


class NullMetrics:
    """Metrics sink that discards everything, also the further metrics of a service."""

    def count(self, name: str, value: float = 1) -> None:
        """Do nothing."""

    def level(self, name: str, value: float) -> None:
        """Do nothing."""

    def observe(self, name: str, seconds: float) -> None:
        """Do nothing."""
