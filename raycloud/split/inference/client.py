"""Client of the cloud blocks over a link: one session that outlives broken connections and lost clouds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from raycloud.errors import LinkError
from raycloud.link.channel import Channel
from raycloud.link.client import SessionClient
from raycloud.link.frames import MAX_MESSAGE, Frame
from raycloud.split.cut_codecs import CutCodecs
from raycloud.split.inference.blocks import StepRequest
from raycloud.split.inference.messages import MAX_DEADLINE, InferenceGrant, InferenceKind, OpenInference, StepMessage
from raycloud.split.plan import PlanSet, SplitPlan

PATIENCE_S = 30.0
"""Time in seconds that an edge gives a cloud which does not answer."""


@dataclass(frozen=True)
class SessionConfig:
    """Configuration of a session, given by the edge."""

    fingerprint: str
    """Fingerprint of the model."""
    plans: PlanSet
    codecs: CutCodecs
    codec: str
    max_tokens: int
    patience_s: float = PATIENCE_S
    """Longest time in seconds without an answer, reconnecting included, before the generation fails."""


@dataclass
class _Step:
    """Step of the tokens [start, stop); a request of more tokens than the cloud accepts at once is several steps."""

    plan: SplitPlan
    start: int
    stop: int
    wanted: int
    keep: int
    ends_request: bool
    replay: bool = False


class RemoteBlocks:
    """Cloud blocks over a link, for one text; each request is answered exactly once however often the channel breaks.

    The edge keeps the coded bytes it sent: a cloud that lost the session receives the same bytes again, and the edge's
    own state does not change.

    Args:
        connect: opens a channel; called again whenever one breaks. Its argument is the session's id, by which a router
            can keep a session at one replica.
        config: configuration of the session: model, cuts and codec.

    Raises:
        LinkError: the cloud cannot be reached in time, or refuses.
    """

    def __init__(self, connect: Callable[[str], Channel], config: SessionConfig) -> None:
        self._config = config
        self._cut_codecs = {cut: config.codecs.cut_codec(config.codec, cut) for cut in sorted(config.plans.cuts)}
        self._sent_payload: dict[int, bytearray] = {}
        self._tokens: dict[int, int] = {}
        # Tokens up to which the cloud has what it needs at an index; both ends derive it from the steps alone.
        self._known: dict[int, int] = {}
        opening = OpenInference(
            fingerprint=config.fingerprint,
            calibration=config.codecs.fingerprint(config.codec),
            codec=config.codec,
            start_blocks=list(config.plans.start_blocks),
            end_blocks=list(config.plans.end_blocks),
            max_tokens=config.max_tokens,
        )
        self._client: SessionClient[_Step, InferenceGrant] = SessionClient(
            connect, InferenceKind, opening, InferenceGrant, self._frame, self._replay, config.patience_s
        )

    def held(self, index: int) -> int:
        """Number of tokens whose hidden states at ``index`` need not be given again: they were."""
        return self._tokens.get(index, 0)

    def send(self, request: StepRequest) -> None:
        """Encode the hidden states and send them.

        Raises:
            ValueError: the request is a batch, or does not begin after the tokens already given.
            LinkError: reconnecting failed, or the cloud refuses.
        """
        if request.hidden.shape[0] != 1 or request.valid is not None:
            raise ValueError(f"a link carries one text per session, got a batch of {request.hidden.shape[0]}")
        cut, stop = request.plan.start_block, request.stop
        self._roll_back(request.keep)
        if request.start != self.held(cut):
            raise ValueError(f"hidden states begin at token {request.start} where {self.held(cut)} should follow")
        coded = self._cut_codecs[cut].encode(request.hidden[0], request.start)
        self._sent_payload.setdefault(cut, bytearray()).extend(coded.numpy().tobytes())
        self._tokens[cut] = stop
        # Hidden states that the cloud computed itself at this cut need not be sent.
        steps = self._split_into_steps(request.plan, self._known.get(cut, 0), stop, request.keep)
        back = stop - request.wanted
        for step in steps:
            # If a step only fills skipped blocks for known tokens, the cloud's later blocks may be ahead of it.
            if step.stop > max(back, request.keep):
                step.wanted, back = step.stop - back, step.stop
        steps[-1].ends_request = True
        for index in range(cut, request.plan.end_block + 1):
            self._known[index] = stop
        self._client.send(steps)

    def receive(self) -> Tensor:
        """Receive the hidden states (1, wanted, d) of the oldest request in flight.

        Raises:
            LinkError: reconnecting failed, or the cloud refuses.
        """
        parts = []
        while True:
            step, frame = self._client.receive()
            parts.append(self._decoded(step, frame))
            if step.ends_request:
                return torch.cat(parts, dim=1)

    def close(self) -> None:
        """End the session, so that the cloud need not wait until its lease expires."""
        self._client.close()

    def _decoded(self, step: _Step, frame: Frame) -> Tensor:
        if (answered := StepMessage.parse(frame)) != (asked := self._message(step)):
            raise LinkError(f"the cloud answered {answered} to {asked}")
        try:
            cut_codec = self._cut_codecs[step.plan.end_block]
            hidden = cut_codec.decode(frame.raw, step.stop - step.wanted, step.wanted)
        except ValueError as error:
            raise LinkError(f"the cloud's hidden states cannot be decoded: {error}") from None
        if not bool(torch.isfinite(hidden).all()):
            raise LinkError("the cloud's hidden states hold infinities or NaN")
        return hidden[None]

    def _split_into_steps(self, plan: SplitPlan, start: int, stop: int, keep: int) -> list[_Step]:
        """Steps of at most as many tokens as the cloud and a message allow, with no hidden states to return."""
        granted = self._client.granted
        if stop > granted.max_tokens:
            raise LinkError(f"the cloud grants {granted.max_tokens} tokens, {stop} are needed")
        largest = max(self._cut_codecs[plan.start_block].payload_bytes(at, 1) for at in (0, stop))
        size = max(1, min(granted.max_step_tokens, MAX_MESSAGE // largest))
        return [
            _Step(plan, begin, min(begin + size, stop), 0, max(keep, begin), ends_request=False)
            for begin in range(start, stop, size)
        ]

    def _roll_back(self, keep: int) -> None:
        for cut, tokens in self._tokens.items():
            if tokens > keep:
                self._tokens[cut] = keep
                del self._sent_payload[cut][self._cut_codecs[cut].payload_bytes(0, keep) :]
        self._known = {index: min(tokens, keep) for index, tokens in self._known.items()}

    def _payload(self, step: _Step) -> bytes:
        cut_codec, sent = self._cut_codecs[step.plan.start_block], self._sent_payload[step.plan.start_block]
        begin = cut_codec.payload_bytes(0, step.start)
        return bytes(sent[begin : begin + cut_codec.payload_bytes(step.start, step.stop - step.start)])

    def _frame(self, step: _Step) -> Frame:
        return Frame.of(
            InferenceKind.REPLAY if step.replay else InferenceKind.STEP,
            self._message(step),
            self._payload(step),
        )

    def _message(self, step: _Step) -> StepMessage:
        plan, deadline = step.plan, min(MAX_DEADLINE, round(10 * self._config.patience_s))
        return StepMessage(
            plan.start_block, plan.end_block, step.keep, step.start, step.stop - step.start, step.wanted, deadline
        )

    def _replay(self, steps: list[_Step]) -> list[_Step]:
        """Prepend the steps that a new session needs before the unanswered ones."""
        self._known = {}
        if not steps:
            return []
        oldest = steps[0]
        replay = self._split_into_steps(oldest.plan, 0, oldest.start, 0)
        for step in replay:
            step.replay = True
        tokens = oldest.start
        for step in steps:
            step.keep = min(step.keep, tokens)
            tokens = max(tokens, step.stop)
            for index in range(step.plan.start_block, step.plan.end_block + 1):
                self._known[index] = step.stop
        return [*replay, *steps]
