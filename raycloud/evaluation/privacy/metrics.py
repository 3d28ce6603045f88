"""How much of a text an attack recovered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor

Decode = Callable[[list[int]], str]
"""Token ids to text."""


@dataclass(frozen=True)
class Recovery:
    """What one attack recovered of one side, all shares from 0 to 1.

    ``top1`` and ``top5`` of all tokens, ``exact`` of the texts from end to end; ``rouge_l`` is the mean F-measure of
    the decoded texts; ``secrets`` of the planted names and numbers stand in them word for word (None where none were
    planted); ``seconds`` went into training and running the attack.
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
    """Compare text by text.

    Args:
        guesses: (n, k) tokens, best first; of an attack that names fewer than five, ``top5`` counts those it names.
        truths: (n,) tokens; empty texts are left out.
        decode: makes texts of both.
        seconds: what the attack took.
        secrets: what was planted in each text.

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
