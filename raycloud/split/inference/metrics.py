"""Metrics of split inference in the cloud; on a cluster the sink is Ray's metrics."""

from __future__ import annotations

from typing import Literal, Protocol

Count = Literal["tokens", "errors", "sessions_opened", "sessions_expired"]
Level = Literal["sessions", "queue", "kv_bytes"]
Duration = Literal["step_seconds"]


class InferenceMetrics(Protocol):
    """Metrics sink of split inference."""

    def count(self, name: Count, value: float = 1) -> None:
        """Add to a counter."""
        ...

    def level(self, name: Level, value: float) -> None:
        """Set a gauge."""
        ...

    def observe(self, name: Duration, seconds: float) -> None:
        """Add to a distribution."""
        ...
