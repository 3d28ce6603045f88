"""Metrics of answers that are spans of a text: SQuAD's two (arXiv 1606.05250), and the best span of logits."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Normalise an answer for comparison: lower case, single spaces, no punctuation and no articles."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, truth: str) -> float:
    """Exact match: 1 if both are equal after normalisation, else 0."""
    return float(normalised(answer) == normalised(truth))


def overlap_f1(answer: str, truth: str) -> float:
    """F1 of the words of an answer and one reference: the harmonic mean of precision and recall, 0 to 1."""
    ours, theirs = normalised(answer).split(), normalised(truth).split()
    if not ours or not theirs:
        return float(ours == theirs)
    both = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * both / (len(ours) + len(theirs))


def best_match(measure: Callable[[str, str], float], answer: str, truths: Sequence[str]) -> float:
    """Largest value of ``measure`` over the references. Without any reference, the empty answer is right.

    References that normalise to nothing, such as an article alone, are ignored, as in SQuAD's official script for
    version 2.0.
    """
    said = [truth for truth in truths if normalised(truth)]
    return max(measure(answer, truth) for truth in said or [""])


def best_spans(logits: Tensor, allowed: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find the likeliest span of each text.

    Args:
        logits: (B, T, 2), for the first and for the last token of the span.
        allowed: (B, T), mask of the tokens at which a span may begin or end; not empty for any text.
        most: maximum number of tokens of a span.

    Returns:
        Indices of the first and of the last tokens (B,), and their scores (B,), the sums of both logits.
    """
    length = logits.shape[1]
    ordered = torch.ones(length, length, dtype=torch.bool).triu().tril(most - 1)
    possible = allowed[:, :, None] & allowed[:, None, :] & ordered
    scores = (logits[:, :, None, 0] + logits[:, None, :, 1]).masked_fill(~possible, -torch.inf)
    best, place = scores.flatten(1).max(dim=1)
    return place // length, place % length, best
