"""ROUGE-L against its formula, and normalisation in exact match."""

from __future__ import annotations

import random

import pytest

from raycloud.evaluation.rouge import exact, rouge_l


def plain(answer: list[str], reference: list[str]) -> float:
    """2PR / (P + R) of the longest common subsequence, by trying every subsequence of the answer."""
    longest = 0
    for chosen in range(2 ** len(answer)):
        words = [word for place, word in enumerate(answer) if chosen >> place & 1]
        rest = iter(reference)
        if all(word in rest for word in words):
            longest = max(longest, len(words))
    return 100 * 2 * longest / (len(answer) + len(reference)) if longest else 0.0


def test_rouge_is_the_formula_and_takes_the_best_reference() -> None:
    draw = random.Random(0)
    seen = set()
    for _ in range(40):
        answer, *references = [draw.choices("abcde", k=draw.randint(1, 8)) for _ in range(4)]
        scores = [plain(answer, reference) for reference in references]
        texts = [" ".join(reference) for reference in references]
        assert rouge_l(" ".join(answer), texts) == pytest.approx(max(scores))
        seen.add(scores.index(max(scores)))
    assert seen == {0, 1, 2}


def test_words_count_by_their_stems() -> None:
    assert rouge_l("The Cats kept jumping!", ["the cat keeps jumped"]) == 75.0
    assert rouge_l("", ["something"]) == rouge_l("something", [""]) == 0.0


@pytest.mark.parametrize(
    ("answer", "same"),
    [("  paris,\nFRANCE. ", True), ("Paris France", True), ("Paris, the France", False), ("ParisFrance", False)],
)
def test_exact_forgives_case_punctuation_and_space(answer: str, same: bool) -> None:
    assert exact(answer, ["London", "Paris, France"]) is same
    assert not exact(answer, ["London"])
