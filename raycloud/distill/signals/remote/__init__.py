"""Signals over a link: the cloud answers for its teacher, an edge asks for batches of its own.

Both ends have one session of :mod:`raycloud.link`. The teacher's identity comes with the grant, then a reply to every
request, in order. A reply depends on its request alone, so a request can always be repeated.
"""

from __future__ import annotations

from raycloud.distill.signals.remote.client import RemoteSignals, SignalClient
from raycloud.distill.signals.remote.limits import SignalLimits
from raycloud.distill.signals.remote.messages import TeacherServerInfo
from raycloud.distill.signals.remote.server import SignalServer
from raycloud.distill.signals.remote.teacher import ModelTeacher, SignalTeacher

__all__ = [
    "ModelTeacher",
    "RemoteSignals",
    "SignalClient",
    "SignalLimits",
    "SignalServer",
    "SignalTeacher",
    "TeacherServerInfo",
]
