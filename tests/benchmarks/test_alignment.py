"""Alignment benchmark: results of the methods compared, and the reported figures."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from rapidfuzz.distance import Levenshtein

from raycloud.benchmarks import alignment
from raycloud.benchmarks.alignment import AlignmentCase, edited, warp
from tests.distill.spellings import CORPUS, byte_level, sentencepiece

TEXTS = [text + end for text in CORPUS for end in ("", ", the fox", "\nshells")]


def matching(ours: list[str], theirs: list[str]) -> Any:
    return Levenshtein.editops(ours, theirs).as_matching_blocks()


def test_an_edit_script_gives_the_same_alignment() -> None:
    """Texts for which equal strings are equal bytes, with a leading space in both tokenisations or in neither."""
    for student, teacher in (
        (byte_level(330), byte_level(350, skip=1)),
        (sentencepiece(230), sentencepiece(200, skip=1)),
    ):
        case = AlignmentCase.of(TEXTS, student, teacher)
        script, ours = edited(case, matching), case.checked()
        same = set(script.pairs) & set(map(tuple, ours.pairs.tolist()))
        assert len(same) > 0.95 * len(ours.pairs)
    case = AlignmentCase(
        ["abcdefg"], student, teacher, [[0, 1, 2]], [[0, 1, 2, 3]], ["ab", "cd", "efg"], ["ab", "c", "de", "fg"]
    )
    script = edited(case, matching)
    assert script.student == [0, 1, 1]
    assert script.teacher == [0, 1, 1, 1]
    assert script.pairs == [(0, 0)]
    assert script.overlap == [(0, 0, 2), (1, 1, 1), (1, 2, 1), (2, 2, 1), (2, 3, 2)]


def test_warping_takes_the_cheapest_path() -> None:
    student, teacher = ["a", "bc", "d", "ef"], ["ab", "c", "de", "f", "g"]

    @cache
    def least(i: int, j: int) -> int:
        before = [least(*at) for at in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if min(at) >= 0]
        return Levenshtein.distance(student[i], teacher[j]) + min(before, default=0)

    path = warp(student, teacher, Levenshtein.distance)
    assert path[0] == (3, 4) and path[-1] == (0, 0)
    assert all((i - k, j - m) in {(1, 1), (1, 0), (0, 1)} for (i, j), (k, m) in pairwise(path))
    assert sum(Levenshtein.distance(student[i], teacher[j]) for i, j in path) == least(3, 4)


def test_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = {"ours": byte_level(330), "theirs": byte_level(350, skip=1)}
    rows = [{"instruction": "Say it.", "input": text, "output": text[::-1]} for text in TEXTS]
    monkeypatch.setattr(alignment, "BUILT_IN", ("a/b", "ours", "theirs"))
    monkeypatch.setattr(alignment, "resolve", lambda source, notify: source)
    monkeypatch.setattr(alignment, "load_tokenizer", sides.get)
    monkeypatch.setattr(alignment, "load_rows", lambda source, split, notify: rows)
    monkeypatch.delenv("RAYCLOUD_DATA", raising=False)
    measured = alignment.run(texts=9, rounds=2)
    [note] = measured.notes
    assert note.startswith("skipped: TinyLlama/Mistral: RAYCLOUD_DATA")
    result = measured.figures
    figures = result["pairs"]["a/b"]
    assert result["pair"] == "a/b" and figures["texts"] == 9
    assert all(result[key] == figures[key] for key in ("exact_span_share", "pairs_per_s", "speedup_vs_dtw"))
    assert figures["pairs_per_s"] == pytest.approx(1e6 / figures["us_ours"])
    assert 0.5 < figures["exact_span_share"] < 1
    assert figures["rapidfuzz_agreement"] > 0.95
