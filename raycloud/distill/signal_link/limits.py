"""What a teacher on the wire answers and where it stops."""

from __future__ import annotations

from pydantic import Field

from raycloud.link.hosting import ConnectionLimits


class SignalLimits(ConnectionLimits):
    """Checked before anything is allocated or computed."""

    connections: int = Field(default=64, ge=1)
    """At the same time."""
    samples: int = Field(default=256, ge=1, le=4096)
    """Of a batch."""
    length: int = Field(default=4096, ge=1)
    """Tokens of a sample; never more than the teacher has positions for."""
    tokens: int = Field(default=65_536, ge=1)
    """Of a batch, padding included."""
    reply_bytes: int = Field(default=256 * 2**20, ge=1)
    """Of a batch's signal."""
    queue: int = Field(default=64, ge=1)
    """Answers being computed or waiting to be."""
    kept_bytes: int = Field(default=512 * 2**20, ge=0)
    """Answers kept for other students, other epochs, and whoever asks again after a broken connection."""
    send_s: float = Field(default=60.0, gt=0)
    """A peer must take each part of an answer within this time, or loses its connection."""
