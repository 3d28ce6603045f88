"""Cloud blocks as the edge uses them, in the same process or over a link."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from raycloud.models.segments import Segment
from raycloud.split.inference.stage import Stage
from raycloud.split.plan import PlanSet, SplitPlan


@dataclass(frozen=True)
class StepRequest:
    """Request to run the cloud blocks on hidden states and return some of the result."""

    plan: SplitPlan
    hidden: Tensor
    """Hidden states (B, T, d) entering block ``plan.start_block`` for the tokens ``[start, start + T)``."""
    start: int
    wanted: int
    """Number of the last tokens whose hidden states entering block ``plan.end_block`` are to be returned."""
    keep: int
    """Number of the cloud's tokens that stay valid; it discards the later ones before the step."""
    valid: Tensor | None = None
    """Mask (B, n), False for padding, of the tokens that are new to the cloud; None if there is no padding."""

    @property
    def stop(self) -> int:
        """Number of tokens known after the request."""
        return self.start + self.hidden.shape[1]


class CloudBlocks(Protocol):
    """Interface of the blocks between the cuts, for one batch of texts. Replies come in the order of the requests."""

    def held(self, index: int) -> int:
        """Number of tokens whose hidden states at ``index`` need not be given again; the next request begins here."""
        ...

    def send(self, request: StepRequest) -> None:
        """Send a request without waiting for its reply."""
        ...

    def receive(self) -> Tensor:
        """Receive the hidden states (B, wanted, d) of the oldest request in flight."""
        ...

    def close(self) -> None:
        """Free the state of these texts."""
        ...


class CloudStage(Stage):
    """Stage of the cloud for one batch of texts."""

    @torch.inference_mode()
    def step(self, request: StepRequest) -> Tensor:
        """Run one request; return the last ``wanted`` hidden states (B, wanted, d) entering block ``end_block``.

        Raises:
            ValueError: the request begins after the tokens that this stage has.
        """
        if request.keep < self.tokens:
            self.rollback(request.keep)
        begin, end = request.plan.start_block, request.plan.end_block
        if request.start > self.held(begin):
            raise ValueError(
                f"hidden states from token {request.start} do not follow the {self.held(begin)} known at block {begin}"
            )
        batch, _, width = request.hidden.shape
        if request.stop > self.tokens:
            self.extend(batch, request.stop - self.tokens, request.valid, request.hidden.device)
        hidden, start = self.run(begin, end, request.hidden, request.start)
        if request.wanted == 0:
            return request.hidden.new_empty(batch, 0, width)
        return self.last(end, request.wanted, hidden, start)


def cloud_stage(segment: Segment, plans: PlanSet, blocks: int) -> CloudStage:
    """New cloud stage for the plans of a session, over the middle segment of a model of ``blocks`` blocks."""
    return CloudStage([segment], plans.kept(blocks))


class LocalBlocks:
    """Cloud blocks in the same process."""

    def __init__(self, state: CloudStage) -> None:
        self._state = state
        self._results: deque[Tensor] = deque()

    def held(self, index: int) -> int:
        """Number of tokens whose hidden states at ``index`` need not be given again."""
        return self._state.held(index)

    def send(self, request: StepRequest) -> None:
        """Run the request at once."""
        self._results.append(self._state.step(request))

    def receive(self) -> Tensor:
        """Return the hidden states of the oldest request whose result was not yet fetched."""
        return self._results.popleft()

    def close(self) -> None:
        """Do nothing: the state belongs to this object."""
