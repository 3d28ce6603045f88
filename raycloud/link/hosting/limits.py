"""Where every service on a link stops; each adds what is its own."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ConnectionLimits(BaseModel):
    """Of one connection."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    handshake_s: float = Field(default=5.0, gt=0)
    """A connection must open what it came for within this time."""
    send_s: float = Field(default=20.0, gt=0)
    """A peer must take each frame of a reply within this time, or loses its connection (not its session)."""
    unanswered: int = Field(default=16, ge=1, le=1024)
    """Frames one connection may be ahead of the replies it takes. Within its credit no edge gets there; who does is cut
    off, as a proxy in between would take in whatever is sent whether or not anybody reads it."""


class SessionLimits(ConnectionLimits):
    """Of sessions that outlive their connections."""

    sessions: int = Field(default=64, ge=1)
    """At the same time, of all principals."""
    sessions_per_principal: int = Field(default=32, ge=1)
    """At the same time, for one token."""
    lease_s: float = Field(default=60.0, gt=0)
    """A session that is silent for so long is freed."""
    credit: int = Field(default=4, ge=1, le=64)
    """Requests one session may have on their way. So many of its latest replies are kept: where a connection breaks,
    none of them may have arrived."""

    @model_validator(mode="after")
    def _within(self) -> Self:
        if self.credit > self.unanswered:
            raise ValueError(
                f"credit={self.credit}: an edge that uses it is cut off at unanswered={self.unanswered}; "
                "allowed: no more credit than that"
            )
        return self
