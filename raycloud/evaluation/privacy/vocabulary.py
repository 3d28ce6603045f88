"""The public vocabulary as directions, and the first attack (A0): the embedding that a row looks most like."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from raycloud.models.segments import Segment

CHUNK = 256
"""Rows that are scored against the whole vocabulary at a time."""


@dataclass(frozen=True)
class Vocabulary:
    """Every token as a unit vector (V, d): its embedding without what all embeddings have in common, ``centre`` (d,).

    A family that adds positions to its embeddings adds the same to each token; :meth:`offsets` says how much.
    """

    directions: Tensor
    centre: Tensor
    edge: Segment

    @classmethod
    @torch.no_grad()
    def of(cls, edge: Segment, words: int) -> Vocabulary:
        """The vocabulary of a model from its first part, which holds the embedding."""
        device = next(edge.parameters()).device
        ids = torch.arange(words, device=device)[None]
        rows = edge.embed(ids, torch.zeros_like(ids))[0].float()
        centre = rows.mean(dim=0)
        return cls(normalize(rows - centre, dim=-1), centre, edge)

    @torch.no_grad()
    def offsets(self, length: int) -> Tensor:
        """By how much the embedding of any token at positions 0 to ``length - 1`` differs from that at 0, (T, d)."""
        positions = torch.arange(length, device=self.centre.device)[None]
        rows = self.edge.embed(torch.zeros_like(positions), positions)[0].float()
        return rows - rows[:1]

    def nearest(self, points: Tensor, count: int) -> Tensor:
        """The ``count`` tokens (n, count) closest in angle to points (n, d), best first."""
        count = min(count, len(self.directions))
        return torch.cat([(some @ self.directions.T).topk(count).indices for some in points.split(CHUNK)])


@dataclass(frozen=True)
class EmbeddingMatch:
    """A0: cosine of a row to every embedding. Needs no training; exact where no block has touched the row."""

    vocabulary: Vocabulary

    def guess(self, rows: Tensor, count: int) -> Tensor:
        """Tokens (T, count), best first, of the rows (T, d) of one text."""
        return self.vocabulary.nearest(rows - self.vocabulary.centre - self.vocabulary.offsets(len(rows)), count)
