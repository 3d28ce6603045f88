"""A session: what the cloud remembers of one generation, and which steps it accepts. No input, no output."""

from __future__ import annotations

from dataclasses import dataclass

from raycloud.link import hosting
from raycloud.link.codecs.boundary import Boundary
from raycloud.link.frames import HEADER_BYTES, MAX_FRAME, Frame, Kind
from raycloud.link.hosting import Refused
from raycloud.split.cloud.limits import Limits
from raycloud.split.middle import MiddleState
from raycloud.split.plan import PlanSet, SplitPlan


@dataclass(kw_only=True)
class Session(hosting.Session):
    """One generation of one edge."""

    limits: Limits
    state: MiddleState
    plans: PlanSet
    boundaries: dict[int, Boundary]
    """The codec at each cut."""
    codec: int
    max_tokens: int
    tokens: int = 0
    """Known after the last accepted step."""

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

    def extend(self, frame: Frame) -> None:
        """Count the tokens of a step that :meth:`check` let through."""
        self.tokens = max(frame.keep, frame.pos + frame.rows)
