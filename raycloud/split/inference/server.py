"""Server of split inference in the cloud: opens sessions and answers their steps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from raycloud.errors import ModelError
from raycloud.link.frames import Frame, parse_body
from raycloud.link.server import NullMetrics, RequestRefused, ServerBusy, SessionServer
from raycloud.split.cut_codecs import CutCodecs
from raycloud.split.inference.cloud_session import InferenceSession
from raycloud.split.inference.engine import DeadlineExceeded, EngineRequest, InferenceEngine, NonFiniteHidden
from raycloud.split.inference.limits import InferenceLimits
from raycloud.split.inference.messages import SERVICE, InferenceGrant, InferenceKind, OpenInference, StepMessage
from raycloud.split.inference.metrics import InferenceMetrics
from raycloud.split.plan import PlanSet, SplitPlan

_RETRY_S = 0.2
_NEVER = float("inf")


class InferenceServer(SessionServer[InferenceSession]):
    """Server of the inference sessions of one replica. Everything but the engine runs on one event loop.

    Args:
        engine: engine that computes the steps.
        codecs: codecs of the cuts.
        limits: limits of sessions.
        metrics: sink for the counts of sessions, errors and memory.
    """

    service, kinds = SERVICE, InferenceKind
    requests = frozenset({InferenceKind.STEP, InferenceKind.REPLAY})
    _limits: InferenceLimits
    _metrics: InferenceMetrics

    def __init__(
        self,
        engine: InferenceEngine,
        codecs: CutCodecs,
        limits: InferenceLimits | None = None,
        metrics: InferenceMetrics | None = None,
    ) -> None:
        super().__init__(limits or InferenceLimits(), metrics or NullMetrics())
        self._engine, self._codecs = engine, codecs

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys, values and states of all accepted tokens."""
        return self._engine.cache_bytes(len(self.held()), sum(session.tokens for session in self.held()))

    def opening(self, frame: Frame, principal: str) -> Callable[[], InferenceSession]:
        """Check the edge's model, cuts and codec against those of this server."""
        asked, part = parse_body(frame, OpenInference), self._engine.part
        if asked.fingerprint != part.fingerprint:
            raise RequestRefused(
                "fingerprint", f"the edge's model {asked.fingerprint[:12]} is not {part.fingerprint[:12]}"
            )
        try:
            plans = PlanSet(tuple(asked.start_blocks), tuple(asked.end_blocks))
            cut_codecs = {cut: self._codecs.cut_codec(asked.codec, cut) for cut in plans.cuts}
        except Exception as error:  # an unknown codec, a cut that was not calibrated, impossible cuts
            raise RequestRefused("codec", str(error)) from None
        held = part.plans.cloud
        if plans.cloud.start < held.start or plans.cloud.stop > held.stop:
            asked_for = f"[{plans.cloud.start}, {plans.cloud.stop})"
            raise RequestRefused("plan", f"blocks {asked_for} are asked for, [{held.start}, {held.stop}) are here")
        if self._codecs.fingerprint(asked.codec) != asked.calibration:
            raise RequestRefused("calibration", f"codec {asked.codec} is calibrated differently here")
        return lambda: InferenceSession(
            id=frame.session,
            principal=principal,
            limits=self._limits,
            epoch=frame.epoch,
            state=self._engine.open(plans),
            plans=plans,
            cut_codecs=cut_codecs,
            max_tokens=min(asked.max_tokens, self._limits.longest(part.config)),
        )

    def granted(self, session: InferenceSession) -> InferenceGrant:
        """Grant of lease, sizes and credit."""
        return InferenceGrant(
            lease_s=self._limits.lease_s,
            max_tokens=session.max_tokens,
            max_step_tokens=self._limits.step_tokens,
            credit=self._limits.credit,
        )

    def begin(self, session: InferenceSession, frame: Frame) -> Awaitable[Frame]:
        """Check a step and queue it at the engine."""
        step = session.check(frame)
        more = self._engine.cache_bytes(0, max(0, step.stop - session.tokens))
        if self._engine.waiting >= self._limits.queue or self.kv_bytes + more > self._limits.kv_bytes:
            raise ServerBusy(_RETRY_S)
        job = EngineRequest(
            session.state,
            SplitPlan(step.start_block, step.end_block),
            step.start,
            step.tokens,
            step.wanted,
            step.keep,
            frame.raw,
            session.cut_codecs[step.start_block],
            session.cut_codecs[step.end_block],
            time.monotonic() + step.deadline / 10 if step.deadline else _NEVER,
        )
        session.extend(step)
        self._metrics.level("kv_bytes", self.kv_bytes)
        return _computed(step, asyncio.wrap_future(self._engine.submit(job)))

    def freed(self, session: InferenceSession) -> None:
        """Erase the session's keys and values."""
        self._engine.free(session.state)
        self._metrics.level("kv_bytes", self.kv_bytes)


async def _computed(step: StepMessage, coded: asyncio.Future[bytes]) -> Frame:
    try:
        return Frame.of(InferenceKind.STEP_OK, step, await coded)
    except NonFiniteHidden as error:
        raise RequestRefused("non-finite", str(error)) from None
    except DeadlineExceeded as error:
        raise RequestRefused("expired", str(error)) from None
    except (ValueError, ModelError) as error:  # the latter: recurrent states cannot be rolled back
        raise RequestRefused("position", str(error)) from None
