"""Cloud's end of a link: :class:`SessionServer`, the base class of the servers of all services."""

from __future__ import annotations

from raycloud.link.server.limits import SessionLimits
from raycloud.link.server.metrics import NullMetrics, SessionMetrics
from raycloud.link.server.replies import RequestRefused, ServerBusy, completed
from raycloud.link.server.server import SessionServer
from raycloud.link.server.session import Session

__all__ = [
    "NullMetrics",
    "RequestRefused",
    "ServerBusy",
    "Session",
    "SessionLimits",
    "SessionMetrics",
    "SessionServer",
    "completed",
]
