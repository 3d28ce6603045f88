"""The cloud's end of a link: what every service that answers frames has in common.

:class:`SessionHost` is for services whose edges have a session that outlives broken connections; with :func:`attended`
and :func:`converse` alone, one answers whoever is connected.
"""

from __future__ import annotations

from raycloud.link.hosting.answers import Refused, TooBusy, ready, refusal
from raycloud.link.hosting.host import SessionHost, SessionMetrics
from raycloud.link.hosting.limits import ConnectionLimits, SessionLimits
from raycloud.link.hosting.line import Line, attended, converse
from raycloud.link.hosting.session import Session

__all__ = [
    "ConnectionLimits",
    "Line",
    "Refused",
    "Session",
    "SessionHost",
    "SessionLimits",
    "SessionMetrics",
    "TooBusy",
    "attended",
    "converse",
    "ready",
    "refusal",
]
