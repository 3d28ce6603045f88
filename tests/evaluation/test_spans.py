"""SQuAD metrics on worked examples, and the best span against a brute-force search."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from raycloud.evaluation.spans import best_match, best_spans, exact_match, normalised, overlap_f1


def test_answers_are_compared_without_articles_punctuation_and_case() -> None:
    assert normalised("  The  Eiffel-Tower, (in Paris)! ") == "eiffeltower in paris"
    assert exact_match("the Tower", "Tower.") == 1.0
    assert exact_match("a tower", "two towers") == 0.0


def test_overlap_counts_words_as_often_as_both_have_them() -> None:
    # "big big dog" and "big dog dog": 2 of 3 words are shared.
    assert overlap_f1("the big big dog", "big dog dog") == pytest.approx(2 / 3)
    assert overlap_f1("cat", "dog") == 0.0
    assert overlap_f1("the", "a") == 1.0
    assert overlap_f1("the", "dog") == 0.0


def test_the_best_of_several_truths_counts() -> None:
    assert best_match(overlap_f1, "Ada Lovelace", ["Babbage", "Lovelace"]) == pytest.approx(2 / 3)
    assert best_match(exact_match, "", []) == 1.0
    assert best_match(exact_match, "something", []) == 0.0


def test_scores_are_those_of_the_official_script() -> None:
    """Answers of only articles and punctuation are included; the data file says how its numbers were made."""
    cases = json.loads(Path(__file__).with_name("squad_v2.json").read_text(encoding="utf-8"))["cases"]
    assert len(cases) == 20
    for case in cases:
        answer, truths = case["answer"], case["truths"]
        assert best_match(exact_match, answer, truths) == case["exact"], case
        assert best_match(overlap_f1, answer, truths) == pytest.approx(case["f1"]), case


def test_spans_are_the_likeliest_that_are_allowed() -> None:
    torch.manual_seed(0)
    logits, allowed, most = torch.randn(5, 9, 2), torch.rand(5, 9) < 0.7, 3
    allowed[:, 4] = True
    first, last, score = best_spans(logits, allowed, most)
    for text in range(5):
        tried = {
            (a, b): float(logits[text, a, 0] + logits[text, b, 1])
            for a, b in itertools.product(range(9), repeat=2)
            if a <= b < a + most and allowed[text, a] and allowed[text, b]
        }
        best = max(tried, key=lambda span: tried[span])
        assert (int(first[text]), int(last[text])) == best
        assert float(score[text]) == pytest.approx(tried[best])
