"""Plans of a split model: the edge runs blocks [0, start_block) and [end_block, L), the cloud
[start_block, end_block)."""

from __future__ import annotations

import random
from dataclasses import dataclass

from raycloud.errors import ModelError


@dataclass(frozen=True)
class SplitPlan:
    """Pair of cuts, ``0 <= start_block <= end_block <= L``; equal cuts leave the cloud no blocks.

    With ``end_block == L`` the edge keeps only the final norm and the head, so the cloud can compute their output.
    """

    start_block: int
    end_block: int

    def __post_init__(self) -> None:
        if not 0 <= self.start_block <= self.end_block:
            raise ModelError(
                f"a split needs 0 <= start_block <= end_block, "
                f"got start_block={self.start_block}, end_block={self.end_block}"
            )

    def check(self, blocks: int) -> SplitPlan:
        """Return this plan after checking that a model of ``blocks`` blocks can be cut so.

        Raises:
            ModelError: the model has fewer blocks.
        """
        if self.end_block > blocks:
            raise ModelError(f"end_block={self.end_block} is beyond the model's {blocks} blocks")
        return self


@dataclass(frozen=True)
class PlanSet:
    """Plans a session may use: one, or any ``start_block <= end_block`` of two sets, sampled anew for each request.

    A request is a chunk of a prompt, or one new token.

    Sampling per token (Triadic Split Computing, arXiv 2310.14651) costs traffic and compute and gives no privacy
    against the cloud, which needs every token at the lowest cut anyway; it exists to measure this.
    """

    start_blocks: tuple[int, ...]
    end_blocks: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.start_blocks or not self.end_blocks or min(self.start_blocks) < 0:
            raise ModelError(
                f"a split needs cuts of 0 or more, got start_blocks={self.start_blocks}, end_blocks={self.end_blocks}"
            )
        if min(self.start_blocks) > max(self.end_blocks):
            raise ModelError(
                f"no start block of {self.start_blocks} lies at or below an end block of {self.end_blocks}"
            )

    @classmethod
    def of(cls, plan: SplitPlan) -> PlanSet:
        """Set of one plan."""
        return cls((plan.start_block,), (plan.end_block,))

    @property
    def fixed(self) -> bool:
        """Return whether there is only one plan."""
        return len(self.start_blocks) == len(self.end_blocks) == 1

    @property
    def cuts(self) -> frozenset[int]:
        """All cuts at which hidden states may be sent."""
        return frozenset((*self.start_blocks, *self.end_blocks))

    def kept(self, blocks: int) -> frozenset[int]:
        """Cuts whose hidden states both sides keep to fill skipped blocks later; none if the plan is fixed.

        Hidden states after the last of ``blocks`` are never needed again.
        """
        return frozenset() if self.fixed else self.cuts - {blocks}

    @property
    def cloud(self) -> range:
        """Blocks that the cloud may have to run."""
        return range(min(self.start_blocks), max(self.end_blocks))

    def edge(self, blocks: int) -> tuple[range, range]:
        """Blocks that the edge may have to run before and after the cloud's; the two ranges may overlap."""
        ahead = max(start for start in self.start_blocks if start <= max(self.end_blocks))
        behind = min(end for end in self.end_blocks if end >= min(self.start_blocks))
        return range(ahead), range(behind, blocks)

    def allows(self, plan: SplitPlan) -> bool:
        """Return whether the plan is in this set."""
        return plan.start_block in self.start_blocks and plan.end_block in self.end_blocks

    def draw(self, source: random.Random) -> SplitPlan:
        """Sample one plan: ``start_block`` uniformly, then ``end_block`` uniformly from those at or above it."""
        if self.fixed:
            return SplitPlan(self.start_blocks[0], self.end_blocks[0])
        start = source.choice([start for start in self.start_blocks if start <= max(self.end_blocks)])
        return SplitPlan(start, source.choice([end for end in self.end_blocks if end >= start]))

    def check(self, blocks: int) -> PlanSet:
        """Return these plans after checking that a model of ``blocks`` blocks can be cut so.

        Raises:
            ModelError: the model has fewer blocks.
        """
        for cut in sorted(self.cuts):
            if cut > blocks:
                raise ModelError(f"cut {cut} is beyond the model's {blocks} blocks")
        return self
