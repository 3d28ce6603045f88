"""Similarity of an answer to its references: ROUGE-L and exact match."""

from __future__ import annotations

import string
from collections.abc import Sequence
from functools import cache
from typing import Any

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """ROUGE-L (Lin 2004) in per cent: F-measure of the longest common subsequence of stemmed words, best reference.

    ``rouge_score`` keeps only the letters a to z and digits: other scripts score 0.
    """
    return 100 * float(_scorer().score_multi(references, answer)["rougeL"].fmeasure)


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # the import is a sixth of a worker's start, and few jobs need it

    return RougeScorer(["rougeL"], use_stemmer=True)


def exact(answer: str, references: Sequence[str]) -> bool:
    """Check that the answer equals a reference, except for case, ASCII punctuation and white space.

    The rule is that of Super-NaturalInstructions (Wang et al. 2022); articles count.
    """
    return _normalised(answer) in map(_normalised, references)


def _normalised(text: str) -> str:
    return " ".join(text.lower().translate(_PUNCTUATION).split())
