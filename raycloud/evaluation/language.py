"""How well a model predicts text, token by token: perplexity, and agreement between two models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from raycloud.data.batches import IGNORE, Batch
from raycloud.models.segments import Segment

Beside = Callable[[Tensor, slice], Tensor]
"""(logits (c, V) of some of the labelled tokens, which ones) -> a number for each of them (c,)."""


@dataclass(frozen=True)
class Judgement:
    """What a model made of the labelled tokens of a text: −log p of each (n,), and its own guesses (n,)."""

    nll: Tensor
    guesses: Tensor
    beside: Tensor | None = None
    """(n,), see :func:`judge`."""

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
        nll, guesses, beside = zip(*((part.nll, part.guesses, part.beside) for part in parts), strict=True)
        return cls(torch.cat(nll), torch.cat(guesses), None if beside[0] is None else torch.cat(beside))


@torch.no_grad()
def final_rows(model: Segment, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows (n, d) entering the head at each batch's labelled positions, and the labels (n,)."""
    for batch in batches:
        wanted = batch.labels != IGNORE
        yield (
            model.rows(batch.ids, valid=None if bool(batch.valid.all()) else batch.valid)[wanted],
            batch.labels[wanted],
        )


@torch.no_grad()
def judge_rows(
    model: Segment, rows: Iterable[tuple[Tensor, Tensor]], *, chunk: int = 256, beside: Beside | None = None
) -> Judgement:
    """Judge from :func:`final_rows`; logits exist for ``chunk`` tokens at a time."""
    parts, start = [], 0
    for every, every_label in rows:
        for some, labels in zip(every.split(chunk), every_label.split(chunk), strict=True):
            logits = model.logits(some).float()
            nll = logits.logsumexp(dim=-1) - logits.gather(-1, labels[:, None])[:, 0]
            more = None if beside is None else beside(logits, slice(start, start + len(some))).cpu()
            parts.append(Judgement(nll.cpu(), logits.argmax(dim=-1).cpu(), more))
            start += len(some)
    return Judgement.join(parts)


def judge(model: Segment, batches: Iterable[Batch], *, chunk: int = 256, beside: Beside | None = None) -> Judgement:
    """Run a whole model over batches on its device.

    Args:
        model: with its head.
        batches: on its device.
        chunk: tokens whose logits exist at a time.
        beside: a further number to take from the logits of each token, such as a divergence.
    """
    return judge_rows(model, final_rows(model, batches), chunk=chunk, beside=beside)
