"""How well spans of a text answer questions: SQuAD's two measures (arXiv 1606.05250), and which span a model means."""

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
    """Lower case, without punctuation and articles, with single spaces: what two answers are compared as."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, truth: str) -> float:
    """1 where both are the same once normalised."""
    return float(normalised(answer) == normalised(truth))


def overlap_f1(answer: str, truth: str) -> float:
    """Harmonic mean of precision and recall of the words of one truth."""
    ours, theirs = normalised(answer).split(), normalised(truth).split()
    if not ours or not theirs:
        return float(ours == theirs)
    both = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * both / (len(ours) + len(theirs))


def best_over(measure: Callable[[str, str], float], answer: str, truths: Sequence[str]) -> float:
    """Against the truth that it fits best; an answer is right where there is none to give and it gives none."""
    return max((measure(answer, truth) for truth in truths), default=measure(answer, ""))


def best_spans(logits: Tensor, allowed: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest span of each text.

    Args:
        logits: (B, T, 2) of the first and of the last token.
        allowed: (B, T), the tokens that an answer may have; each text has some.
        most: tokens of an answer.

    Returns:
        First and last tokens (B,) and their scores (B,), the sums of both logits.
    """
    length = logits.shape[1]
    ordered = torch.ones(length, length, dtype=torch.bool).triu().tril(most - 1)
    possible = allowed[:, :, None] & allowed[:, None, :] & ordered
    scores = (logits[:, :, None, 0] + logits[:, None, :, 1]).masked_fill(~possible, -torch.inf)
    best, place = scores.flatten(1).max(dim=1)
    return place // length, place % length, best
