"""Split inference in the cloud: what each session is, and what its steps are answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from raycloud.link.frames import Frame, Kind, Open, Opened, Resumed, body
from raycloud.link.hosting import Refused, SessionHost, TooBusy
from raycloud.split.cloud.engine import Engine, Expired, Job, NonFinite
from raycloud.split.cloud.limits import Limits
from raycloud.split.cloud.metrics import Metrics, NoMetrics
from raycloud.split.cloud.session import Session
from raycloud.split.plan import PlanSet
from raycloud.split.terms import CODEC_NUMBERS, Codecs

_RETRY_S = 0.2
_NEVER = float("inf")


class Host(SessionHost[Session]):
    """Serves the sessions of one replica. Everything but the engine runs on one event loop.

    Args:
        engine: computes.
        codecs: the calibrated codecs, by name and cut.
        limits: what is granted.
        metrics: told of sessions, errors and memory.
        replica: a name for people.
    """

    kinds = frozenset({Kind.STEP, Kind.REPLAY})
    _limits: Limits
    _metrics: Metrics

    def __init__(
        self,
        engine: Engine,
        codecs: Codecs,
        limits: Limits | None = None,
        metrics: Metrics | None = None,
        replica: str = "",
    ) -> None:
        super().__init__(limits or Limits(), metrics or NoMetrics())
        self._engine, self._codecs, self._replica = engine, codecs, replica

    @property
    def kv_bytes(self) -> int:
        """What the keys and values of all accepted tokens take."""
        return sum(session.tokens for session in self.held()) * self._engine.kv_bytes_per_token

    def opening(self, frame: Frame, principal: str) -> Callable[[], Session]:
        """Check the edge's model, cuts and codec against what is here."""
        asked, part = body(frame, Open), self._engine.part
        if asked.fingerprint != part.fingerprint:
            raise Refused("fingerprint", f"the edge's model {asked.fingerprint[:12]} is not {part.fingerprint[:12]}")
        try:
            plans = PlanSet(tuple(asked.firsts), tuple(asked.seconds))
            boundaries = {cut: self._codecs.boundary(asked.codec, cut) for cut in plans.cuts}
        except Exception as error:  # an unknown codec, a cut that was not calibrated, impossible cuts
            raise Refused("codec", str(error)) from None
        held = part.plans.cloud
        if plans.cloud.start < held.start or plans.cloud.stop > held.stop:
            asked_for = f"[{plans.cloud.start}, {plans.cloud.stop})"
            raise Refused("plan", f"blocks {asked_for} are asked for, [{held.start}, {held.stop}) are here")
        if self._codecs.fingerprint(asked.codec) != asked.calibration:
            raise Refused("calibration", f"codec {asked.codec} is calibrated differently here")
        return lambda: Session(
            id=frame.session,
            principal=principal,
            limits=self._limits,
            epoch=frame.epoch,
            state=self._engine.open(plans),
            plans=plans,
            boundaries=boundaries,
            codec=CODEC_NUMBERS[asked.codec],
            max_tokens=min(asked.max_tokens, self._limits.tokens, part.config.max_position_embeddings),
        )

    def granted(self, session: Session) -> Opened:
        """Lease, sizes and credit."""
        return Opened(
            lease_s=self._limits.lease_s,
            max_tokens=session.max_tokens,
            max_rows=self._limits.rows,
            credit=self._limits.credit,
            replica=self._replica,
        )

    def resumed(self, session: Session) -> Resumed:
        """How much of the text is known."""
        return Resumed(tokens=session.tokens, next_seq=session.next_seq)

    def begin(self, session: Session, frame: Frame) -> Awaitable[Frame]:
        """Hand a step to the engine."""
        plan = session.check(frame)
        stop = frame.pos + frame.rows
        more = max(0, stop - session.tokens) * self._engine.kv_bytes_per_token
        if self._engine.waiting >= self._limits.queue or self.kv_bytes + more > self._limits.kv_bytes:
            raise TooBusy(_RETRY_S)
        job = Job(
            session.state,
            plan,
            frame.pos,
            frame.rows,
            frame.out_rows,
            frame.keep,
            frame.payload,
            session.boundaries[plan.first],
            session.boundaries[plan.second],
            time.monotonic() + frame.deadline_s if frame.deadline_s else _NEVER,
        )
        session.extend(frame)
        self._metrics.level("kv_bytes", self.kv_bytes)
        return _computed(frame, asyncio.wrap_future(self._engine.submit(job)))

    def freed(self, session: Session) -> None:
        """Wipe its keys and values."""
        self._engine.free(session.state)
        self._metrics.level("kv_bytes", self.kv_bytes)


async def _computed(step: Frame, rows: asyncio.Future[bytes]) -> Frame:
    try:
        payload = await rows
    except NonFinite as error:
        raise Refused("non-finite", str(error)) from None
    except Expired as error:
        raise Refused("expired", str(error)) from None
    except ValueError as error:
        raise Refused("position", str(error)) from None
    return Frame(
        Kind.STEP_OK,
        pos=step.pos + step.rows - step.out_rows,
        rows=step.out_rows,
        first=step.first,
        second=step.second,
        codec=step.codec,
        payload=payload,
    )
