"""Limits of a teacher that answers over a link."""

from __future__ import annotations

from pydantic import Field

from raycloud.link.server import SessionLimits


class SignalLimits(SessionLimits):
    """Limits that are checked before anything is allocated or computed."""

    sessions_per_principal: int = Field(default=64, ge=1)
    heartbeat_s: float = Field(default=5.0, gt=0, le=15)
    """Seconds between heartbeats to an edge whose request waits for those of others."""
    samples: int = Field(default=256, ge=1, le=4096)
    """Maximum number of samples of a batch."""
    length: int = Field(default=4096, ge=1)
    """Maximum number of tokens of a sample; never more than the teacher has positions for."""
    tokens: int = Field(default=65_536, ge=1)
    """Maximum number of tokens of a batch, padding included. It also bounds the raw bytes of a request."""
    reply_bytes: int = Field(default=256 * 2**20, ge=1)
    """Maximum size of a batch's signal in bytes."""
    queue: int = Field(default=64, ge=1)
    """Maximum number of replies being computed or waiting to be."""
    kept_bytes: int = Field(default=512 * 2**20, ge=0)
    """Bytes of replies cached for other students and other epochs."""
    send_s: float = Field(default=60.0, gt=0)
    """Seconds within which a peer must accept each piece of a reply, or its connection is closed."""
