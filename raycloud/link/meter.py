"""Counter of the traffic of a link: bytes of messages, and their number, by kind."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Meter:
    """Counter of the bytes and the number of messages of each kind, such as ``signals`` or ``weights_up``.

    The bytes are what its users add: a channel and a session client count whole frames, headers included.
    """

    payload: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, payload_bytes: int, messages: int = 1) -> None:
        """Count the bytes of one or more messages."""
        self.payload[kind] += payload_bytes
        self.messages[kind] += messages

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(self.payload.values())
