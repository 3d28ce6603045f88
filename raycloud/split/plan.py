"""Where a model is cut: the edge runs blocks [0, first) and [second, L), the cloud [first, second)."""

from __future__ import annotations

import random
from dataclasses import dataclass

from raycloud.errors import ModelError


@dataclass(frozen=True)
class SplitPlan:
    """One pair of cuts, ``0 <= first <= second <= L``; equal cuts leave nothing to the cloud.

    With ``second == L`` the edge keeps only the final norm and the head, and the cloud sees what they will say.
    """

    first: int
    second: int

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.second:
            raise ModelError(f"a split needs 0 <= first <= second, got first={self.first}, second={self.second}")

    def check(self, blocks: int) -> SplitPlan:
        """This plan, if a model of so many blocks can be cut so.

        Raises:
            ModelError: it has fewer blocks.
        """
        if self.second > blocks:
            raise ModelError(f"second={self.second} is beyond the model's {blocks} blocks")
        return self


@dataclass(frozen=True)
class PlanSet:
    """The plans a session may use: one, or any ``first <= second`` of two sets, drawn anew for each token.

    Drawing per token (Triadic Split Computing, arXiv 2310.14651) costs traffic and compute and buys no privacy against
    the cloud, which has to hold every token at the lowest cut anyway; it is here to measure just that.
    """

    firsts: tuple[int, ...]
    seconds: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.firsts or not self.seconds or min(self.firsts) < 0:
            raise ModelError(f"a split needs cuts of 0 or more, got firsts={self.firsts}, seconds={self.seconds}")
        if min(self.firsts) > max(self.seconds):
            raise ModelError(f"no first of {self.firsts} lies at or below a second of {self.seconds}")

    @classmethod
    def of(cls, plan: SplitPlan) -> PlanSet:
        """The set of one plan."""
        return cls((plan.first,), (plan.second,))

    @property
    def fixed(self) -> bool:
        """Whether there is only one plan."""
        return len(self.firsts) == len(self.seconds) == 1

    @property
    def cuts(self) -> frozenset[int]:
        """All indices at which rows may cross."""
        return frozenset((*self.firsts, *self.seconds))

    def kept(self, blocks: int) -> frozenset[int]:
        """The indices whose rows both sides keep to catch up with; none if the plan never changes.

        Rows behind the last of ``blocks`` are never needed again.
        """
        return frozenset() if self.fixed else self.cuts - {blocks}

    @property
    def cloud(self) -> range:
        """The blocks that the cloud may have to run."""
        return range(min(self.firsts), max(self.seconds))

    def edge(self, blocks: int) -> tuple[range, range]:
        """The blocks that the edge may have to run before and after the cloud's; they may overlap."""
        ahead = max(first for first in self.firsts if first <= max(self.seconds))
        behind = min(second for second in self.seconds if second >= min(self.firsts))
        return range(ahead), range(behind, blocks)

    def allows(self, plan: SplitPlan) -> bool:
        """Whether the plan is one of these."""
        return plan.first in self.firsts and plan.second in self.seconds

    def draw(self, source: random.Random) -> SplitPlan:
        """One plan: a first, then a second at or above it, each uniformly."""
        if self.fixed:
            return SplitPlan(self.firsts[0], self.seconds[0])
        first = source.choice([first for first in self.firsts if first <= max(self.seconds)])
        return SplitPlan(first, source.choice([second for second in self.seconds if second >= first]))

    def check(self, blocks: int) -> PlanSet:
        """These plans, if a model of so many blocks can be cut so.

        Raises:
            ModelError: it has fewer blocks.
        """
        for cut in sorted(self.cuts):
            if cut > blocks:
                raise ModelError(f"cut {cut} is beyond the model's {blocks} blocks")
        return self
