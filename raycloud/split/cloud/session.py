"""A session: what the cloud remembers of one generation, and which steps it accepts. No input, no output."""

from __future__ import annotations

from asyncio import Future
from collections import OrderedDict
from dataclasses import dataclass, field

from raycloud.errors import LinkError
from raycloud.link.codecs.boundary import Boundary
from raycloud.link.frames import HEADER_BYTES, MAX_FRAME, Frame, Kind
from raycloud.split.cloud.limits import Limits
from raycloud.split.middle import MiddleState
from raycloud.split.plan import PlanSet, SplitPlan


class Refused(LinkError):
    """A frame that is not accepted; the session is as it was.

    Args:
        code: a word for programs.
        message: a line for people.
        expected: the seq that should have come, for the code ``gap``.
    """

    def __init__(self, code: str, message: str, expected: int = 0) -> None:
        super().__init__(message)
        self.code, self.expected = code, expected


@dataclass
class Session:
    """One generation of one edge."""

    id: bytes
    principal: str
    """Who opened it; nobody else may resume it, whatever id they guess."""
    state: MiddleState
    plans: PlanSet
    boundaries: dict[int, Boundary]
    """The codec at each cut."""
    codec: int
    max_tokens: int
    limits: Limits
    expires: float
    """On the monotonic clock."""
    epoch: int = 0
    tokens: int = 0
    """Known after the last accepted step."""
    next_seq: int = 1
    pending: dict[int, Future[Frame]] = field(default_factory=dict)
    """Replies that are not computed yet."""
    replies: OrderedDict[int, Frame] = field(default_factory=OrderedDict)
    """The latest replies."""

    def renew(self, now: float) -> None:
        """Any frame renews the lease."""
        self.expires = now + self.limits.lease_s

    def repeated(self, frame: Frame) -> bool:
        """Whether the step was accepted before.

        Raises:
            Refused: steps are missing between it and the last one, or its reply is no longer kept.
        """
        if frame.seq > self.next_seq or frame.seq < 1:
            raise Refused("gap", f"step {frame.seq} came where {self.next_seq} should have", self.next_seq)
        if frame.seq == self.next_seq:
            return False
        if frame.seq not in self.pending and frame.seq not in self.replies:
            raise Refused("gone", f"the reply to step {frame.seq} is no longer kept", self.next_seq)
        return True

    def check(self, frame: Frame) -> SplitPlan:
        """The plan of a new step, if all its numbers are within what was granted.

        Raises:
            Refused: they are not.
        """
        if frame.codec != self.codec:
            raise Refused("codec", f"codec {frame.codec} was not agreed on")
        if frame.first > frame.second or not self.plans.allows(SplitPlan(frame.first, frame.second)):
            raise Refused("plan", f"cuts ({frame.first}, {frame.second}) were not agreed on")
        if frame.first == frame.second:
            raise Refused("plan", f"cuts ({frame.first}, {frame.second}) leave nothing to do here")
        if not 1 <= frame.rows <= self.limits.rows:
            raise Refused("rows", f"a step has 1 to {self.limits.rows} rows, got {frame.rows}")
        stop = frame.pos + frame.rows
        if stop > self.max_tokens:
            raise Refused("tokens", f"token {stop} is beyond the {self.max_tokens} granted")
        if frame.keep > self.tokens or frame.pos > frame.keep:
            raise Refused("position", f"rows [{frame.pos}, {stop}) do not follow {frame.keep} of {self.tokens} tokens")
        if frame.out_rows > (0 if frame.kind is Kind.REPLAY else stop):
            raise Refused("rows", f"{frame.out_rows} rows cannot come back from {stop} tokens")
        back = self.boundaries[frame.second].payload_bytes(stop - frame.out_rows, frame.out_rows)
        if HEADER_BYTES + back > MAX_FRAME:
            raise Refused("rows", f"{frame.out_rows} rows do not fit one frame")
        implied = self.boundaries[frame.first].payload_bytes(frame.pos, frame.rows)
        if len(frame.payload) != implied:
            raise Refused("payload", f"{frame.rows} rows have {implied} bytes, got {len(frame.payload)}")
        return SplitPlan(frame.first, frame.second)

    def accept(self, frame: Frame) -> None:
        """Count a step that :meth:`check` let through."""
        self.tokens = max(frame.keep, frame.pos + frame.rows)
        self.next_seq = frame.seq + 1

    def keep_reply(self, reply: Frame) -> None:
        """Remember a reply, and forget the oldest."""
        self.replies[reply.seq] = reply
        while len(self.replies) > self.limits.replies:
            self.replies.popitem(last=False)
