"""Limits of the service of rounds."""

from __future__ import annotations

from pydantic import Field

from raycloud.link.server import SessionLimits

REPORT_BYTES = 2**20
"""Largest number of bytes of a contribution's report."""
HEADER_BYTES = 2**20
"""Largest number of bytes of a safetensors header, with the names and shapes of all tensors."""


class RoundLimits(SessionLimits):
    """Limits of devices' sessions. Each device has one session; the size of a contribution follows from the weights."""

    poll_s: float = Field(default=5.0, gt=0)
    """Seconds after which a request for a task is answered although there is none."""
    credit: int = Field(default=2, ge=1, le=64)
    """Largest number of requests of one session in flight."""
