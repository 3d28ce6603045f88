"""What the cloud grants and where it stops."""

from __future__ import annotations

from pydantic import Field

from raycloud.link.hosting import SessionLimits


class Limits(SessionLimits):
    """Checked before anything is allocated."""

    tokens: int = Field(default=4096, ge=1)
    """Per session."""
    rows: int = Field(default=512, ge=1, le=4096)
    """Per step."""
    kv_bytes: int = Field(default=4 * 2**30, ge=1)
    """Keys and values of all sessions."""
    queue: int = Field(default=256, ge=1)
    """Steps waiting for the engine."""
