"""Output lens (A1): predict the model's next tokens from the downlink hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from raycloud.evaluation.privacy.affine import Affine, ridge
from raycloud.evaluation.privacy.token_directions import CHUNK
from raycloud.models.segments import Segment


@dataclass(frozen=True)
class Lens:
    """Attack A1: a shortcut that replaces the edge's last blocks, then the public head.

    ``shortcut`` maps hidden states (n, d) to those that enter the head; ``last`` is the segment with the head.
    """

    shortcut: Callable[[Tensor], Tensor]
    last: Segment

    @classmethod
    def plain(cls, last: Segment) -> Lens:
        """Lens with the final norm as its shortcut; needs no training, exact if the last part has no blocks."""
        dtype = next(last.parameters()).dtype
        return cls(lambda hidden: last.finish(hidden.to(dtype)), last)

    @classmethod
    def tuned(cls, last: Segment, downlink: Tensor, final: Tensor) -> Lens:
        """Lens with an affine shortcut, fitted from public hidden states (n, d) to the final ones (n, m)."""
        fitted: Affine = ridge(downlink, final)
        dtype = next(last.parameters()).dtype
        return cls(lambda hidden: fitted(hidden).to(dtype), last)

    @torch.no_grad()
    def guess(self, hidden: Tensor, count: int) -> Tensor:
        """Guess the next tokens (T, count), best first, after each of the hidden states (T, d)."""
        final = self.shortcut(hidden)
        return torch.cat([self.last.logits(some).topk(count).indices for some in final.split(CHUNK)])
