"""State of one edge's session in the cloud, common to all services: its principal and the requests it answered."""

from __future__ import annotations

from asyncio import Future
from collections import OrderedDict
from dataclasses import dataclass, field

from raycloud.link.frames import Frame, SessionKind
from raycloud.link.pieces import PieceAssembler
from raycloud.link.server.limits import SessionLimits
from raycloud.link.server.replies import RequestRefused


@dataclass(kw_only=True)
class Session:
    """Session of requests numbered from 1 on, each computed once however often it is sent."""

    id: bytes
    principal: str
    """Principal that opened the session; no other may resume it, even with the right id."""
    limits: SessionLimits
    epoch: int = 0
    expires: float = 0.0
    """Time at which the lease ends, on the monotonic clock."""
    next_seq: int = 1
    pending: dict[int, Future[Frame]] = field(default_factory=dict)
    """Replies that are not computed yet."""
    replies: OrderedDict[int, Frame] = field(default_factory=OrderedDict)
    """Latest replies, by ``seq``."""
    incoming: PieceAssembler = field(default_factory=PieceAssembler)
    """Assembler of requests; it outlives connections."""
    partial: tuple[int, int] = (0, 0)
    """``seq`` of a reply that broke off, and the number of its raw bytes that the edge has."""
    last_seen: int = 0
    """Server's number of replies, over all sessions, when this session's edge last received a frame."""

    def renew(self, now: float) -> None:
        """Renew the lease, at any frame of the session."""
        self.expires = now + self.limits.lease_s

    def repeated(self, frame: Frame) -> bool:
        """Return whether the request was accepted before.

        Raises:
            RequestRefused: requests are missing between this and the last one, or its reply is no longer kept.
        """
        if frame.seq > self.next_seq or frame.seq < 1:
            raise RequestRefused("gap", f"request {frame.seq} came where {self.next_seq} should have")
        if frame.seq == self.next_seq:
            return False
        if frame.seq not in self.pending and frame.seq not in self.replies:
            raise RequestRefused("gone", f"the reply to request {frame.seq} is no longer kept")
        return True

    def accept(self, frame: Frame, reply: Future[Frame]) -> None:
        """Register a request whose reply is being computed, and expect the next one."""
        self.next_seq = frame.seq + 1
        self.pending[frame.seq] = reply

    def resume_replies(self, ack: int, received: int) -> None:
        """Go on after the replies up to ``ack``; of the next one the edge has ``received`` raw bytes."""
        self.drop_replies(ack)
        self.partial = (ack + 1, received)

    def begin_of(self, reply: Frame) -> int:
        """Return how many raw bytes of a reply the edge has already, the first time it is sent again."""
        seq, received = self.partial
        if reply.seq != seq or isinstance(reply.kind, SessionKind):
            return 0
        self.partial = (0, 0)
        return received if received < len(reply.raw) else 0

    def drop_replies(self, ack: int) -> None:
        """Drop the replies up to ``ack``, which the edge has received."""
        for seq in [seq for seq in self.replies if seq <= ack]:
            del self.replies[seq]

    def keep_reply(self, reply: Frame) -> None:
        """Keep a computed reply, and drop the oldest beyond the credit."""
        self.pending.pop(reply.seq, None)
        self.replies[reply.seq] = reply
        while len(self.replies) > self.limits.credit:
            self.replies.popitem(last=False)
