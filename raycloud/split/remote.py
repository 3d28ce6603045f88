"""The middle at the other end of a link: one session that outlives broken connections and lost clouds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from raycloud.errors import LinkError
from raycloud.link.caller import Caller
from raycloud.link.channel import Channel
from raycloud.link.frames import HEADER_BYTES, MAX_DEADLINE_S, MAX_FRAME, Frame, Kind, Open, Opened
from raycloud.split.middle import Trip
from raycloud.split.plan import PlanSet, SplitPlan
from raycloud.split.terms import CODEC_NUMBERS, Codecs


@dataclass(frozen=True)
class Terms:
    """What the edge brings to a session."""

    fingerprint: str
    """Of the model."""
    plans: PlanSet
    codecs: Codecs
    codec: str
    max_tokens: int
    patience_s: float = 30.0
    """How long nothing may come back, reconnecting included, before the generation fails."""


@dataclass
class _Step:
    """Rows [pos, stop) on their way; several make up a trip of more rows than the cloud takes at once."""

    plan: SplitPlan
    pos: int
    stop: int
    wanted: int
    keep: int
    ends_trip: bool
    replay: bool = False


class RemoteMiddle:
    """Steps of one text over a channel, each answered exactly once however often the channel breaks.

    The edge keeps what it sent, coded: a cloud that lost the session is brought up to date with the very same bytes,
    and nothing of the edge's own state is touched.

    Args:
        connect: opens a channel; called again whenever one breaks. It is given the session's id, by which a router can
            keep a session at one replica.
        terms: model, cuts and codec.

    Raises:
        LinkError: the cloud cannot be reached in time, or refuses.
    """

    def __init__(self, connect: Callable[[str], Channel], terms: Terms) -> None:
        self._terms = terms
        self._boundaries = {cut: terms.codecs.boundary(terms.codec, cut) for cut in sorted(terms.plans.cuts)}
        self._history: dict[int, bytearray] = {}
        self._rows: dict[int, int] = {}
        # Tokens up to which the cloud holds what it needs at an index; both ends can tell it from the steps alone.
        self._known: dict[int, int] = {}
        opening = Open(
            fingerprint=terms.fingerprint,
            calibration=terms.codecs.fingerprint(terms.codec),
            codec=terms.codec,
            firsts=list(terms.plans.firsts),
            seconds=list(terms.plans.seconds),
            max_tokens=terms.max_tokens,
        )
        self._caller: Caller[_Step, Opened] = Caller(
            connect, opening, Opened, self._frame, self._replay, (Kind.STEP_OK,), terms.patience_s
        )

    def held(self, index: int) -> int:
        """Tokens whose rows at ``index`` were given already."""
        return self._rows.get(index, 0)

    def send(self, trip: Trip) -> None:
        """Code the rows and send them off.

        Raises:
            ValueError: a batch, or rows that do not follow on those given.
            LinkError: the link cannot be mended, or the cloud refuses.
        """
        if trip.rows.shape[0] != 1 or trip.valid is not None:
            raise ValueError(f"a link carries one text per session, got a batch of {trip.rows.shape[0]}")
        cut, stop = trip.plan.first, trip.stop
        self._forget(trip.keep)
        if trip.start != self.held(cut):
            raise ValueError(f"rows begin at token {trip.start} where {self.held(cut)} should follow")
        coded = self._boundaries[cut].encode(trip.rows[0], trip.start)
        self._history.setdefault(cut, bytearray()).extend(coded.numpy().tobytes())
        self._rows[cut] = stop
        # What the cloud has at this cut, as it computed it itself, need not cross.
        pos = self._known.get(cut, 0)
        steps = self._pieces(trip.plan, pos, stop, trip.keep)
        back = stop - trip.wanted
        for step in steps:
            # Where a step only catches up on tokens known already, the cloud's later blocks may be ahead of it.
            if step.stop > max(back, trip.keep):
                step.wanted, back = step.stop - back, step.stop
        steps[-1].ends_trip = True
        for index in range(cut, trip.plan.second + 1):
            self._known[index] = stop
        self._caller.send(steps)

    def receive(self) -> Tensor:
        """The rows (1, wanted, d) of the oldest trip that is not yet back.

        Raises:
            LinkError: the link cannot be mended, or the cloud refuses.
        """
        parts = []
        while True:
            step, frame = self._caller.receive()
            parts.append(self._decoded(step, frame))
            if step.ends_trip:
                return torch.cat(parts, dim=1)

    def close(self) -> None:
        """End the session, so that the cloud need not wait for its lease."""
        self._caller.close()

    def _decoded(self, step: _Step, frame: Frame) -> Tensor:
        pos = step.stop - step.wanted
        if (frame.pos, frame.rows) != (pos, step.wanted):
            raise LinkError(
                f"the cloud sent {frame.rows} rows from token {frame.pos}, asked were {step.wanted} from {pos}"
            )
        try:
            rows = self._boundaries[step.plan.second].decode(frame.payload, frame.pos, frame.rows)
        except ValueError as error:
            raise LinkError(f"the cloud's rows cannot be decoded: {error}") from None
        if not bool(torch.isfinite(rows).all()):
            raise LinkError("the cloud's rows hold infinities or NaN")
        return rows[None]

    def _pieces(self, plan: SplitPlan, pos: int, stop: int, keep: int) -> list[_Step]:
        """Steps of at most as many rows as the cloud and a frame take, none of which asks for rows back."""
        granted = self._caller.granted
        if stop > granted.max_tokens:
            raise LinkError(f"the cloud grants {granted.max_tokens} tokens, {stop} are needed")
        row = max(self._boundaries[plan.first].payload_bytes(at, 1) for at in (0, stop))
        size = max(1, min(granted.max_rows, (MAX_FRAME - HEADER_BYTES) // row))
        return [
            _Step(plan, begin, min(begin + size, stop), 0, max(keep, begin), ends_trip=False)
            for begin in range(pos, stop, size)
        ]

    def _forget(self, keep: int) -> None:
        for cut, rows in self._rows.items():
            if rows > keep:
                self._rows[cut] = keep
                del self._history[cut][self._boundaries[cut].payload_bytes(0, keep) :]
        self._known = {index: min(tokens, keep) for index, tokens in self._known.items()}

    def _payload(self, cut: int, pos: int, stop: int) -> bytes:
        boundary = self._boundaries[cut]
        begin = boundary.payload_bytes(0, pos)
        return bytes(self._history[cut][begin : begin + boundary.payload_bytes(pos, stop - pos)])

    def _frame(self, step: _Step) -> Frame:
        return Frame(
            Kind.REPLAY if step.replay else Kind.STEP,
            keep=step.keep,
            pos=step.pos,
            rows=step.stop - step.pos,
            out_rows=step.wanted,
            first=step.plan.first,
            second=step.plan.second,
            codec=CODEC_NUMBERS[self._terms.codec],
            deadline_s=min(self._terms.patience_s, MAX_DEADLINE_S),
            payload=self._payload(step.plan.first, step.pos, step.stop),
        )

    def _replay(self, steps: list[_Step]) -> list[_Step]:
        """Put what a new session must know before the unanswered steps in front of them."""
        self._known = {}
        if not steps:
            return []
        oldest = steps[0]
        replay = self._pieces(oldest.plan, 0, oldest.pos, 0)
        for step in replay:
            step.replay = True
        tokens = oldest.pos
        for step in steps:
            step.keep = min(step.keep, tokens)
            tokens = max(tokens, step.stop)
            for index in range(step.plan.first, step.plan.second + 1):
                self._known[index] = step.stop
        return [*replay, *steps]
