"""The output lens (A1): read what the model is about to say off the rows that come down to the edge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from raycloud.evaluation.privacy.affine import Affine, ridge
from raycloud.evaluation.privacy.vocabulary import CHUNK
from raycloud.models.segments import Segment


@dataclass(frozen=True)
class Lens:
    """A1: rows to final rows by a shortcut past the edge's last blocks, then the public head."""

    shortcut: Callable[[Tensor], Tensor]
    last: Segment

    @classmethod
    def plain(cls, last: Segment) -> Lens:
        """Only the final norm, as if no block were left; exact where none is. Needs no training."""
        dtype = next(last.parameters()).dtype
        return cls(lambda rows: last.finish(rows.to(dtype)), last)

    @classmethod
    def tuned(cls, last: Segment, down: Tensor, final: Tensor) -> Lens:
        """The affine map from public rows (n, d) to the final rows (n, m) that the whole model makes of them."""
        fitted: Affine = ridge(down, final)
        dtype = next(last.parameters()).dtype
        return cls(lambda rows: fitted(rows).to(dtype), last)

    @torch.no_grad()
    def guess(self, rows: Tensor, count: int) -> Tensor:
        """The next tokens (T, count), best first, after each of the rows (T, d)."""
        final = self.shortcut(rows)
        return torch.cat([self.last.logits(some).topk(count).indices for some in final.split(CHUNK)])
