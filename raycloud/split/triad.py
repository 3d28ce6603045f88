"""One batch of texts through a model in three parts: the edge begins, the middle goes on, the edge ends."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from raycloud.models.segments import Segment
from raycloud.split.middle import Middle, Trip
from raycloud.split.plan import PlanSet, SplitPlan
from raycloud.split.side import Side


@dataclass(frozen=True)
class _Away:
    """A trip that is not back: which rows will come, or did already if the plan leaves the middle nothing."""

    plan: SplitPlan
    start: int
    stop: int
    logits: int
    rows: Tensor | None


class Triad:
    """One batch of texts on its way through edge, middle and edge.

    Args:
        first: the edge's blocks before the cuts, with the embedding.
        last: the edge's blocks behind the cuts, with final norm and head.
        middle: the blocks between.
        plans: where it may be cut; with more than one plan, one is drawn for each call of :meth:`send`.
        seed: of the drawing.
    """

    def __init__(self, first: Segment, last: Segment, middle: Middle, plans: PlanSet, seed: int = 0) -> None:
        self._first, self._last, self._middle, self._plans = first, last, middle, plans
        self._blocks = last.hi
        self._random = random.Random(seed)
        self._side = Side([first, last], plans.kept(self._blocks))
        self._away: deque[_Away] = deque()
        # Tokens the middle knows of and that are still valid.
        self._told = 0

    @property
    def tokens(self) -> int:
        """Tokens sent so far."""
        return self._side.tokens

    @torch.inference_mode()
    def send(self, ids: Tensor, valid: Tensor | None = None, logits: int = 1) -> None:
        """Run the next tokens through the first part and send them on.

        With a fixed plan several may be on their way at once; :meth:`receive` takes them back in order.

        Args:
            ids: (B, T).
            valid: (B, T), False for padding; None if there is none.
            logits: how many of the last tokens' logits :meth:`receive` is to return.

        Raises:
            ValueError: plans change and a trip is still away.
        """
        if self._away and not self._plans.fixed:
            raise ValueError("with changing plans only one trip can be away")
        plan = self._plans.draw(self._random)
        known, (batch, count) = self._side.tokens, ids.shape
        positions = self._side.extend(batch, count, valid, ids.device)
        rows, start = self._side.run(0, plan.first, self._first.embed(ids, positions), known)
        stop = known + count
        if plan.first == plan.second:
            self._away.append(_Away(plan, start, stop, logits, rows))
            return
        held = min(self._middle.held(plan.first), self._told)
        if plan.second == self._blocks:
            wanted = logits
        else:
            wanted = stop - (known if self._away else self._side.held(plan.second))
        # Kept rows fill the gap to what the middle has; valid covers the tokens it has not heard of at all.
        rows = self._side.last(plan.first, stop - held, rows, start)
        news = None if self._side.cache.valid is None else self._side.cache.valid[:, self._told : stop]
        self._middle.send(Trip(plan, rows, held, wanted, keep=self._told, valid=news))
        self._told = stop
        self._away.append(_Away(plan, stop - wanted, stop, logits, None))

    @torch.inference_mode()
    def receive(self) -> Tensor:
        """The logits (B, k, V) of the oldest trip's last k tokens, as :meth:`send` was asked for."""
        away = self._away.popleft()
        rows = self._middle.receive() if away.rows is None else away.rows
        if rows.shape[1] != away.stop - away.start:
            raise ValueError(
                f"{away.stop - away.start} rows should have come back from the middle, got {rows.shape[1]}"
            )
        rows, _ = self._side.run(away.plan.second, self._blocks, rows, away.start)
        return self._last.logits(self._last.finish(rows[:, rows.shape[1] - away.logits :]))

    def advance(self, ids: Tensor, valid: Tensor | None = None, logits: int = 1) -> Tensor:
        """:meth:`send` and :meth:`receive`."""
        self.send(ids, valid, logits)
        return self.receive()

    def rollback(self, keep: int) -> None:
        """Forget everything but the first ``keep`` tokens; the middle hears of it with the next trip.

        Raises:
            ValueError: fewer tokens are known, or a trip is away.
        """
        if self._away:
            raise ValueError("cannot forget tokens while a trip is away")
        self._side.rollback(keep)
        self._told = min(self._told, keep)

    def close(self) -> None:
        """Free what the middle holds."""
        self._middle.close()
