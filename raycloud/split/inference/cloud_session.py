"""Inference session: the cloud's state of one generation and the checks of its steps, without input or output."""

from __future__ import annotations

from dataclasses import dataclass

from raycloud.link.codecs.cut_codec import CutCodec
from raycloud.link.frames import MAX_MESSAGE, Frame
from raycloud.link.server import RequestRefused, Session
from raycloud.split.inference.blocks import CloudStage
from raycloud.split.inference.limits import InferenceLimits
from raycloud.split.inference.messages import InferenceKind, StepMessage
from raycloud.split.plan import PlanSet, SplitPlan


@dataclass(kw_only=True)
class InferenceSession(Session):
    """Session of one generation of one edge."""

    limits: InferenceLimits
    state: CloudStage
    plans: PlanSet
    cut_codecs: dict[int, CutCodec]
    """Codec of each cut."""
    max_tokens: int
    tokens: int = 0
    """Number of tokens known after the last accepted step."""

    def check(self, frame: Frame) -> StepMessage:
        """Check a new step against what was granted, and return its body.

        Raises:
            RequestRefused: a number of the step is not within the grant.
            FrameError: the body is no step.
        """
        step = StepMessage.parse(frame)
        cuts = f"cuts ({step.start_block}, {step.end_block})"
        if step.start_block > step.end_block or not self.plans.allows(SplitPlan(step.start_block, step.end_block)):
            raise RequestRefused("plan", f"{cuts} were not agreed on")
        if step.start_block == step.end_block:
            raise RequestRefused("plan", f"{cuts} leave nothing to do here")
        if not 1 <= step.tokens <= self.limits.step_tokens:
            raise RequestRefused("tokens", f"a step has 1 to {self.limits.step_tokens} tokens, got {step.tokens}")
        if step.stop > self.max_tokens:
            raise RequestRefused("tokens", f"token {step.stop} is beyond the {self.max_tokens} granted")
        if step.keep > self.tokens or step.start > step.keep:
            raise RequestRefused(
                "position", f"tokens [{step.start}, {step.stop}) do not follow {step.keep} of {self.tokens} tokens"
            )
        if step.wanted > (0 if frame.kind is InferenceKind.REPLAY else step.stop):
            raise RequestRefused("tokens", f"{step.wanted} hidden states cannot come back from {step.stop} tokens")
        back = self.cut_codecs[step.end_block].payload_bytes(step.stop - step.wanted, step.wanted)
        if back > MAX_MESSAGE:
            raise RequestRefused("tokens", f"{step.wanted} hidden states do not fit one reply")
        implied = self.cut_codecs[step.start_block].payload_bytes(step.start, step.tokens)
        if len(frame.raw) != implied:
            raise RequestRefused("payload", f"{step.tokens} tokens have {implied} bytes, got {len(frame.raw)}")
        return step

    def extend(self, step: StepMessage) -> None:
        """Count the tokens of a step that :meth:`check` accepted."""
        self.tokens = max(step.keep, step.stop)
