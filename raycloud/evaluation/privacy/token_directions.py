"""Directions of the public vocabulary, and the first attack (A0): the embedding most similar to a hidden state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from raycloud.models.segments import Segment

CHUNK = 256
"""Number of hidden states that are scored against the whole vocabulary at a time."""


@dataclass(frozen=True)
class TokenDirections:
    """Unit vectors (V, d) of all tokens: their embeddings minus the mean embedding ``centre`` (d,).

    A model that adds position embeddings adds the same vector to each token; :meth:`offsets` returns it.
    """

    directions: Tensor
    centre: Tensor
    edge: Segment

    @classmethod
    @torch.no_grad()
    def of(cls, edge: Segment, vocab_size: int) -> TokenDirections:
        """Directions of a model's ``vocab_size`` tokens, from the first part, which holds the embedding."""
        device = next(edge.parameters()).device
        ids = torch.arange(vocab_size, device=device)[None]
        hidden = edge.embed(ids, torch.zeros_like(ids))[0].float()
        centre = hidden.mean(dim=0)
        return cls(normalize(hidden - centre, dim=-1), centre, edge)

    @torch.no_grad()
    def offsets(self, length: int) -> Tensor:
        """Difference (T, d) of any token's embedding at positions 0 to ``length - 1`` from that at position 0."""
        positions = torch.arange(length, device=self.centre.device)[None]
        hidden = self.edge.embed(torch.zeros_like(positions), positions)[0].float()
        return hidden - hidden[:1]

    def nearest(self, points: Tensor, count: int) -> Tensor:
        """Tokens (n, count) with the largest cosine to points (n, d), best first."""
        count = min(count, len(self.directions))
        return torch.cat([(some @ self.directions.T).topk(count).indices for some in points.split(CHUNK)])


@dataclass(frozen=True)
class EmbeddingMatch:
    """Attack A0: cosine of a hidden state to every embedding. It needs no training; exact if the edge has no blocks."""

    vocabulary: TokenDirections

    def guess(self, hidden: Tensor, count: int) -> Tensor:
        """Tokens (T, count), best first, of the hidden states (T, d) of one text."""
        return self.vocabulary.nearest(hidden - self.vocabulary.centre - self.vocabulary.offsets(len(hidden)), count)
