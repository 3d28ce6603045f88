"""Pipeline of one batch of texts through a split model: edge, cloud, edge."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from raycloud.models.segments import Segment
from raycloud.split.inference.blocks import CloudBlocks, StepRequest
from raycloud.split.inference.stage import Stage
from raycloud.split.plan import PlanSet, SplitPlan


@dataclass(frozen=True)
class _InFlight:
    """Request in flight and the tokens of its reply, or its hidden states if the plan leaves the cloud no blocks."""

    plan: SplitPlan
    start: int
    stop: int
    logits: int
    hidden: Tensor | None


class SplitPipeline:
    """Pipeline of one batch of texts through edge, cloud and edge.

    Args:
        first: the edge's blocks before the cuts, with the embedding.
        last: the edge's blocks after the cuts, with final norm and head.
        cloud_blocks: the cloud blocks between the cuts.
        plans: plans of the cuts; if there are several, one is sampled for each call of :meth:`send`.
        seed: seed for sampling plans.
    """

    def __init__(self, first: Segment, last: Segment, cloud_blocks: CloudBlocks, plans: PlanSet, seed: int = 0) -> None:
        self._first, self._last, self._cloud_blocks, self._plans = first, last, cloud_blocks, plans
        self._blocks = last.hi
        self._random = random.Random(seed)
        self._stage = Stage([first, last], plans.kept(self._blocks))
        self._in_flight: deque[_InFlight] = deque()
        # Number of tokens that were sent to the cloud and are still valid.
        self._sent = 0

    @property
    def tokens(self) -> int:
        """Number of tokens sent so far."""
        return self._stage.tokens

    @torch.inference_mode()
    def send(self, ids: Tensor, valid: Tensor | None = None, logits: int = 1) -> None:
        """Run the next tokens through the first part and send their hidden states to the cloud.

        With a fixed plan several requests may be in flight; :meth:`receive` returns their results in order.

        Args:
            ids: token ids (B, T).
            valid: (B, T), False for padding; None if there is no padding.
            logits: number of the last tokens whose logits :meth:`receive` is to return.

        Raises:
            ValueError: there are several plans and a request is still in flight.
        """
        if self._in_flight and not self._plans.fixed:
            raise ValueError("with changing plans only one request can be in flight")
        plan = self._plans.draw(self._random)
        known, (batch, count) = self._stage.tokens, ids.shape
        positions = self._stage.extend(batch, count, valid, ids.device)
        hidden, start = self._stage.run(0, plan.start_block, self._first.embed(ids, positions), known)
        stop = known + count
        if plan.start_block == plan.end_block:
            self._in_flight.append(_InFlight(plan, start, stop, logits, hidden))
            return
        held = min(self._cloud_blocks.held(plan.start_block), self._sent)
        if plan.end_block == self._blocks:
            wanted = logits
        else:
            wanted = stop - (known if self._in_flight else self._stage.held(plan.end_block))
        # Kept hidden states fill the gap to what the cloud has; valid covers the tokens that are new to it.
        hidden = self._stage.last(plan.start_block, stop - held, hidden, start)
        news = None if self._stage.cache.valid is None else self._stage.cache.valid[:, self._sent : stop]
        self._cloud_blocks.send(StepRequest(plan, hidden, held, wanted, keep=self._sent, valid=news))
        self._sent = stop
        self._in_flight.append(_InFlight(plan, stop - wanted, stop, logits, None))

    @torch.inference_mode()
    def receive(self) -> Tensor:
        """Receive the logits (B, k, V) of the last k tokens of the oldest request, with the k given to :meth:`send`."""
        request = self._in_flight.popleft()
        hidden = self._cloud_blocks.receive() if request.hidden is None else request.hidden
        if hidden.shape[1] != request.stop - request.start:
            raise ValueError(
                f"hidden states of {request.stop - request.start} tokens should have come back, got {hidden.shape[1]}"
            )
        hidden, _ = self._stage.run(request.plan.end_block, self._blocks, hidden, request.start)
        return self._last.logits(self._last.finish(hidden[:, hidden.shape[1] - request.logits :]))

    def advance(self, ids: Tensor, valid: Tensor | None = None, logits: int = 1) -> Tensor:
        """Call :meth:`send`, then :meth:`receive`."""
        self.send(ids, valid, logits)
        return self.receive()

    def rollback(self, keep: int) -> None:
        """Discard all but the first ``keep`` tokens, as speculative decoding needs; the next request informs the cloud.

        Raises:
            ValueError: fewer tokens are known, or a request is in flight.
        """
        if self._in_flight:
            raise ValueError("cannot forget tokens while a request is in flight")
        self._stage.rollback(keep)
        self._sent = min(self._sent, keep)

    def close(self) -> None:
        """Free the cloud's state."""
        self._cloud_blocks.close()
