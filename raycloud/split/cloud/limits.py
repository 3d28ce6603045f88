"""What the cloud grants and where it stops."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Limits(BaseModel):
    """Checked before anything is allocated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sessions: int = Field(default=64, ge=1)
    """At the same time, of all principals."""
    sessions_per_principal: int = Field(default=32, ge=1)
    """At the same time, for one token."""
    tokens: int = Field(default=4096, ge=1)
    """Per session."""
    rows: int = Field(default=512, ge=1, le=4096)
    """Per step."""
    kv_bytes: int = Field(default=4 * 2**30, ge=1)
    """Keys and values of all sessions."""
    queue: int = Field(default=256, ge=1)
    """Steps waiting for the engine."""
    lease_s: float = Field(default=60.0, gt=0)
    """A session that is silent for so long is freed."""
    handshake_s: float = Field(default=5.0, gt=0)
    """A connection must open or resume a session within this time."""
    send_s: float = Field(default=20.0, gt=0)
    """A peer must take a reply within this time, or loses its connection (not its session)."""
    credit: int = Field(default=4, ge=1, le=64)
    """Steps one session may have on their way."""
    replies: int = Field(default=4, ge=1, le=64)
    """Latest replies kept per session, to answer repeated steps from."""
    unanswered: int = Field(default=16, ge=1, le=1024)
    """Frames one connection may be ahead of the replies it takes. Within its credit no edge gets there; who does is cut
    off, as a proxy in between would take in whatever is sent whether or not anybody reads it."""
