"""What the edge asks of the blocks in the middle, wherever they run."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from raycloud.models.segments import Segment
from raycloud.split.plan import PlanSet, SplitPlan
from raycloud.split.side import Side


@dataclass(frozen=True)
class Trip:
    """Rows on their way to the middle and back."""

    plan: SplitPlan
    rows: Tensor
    """(B, T, d) entering block ``plan.first`` for the tokens ``[start, start + T)``."""
    start: int
    wanted: int
    """How many of the last rows entering block ``plan.second`` are to come back."""
    keep: int
    """Tokens that stay valid of what the middle knows; it forgets those behind them first."""
    valid: Tensor | None = None
    """(B, n), False for padding, of the tokens the middle does not know yet; None if there is none."""

    @property
    def stop(self) -> int:
        """Tokens known after the trip."""
        return self.start + self.rows.shape[1]


class Middle(Protocol):
    """The blocks between the cuts, for one batch of texts. Replies come in the order of the trips."""

    def held(self, index: int) -> int:
        """Tokens whose rows at ``index`` need not be given again: the next trip there begins with this one."""
        ...

    def send(self, trip: Trip) -> None:
        """Begin a trip."""
        ...

    def receive(self) -> Tensor:
        """The rows (B, wanted, d) of the oldest trip that is not yet back."""
        ...

    def close(self) -> None:
        """Free what was held for these texts."""
        ...


class MiddleState(Side):
    """The middle's side of one batch of texts."""

    @torch.inference_mode()
    def step(self, trip: Trip) -> Tensor:
        """Make one trip: the last ``wanted`` rows (B, wanted, d) entering block ``second``.

        Raises:
            ValueError: the trip does not begin where this side's rows end.
        """
        if trip.keep < self.tokens:
            self.rollback(trip.keep)
        first, second = trip.plan.first, trip.plan.second
        if trip.start > self.held(first):
            raise ValueError(
                f"rows from token {trip.start} do not follow the {self.held(first)} known at block {first}"
            )
        batch, _, width = trip.rows.shape
        if trip.stop > self.tokens:
            self.extend(batch, trip.stop - self.tokens, trip.valid, trip.rows.device)
        rows, start = self.run(first, second, trip.rows, trip.start)
        if trip.wanted == 0:
            return trip.rows.new_empty(batch, 0, width)
        return self.last(second, trip.wanted, rows, start)


def middle_state(segment: Segment, plans: PlanSet, blocks: int) -> MiddleState:
    """A fresh middle for the plans of a session, over the middle segment of a model of so many blocks."""
    return MiddleState([segment], plans.kept(blocks))


class LocalMiddle:
    """The middle in the same process."""

    def __init__(self, state: MiddleState) -> None:
        self._state = state
        self._back: deque[Tensor] = deque()

    def held(self, index: int) -> int:
        """Tokens whose rows at ``index`` need not be given again."""
        return self._state.held(index)

    def send(self, trip: Trip) -> None:
        """Make the trip at once."""
        self._back.append(self._state.step(trip))

    def receive(self) -> Tensor:
        """The rows of the oldest trip that is not yet fetched."""
        return self._back.popleft()

    def close(self) -> None:
        """Nothing outlives the object."""
