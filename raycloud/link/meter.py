"""Counter of the traffic of a link: payload bytes and messages, by kind."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Meter:
    """Counter of payload bytes and messages of each kind, such as ``signals`` or ``weights_up``."""

    payload: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, payload_bytes: int, messages: int = 1) -> None:
        """Count the payload bytes of one or more messages."""
        self.payload[kind] += payload_bytes
        self.messages[kind] += messages

    def merge(self, other: Meter) -> None:
        """Add the counts of another meter."""
        self.payload.update(other.payload)
        self.messages.update(other.messages)

    @property
    def total(self) -> int:
        """Payload bytes of all kinds."""
        return sum(self.payload.values())
