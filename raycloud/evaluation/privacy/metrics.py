"""Metrics of the share of a text that an attack recovers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor

Decode = Callable[[list[int]], str]
"""Function from token ids to text."""


@dataclass(frozen=True)
class Recovery:
    """Recovery by one attack of either prompts or answers; all shares are from 0 to 1.

    ``top1`` and ``top5`` are shares of all tokens, ``exact`` is the share of texts recovered completely, ``rouge_l``
    the mean F-measure of the decoded texts, ``secrets`` the share of the planted names and numbers that the decoded
    texts contain word for word (None if none were planted), and ``seconds`` the time to fit and run the attack.
    """

    top1: float
    top5: float
    exact: float
    rouge_l: float
    secrets: float | None
    seconds: float


def recovery(
    guesses: Sequence[Tensor],
    truths: Sequence[Tensor],
    decode: Decode,
    seconds: float,
    secrets: Sequence[Sequence[str]] | None = None,
) -> Recovery:
    """Compare the guesses of an attack with the true tokens, text by text.

    Args:
        guesses: (n, k) tokens per text, best first; with k below 5, ``top5`` counts the k.
        truths: (n,) tokens per text; empty texts are left out.
        decode: decodes both to text.
        seconds: time that the attack took.
        secrets: strings planted in each text.

    Raises:
        ValueError: all texts are empty.
    """
    kept = [index for index, truth in enumerate(truths) if len(truth)]
    if not kept:
        raise ValueError("no text has a token to recover")
    hits = [guesses[index][:, :5] == truths[index][:, None] for index in kept]
    best = [decode(guesses[index][:, 0].tolist()) for index in kept]
    scorer = RougeScorer(["rougeL"])
    overlap = [
        scorer.score(decode(truths[index].tolist()), text)["rougeL"].fmeasure
        for index, text in zip(kept, best, strict=True)
    ]
    planted = [secrets[index] if secrets else () for index in kept]
    found = [secret in text for text, some in zip(best, planted, strict=True) for secret in some]
    return Recovery(
        top1=_share(torch.cat([hit[:, 0] for hit in hits])),
        top5=_share(torch.cat([hit.any(dim=1) for hit in hits])),
        exact=_share(torch.stack([hit[:, 0].all() for hit in hits])),
        rouge_l=sum(overlap) / len(overlap),
        secrets=sum(found) / len(found) if found else None,
        seconds=seconds,
    )


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())
