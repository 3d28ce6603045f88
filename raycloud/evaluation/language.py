"""How well a model predicts text, token by token: perplexity, and agreement between two models."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from raycloud.data.batches import IGNORE, Batch
from raycloud.models.segments import Segment


@dataclass(frozen=True)
class Judgement:
    """What a model made of the labelled tokens of a text: −log p of each (n,), and its own guesses (n,)."""

    nll: Tensor
    guesses: Tensor

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood."""
        return math.exp(float(self.nll.double().mean()))

    def agreement(self, other: Judgement) -> float:
        """Share of tokens for which both models' most likely next token is the same."""
        return float((self.guesses == other.guesses).double().mean())

    @classmethod
    def join(cls, parts: Iterable[Judgement]) -> Judgement:
        """One judgement of several texts."""
        nll, guesses = zip(*((part.nll, part.guesses) for part in parts), strict=True)
        return cls(torch.cat(nll), torch.cat(guesses))


@torch.no_grad()
def judge(model: Segment, batches: Iterable[Batch], *, chunk: int = 256) -> Judgement:
    """Run a whole model over batches on its device; logits exist for ``chunk`` tokens at a time."""
    parts = []
    for batch in batches:
        wanted = batch.labels != IGNORE
        rows = model.rows(batch.ids, valid=None if bool(batch.valid.all()) else batch.valid)[wanted]
        for some, labels in zip(rows.split(chunk), batch.labels[wanted].split(chunk), strict=True):
            logits = model.logits(some).float()
            nll = logits.logsumexp(dim=-1) - logits.gather(-1, labels[:, None])[:, 0]
            parts.append(Judgement(nll.cpu(), logits.argmax(dim=-1).cpu()))
    return Judgement.join(parts)
