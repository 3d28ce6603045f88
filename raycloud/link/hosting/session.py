"""What the cloud remembers of one edge's session, whatever it is for: whose it is, and which requests it answered."""

from __future__ import annotations

from asyncio import Future
from collections import OrderedDict
from dataclasses import dataclass, field

from raycloud.link.frames import Frame
from raycloud.link.hosting.answers import Refused
from raycloud.link.hosting.limits import SessionLimits


@dataclass(kw_only=True)
class Session:
    """Requests numbered from 1 on, each computed once however often it is sent."""

    id: bytes
    principal: str
    """Who opened it; nobody else may resume it, whatever id they guess."""
    limits: SessionLimits
    epoch: int = 0
    expires: float = 0.0
    """On the monotonic clock."""
    next_seq: int = 1
    pending: dict[int, Future[Frame]] = field(default_factory=dict)
    """Replies that are not computed yet."""
    replies: OrderedDict[int, Frame] = field(default_factory=OrderedDict)
    """The latest replies."""
    heard_of: int = 0
    """Of how many requests, whoever's, its edge can tell that they were answered."""

    def renew(self, now: float) -> None:
        """Any frame renews the lease."""
        self.expires = now + self.limits.lease_s

    def repeated(self, frame: Frame) -> bool:
        """Whether the request was accepted before.

        Raises:
            Refused: requests are missing between it and the last one, or its reply is no longer kept.
        """
        if frame.seq > self.next_seq or frame.seq < 1:
            raise Refused("gap", f"request {frame.seq} came where {self.next_seq} should have", self.next_seq)
        if frame.seq == self.next_seq:
            return False
        if frame.seq not in self.pending and frame.seq not in self.replies:
            raise Refused("gone", f"the reply to request {frame.seq} is no longer kept", self.next_seq)
        return True

    def accept(self, frame: Frame, reply: Future[Frame]) -> None:
        """Go on to the next request, as the reply to this one is being computed."""
        self.next_seq = frame.seq + 1
        self.pending[frame.seq] = reply

    def keep_reply(self, reply: Frame) -> None:
        """Remember a reply that was computed, and forget the oldest."""
        self.pending.pop(reply.seq, None)
        self.replies[reply.seq] = reply
        while len(self.replies) > self.limits.credit:
            self.replies.popitem(last=False)
