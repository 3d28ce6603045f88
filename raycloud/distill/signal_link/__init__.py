"""Signals over a link: the cloud answers for its teacher, an edge asks for batches of its own.

Both ends speak in :mod:`raycloud.link.frames`. The cloud's offer comes first, then an answer to every request, in
order. Answers depend on what is asked alone, so asking again is always right.
"""

from __future__ import annotations

from raycloud.distill.signal_link.edge import LinkSignals, TeacherLink
from raycloud.distill.signal_link.host import SignalHost
from raycloud.distill.signal_link.limits import SignalLimits
from raycloud.distill.signal_link.messages import Offer

__all__ = ["LinkSignals", "Offer", "SignalHost", "SignalLimits", "TeacherLink"]
