"""Limits of every service on a link; each service adds its own."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from raycloud.link.frames import MAX_MESSAGE


class SessionLimits(BaseModel):
    """Limits of connections, and of the sessions that outlive them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    handshake_s: float = Field(default=5.0, gt=0)
    """Seconds within which a connection must open or resume its session."""
    send_s: float = Field(default=20.0, gt=0)
    """Seconds within which a peer must accept each piece of a reply, or lose its connection (not its session)."""
    unanswered: int = Field(default=16, ge=1, le=1024)
    """Largest number of requests on one connection without a reply. An edge within its credit never reaches it; a peer
    that does is disconnected, since a proxy in between would accept any amount of data whether or not it is read."""
    sessions: int = Field(default=64, ge=1)
    """Largest number of sessions at the same time, over all principals."""
    sessions_per_principal: int = Field(default=32, ge=1)
    """Largest number of sessions at the same time for one token."""
    lease_s: float = Field(default=60.0, gt=0)
    """Seconds without a frame after which a session is freed."""
    credit: int = Field(default=4, ge=1, le=64)
    """Largest number of requests of one session in flight. As many of its latest replies are kept: when a connection
    breaks, none of them may have arrived."""
    message_bytes: int = Field(default=MAX_MESSAGE, ge=1)
    """Largest number of raw bytes of a request."""

    @model_validator(mode="after")
    def _within(self) -> Self:
        if self.credit > self.unanswered:
            raise ValueError(
                f"credit={self.credit}: an edge that uses it is cut off at unanswered={self.unanswered}; "
                "allowed: no more credit than that"
            )
        return self
