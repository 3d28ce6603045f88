"""Prediction of text token by token: perplexity, and agreement between two models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from raycloud.data.batches import IGNORE, Batch
from raycloud.models.segments import Segment

ExtraPerToken = Callable[[Tensor, slice], Tensor]
"""Function of the logits (c, V) of some labelled tokens and their slice among all, that returns a number each (c,)."""


def perplexity(nll: float | None) -> float:
    """Perplexity of a mean negative log-likelihood in nats: infinite on overflow, NaN for None."""
    try:
        return math.nan if nll is None else math.exp(nll)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class TokenPredictions:
    """Predictions of the n labelled tokens of a text: −log p of each label (n,) and the most likely token (n,)."""

    nll: Tensor
    guesses: Tensor
    beside: Tensor | None = None
    """Further number per token (n,), see ``beside`` of :func:`predict`; None if not asked for."""

    @property
    def perplexity(self) -> float:
        """Perplexity over all tokens."""
        return perplexity(float(self.nll.double().mean()))

    def agreement(self, other: TokenPredictions) -> float:
        """Share of tokens whose most likely next token is the same for both models."""
        return float((self.guesses == other.guesses).double().mean())

    @classmethod
    def join(cls, parts: Iterable[TokenPredictions]) -> TokenPredictions:
        """Concatenate the predictions of several texts."""
        nll, guesses, beside = zip(*((part.nll, part.guesses, part.beside) for part in parts), strict=True)
        return cls(torch.cat(nll), torch.cat(guesses), None if beside[0] is None else torch.cat(beside))


@torch.no_grad()
def final_hidden(model: Segment, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield per batch the hidden states (n, d) that enter the head at the labelled positions, and the labels (n,)."""
    for batch in batches:
        wanted = batch.labels != IGNORE
        yield (
            model.hidden(batch.ids, valid=None if bool(batch.valid.all()) else batch.valid)[wanted],
            batch.labels[wanted],
        )


@torch.no_grad()
def predict_from_hidden(
    model: Segment, hidden: Iterable[tuple[Tensor, Tensor]], *, chunk: int = 256, beside: ExtraPerToken | None = None
) -> TokenPredictions:
    """Predict from the result of :func:`final_hidden`; logits exist for ``chunk`` tokens at a time."""
    parts, start = [], 0
    for every, every_label in hidden:
        for some, labels in zip(every.split(chunk), every_label.split(chunk), strict=True):
            logits = model.logits(some).float()
            nll = logits.logsumexp(dim=-1) - logits.gather(-1, labels[:, None])[:, 0]
            more = None if beside is None else beside(logits, slice(start, start + len(some))).cpu()
            parts.append(TokenPredictions(nll.cpu(), logits.argmax(dim=-1).cpu(), more))
            start += len(some)
    return TokenPredictions.join(parts)


def predict(
    model: Segment, batches: Iterable[Batch], *, chunk: int = 256, beside: ExtraPerToken | None = None
) -> TokenPredictions:
    """Predict the labelled tokens of batches with a whole model.

    Args:
        model: the whole model, with its head.
        batches: batches on the model's device.
        chunk: number of tokens whose logits exist at a time.
        beside: function for a further number from the logits of each token, such as a divergence.
    """
    return predict_from_hidden(model, final_hidden(model, batches), chunk=chunk, beside=beside)
