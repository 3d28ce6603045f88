"""The middle at the other end of a link: one session that outlives broken connections and lost clouds."""

from __future__ import annotations

import logging
import random
import secrets
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from raycloud.errors import LinkError
from raycloud.link.channel import Channel, LinkDown
from raycloud.link.frames import (
    HEADER_BYTES,
    MAX_DEADLINE_S,
    MAX_FRAME,
    Busy,
    Frame,
    FrameError,
    Kind,
    Open,
    Opened,
    Refusal,
    Resumed,
    body,
    unpack,
)
from raycloud.split.middle import Trip
from raycloud.split.plan import PlanSet, SplitPlan
from raycloud.split.terms import CODEC_NUMBERS, Codecs

log = logging.getLogger(__name__)

# Refusals that a repetition or a replay mends; all others end the generation.
_REPEAT, _LOST = ("gap",), ("unknown-session", "gone", "expired")
_FIRST_WAIT_S, _LONGEST_WAIT_S, _FAREWELL_S = 0.05, 2.0, 1.0


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
    seq: int = 0


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
        self._connect, self._terms = connect, terms
        self._boundaries = {cut: terms.codecs.boundary(terms.codec, cut) for cut in sorted(terms.plans.cuts)}
        self._history: dict[int, bytearray] = {}
        self._rows: dict[int, int] = {}
        # Tokens up to which the cloud holds what it needs at an index; both ends can tell it from the steps alone.
        self._known: dict[int, int] = {}
        self._away: deque[_Step] = deque()
        self._transmitted = 0
        self._channel: Channel | None = None
        self._granted: Opened | None = None
        self._session, self._epoch, self._seq, self._ack = bytes(16), 0, 0, 0
        # Whether the cloud said that it has the session.
        self._begun = False
        self._progress = time.monotonic()
        try:
            self._recover()
        except BaseException:
            self.close()
            raise

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
        self._enqueue(steps)
        for index in range(cut, trip.plan.second + 1):
            self._known[index] = stop
        if len(self._away) == len(steps):
            self._progress = time.monotonic()
        self._transmit()

    def receive(self) -> Tensor:
        """The rows (1, wanted, d) of the oldest trip that is not yet back.

        Raises:
            LinkError: the link cannot be mended, or the cloud refuses.
        """
        parts = []
        while True:
            frame = self._reply()
            step = self._away.popleft()
            self._transmitted -= 1
            self._ack, self._progress = step.seq, time.monotonic()
            self._transmit()
            parts.append(self._decoded(step, frame))
            if step.ends_trip:
                return torch.cat(parts, dim=1)

    def close(self) -> None:
        """End the session, so that the cloud need not wait for its lease."""
        if self._channel is not None:
            with suppress(LinkError, TimeoutError):
                self._channel.send(Frame(Kind.CLOSE, self._session, self._epoch).pack())
                # The cloud hangs up after its answer: an answer to a closed socket is an error in the proxy's log.
                while self._begun:
                    self._channel.receive(_FAREWELL_S)
            self._channel.close()
            self._channel = None

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

    # -- steps

    def _pieces(self, plan: SplitPlan, pos: int, stop: int, keep: int) -> list[_Step]:
        """Steps of at most as many rows as the cloud and a frame take, none of which asks for rows back."""
        assert self._granted is not None
        if stop > self._granted.max_tokens:
            raise LinkError(f"the cloud grants {self._granted.max_tokens} tokens, {stop} are needed")
        row = max(self._boundaries[plan.first].payload_bytes(at, 1) for at in (0, stop))
        size = max(1, min(self._granted.max_rows, (MAX_FRAME - HEADER_BYTES) // row))
        return [
            _Step(plan, begin, min(begin + size, stop), 0, max(keep, begin), ends_trip=False)
            for begin in range(pos, stop, size)
        ]

    def _enqueue(self, steps: list[_Step]) -> None:
        for step in steps:
            self._seq += 1
            step.seq = self._seq
            self._away.append(step)

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

    def _transmit(self, most: int | None = None) -> None:
        """Send what credit allows; a broken channel is mended by :meth:`_reply`, which is called next."""
        assert self._granted is not None
        try:
            while self._transmitted < min(len(self._away), most or self._granted.credit):
                step = self._away[self._transmitted]
                self._transmitted += 1
                self._put(self._frame_of(step))
        except LinkDown as error:
            log.info("sending failed: %s", error)

    def _frame_of(self, step: _Step) -> Frame:
        return Frame(
            Kind.REPLAY if step.replay else Kind.STEP,
            self._session,
            self._epoch,
            step.seq,
            self._ack,
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

    def _reply(self) -> Frame:
        """The reply to the oldest step."""
        seq = self._away[0].seq
        while True:
            try:
                frame = self._get(self._terms.patience_s / 3)
            except (LinkDown, FrameError, TimeoutError) as error:
                self._recover(error)
                seq = self._away[0].seq
                continue
            if frame.kind is Kind.STEP_OK and frame.seq == seq:
                return frame
            if frame.kind is Kind.BUSY:
                self._again(frame.seq, min(body(frame, Busy).retry_after_s, _LONGEST_WAIT_S), "it is busy")
            elif frame.kind is Kind.ERROR:
                refusal = body(frame, Refusal)
                if refusal.code in _LOST or refusal.code == "frame":
                    if refusal.code in _LOST:
                        self.close()
                        self._begun = False
                    self._recover(LinkDown(refusal.message))
                    seq = self._away[0].seq
                elif refusal.code in _REPEAT:
                    self._again(frame.seq, _FIRST_WAIT_S, refusal.message)
                else:
                    raise LinkError(f"the cloud refused a step: {refusal.message}")
            elif frame.kind in (Kind.GOAWAY, Kind.CLOSE):
                self._recover(LinkDown("the replica left"))
                seq = self._away[0].seq
            # Anything else is the answer to a step that was repeated.

    def _again(self, seq: int, wait_s: float, why: str) -> None:
        """Send a step again that was not accepted, and those behind it once it is answered.

        They were not accepted either: sent along, each would be refused and repeated again, and ever more of them.
        """
        index = seq - self._away[0].seq
        if 0 <= index < self._transmitted:
            self._pause(wait_s, why)
            self._transmitted = index
            self._transmit(index + 1)

    def _repeat(self) -> None:
        self._transmitted = 0
        self._transmit()

    # -- connections

    def _recover(self, cause: Exception | None = None) -> None:
        """Connect, resume the session or begin it anew, and send again what was not answered."""
        wait = 0.0
        while True:
            if cause is not None:
                log.info("reconnecting: %s", cause or type(cause).__name__)
                self._pause(wait, str(cause) or "no reply in time")
                wait = min(max(_FIRST_WAIT_S, 2 * wait), _LONGEST_WAIT_S)
            if self._channel is not None:
                self._channel.close()
                self._channel = None
            try:
                if not self._begun:
                    self._session, self._epoch = secrets.token_bytes(16), 0
                self._channel = self._connect(self._session.hex())
                self._attach()
                self._repeat()
                return
            except (LinkDown, FrameError, TimeoutError) as error:
                cause = error

    def _attach(self) -> None:
        if self._begun:
            self._epoch += 1
            reply = self._ask(Frame(Kind.RESUME, self._session, self._epoch, self._seq, self._ack))
            if reply.kind is Kind.RESUMED:
                body(reply, Resumed)
                return
            code = body(reply, Refusal).code if reply.kind is Kind.ERROR else ""
            if code == "epoch":
                raise LinkDown("another connection took the session over")
            if code != "unknown-session":
                raise self._refused(reply)
            # The next connection is made under the next session's id, by which a router will find it again.
            self._begun = False
            raise LinkDown("the cloud no longer has the session")
        self._open()
        self._replay()

    def _open(self) -> None:
        terms = self._terms
        asked = Open(
            fingerprint=terms.fingerprint,
            calibration=terms.codecs.fingerprint(terms.codec),
            codec=terms.codec,
            firsts=list(terms.plans.firsts),
            seconds=list(terms.plans.seconds),
            max_tokens=terms.max_tokens,
        )
        reply = self._ask(Frame(Kind.OPEN, self._session, payload=asked.pack()))
        if reply.kind is not Kind.OPEN_OK:
            raise self._refused(reply)
        self._granted, self._begun = body(reply, Opened), True

    def _replay(self) -> None:
        """Put what the cloud must know before the unanswered steps in front of them."""
        steps, self._away, self._known = list(self._away), deque(), {}
        self._seq = self._ack = 0
        if not steps:
            return
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
        self._enqueue([*replay, *steps])

    def _ask(self, frame: Frame) -> Frame:
        self._put(frame)
        return self._get(self._terms.patience_s / 3)

    def _refused(self, reply: Frame) -> LinkError:
        if reply.kind is Kind.BUSY:
            return LinkDown("the cloud holds as many sessions as it can")
        if reply.kind is Kind.GOAWAY:
            return LinkDown("the replica left")
        if reply.kind is not Kind.ERROR:
            return LinkError(f"the cloud answered {reply.kind.name} where it should have opened a session")
        refusal = body(reply, Refusal)
        if refusal.code == "frame":
            return LinkDown(refusal.message)
        return LinkError(f"the cloud refused the session: {refusal.message}")

    def _put(self, frame: Frame) -> None:
        if self._channel is None:
            raise LinkDown("not connected")
        self._channel.send(frame.pack())

    def _get(self, timeout_s: float) -> Frame:
        if self._channel is None:
            raise LinkDown("not connected")
        return unpack(self._channel.receive(timeout_s))

    def _pause(self, seconds: float, why: str) -> None:
        """Wait a little, with jitter so that many edges do not come back at once.

        Raises:
            LinkError: patience has run out.
        """
        if time.monotonic() + seconds > self._progress + self._terms.patience_s:
            raise LinkError(f"no answer from the cloud within {self._terms.patience_s:g} s: {why}")
        time.sleep(seconds * random.uniform(0.5, 1.0))
