"""Byte offsets of two tokenisations, against a two-pointer loop over each text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from raycloud.distill.alignment.byte_spans import Alignment, align, align_texts, alignment_key, leading_spaces
from raycloud.distill.alignment.vocabulary import byte_lengths
from raycloud.errors import DataError
from raycloud.models.loading import load_tokenizer, resolve
from tests.distill.spellings import CORPUS, SHARED, byte_level, bytes_of, published, sentencepiece

Tokenizers = tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]
KINDS = {
    "bytes": byte_level(330),
    "prefixed bytes": byte_level(350, prefix=True, skip=1),
    "first": sentencepiece(200),
    "always": sentencepiece(230, always=True, skip=1),
}
MIXED = [(ours, theirs) for ours in KINDS for theirs in KINDS if ours != theirs]
TEXTS = [
    *CORPUS,
    "",
    " ",
    "  leading and trailing  ",
    "\nnew line first",
    "👩‍👩‍👧 family, naïve 漢字 e\u0301\t\n\n",
    "a",
]
WORDS = st.sampled_from(
    ["the", "shells", " ", "  ", "\n", "é", "漢字", "👍🏽", "e\u0301", "ß", "12", "…", "\t", "sea", "x"]
)
SENTENCES = st.lists(st.one_of(WORDS, st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))))


def ids_of(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], *, eos: bool = True) -> list[list[int]]:
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [[*one, tokenizer.eos_token_id] if eos else one for one in ids]


def aligned(texts: Sequence[str], kinds: tuple[str, str], *, eos: bool = True) -> Alignment:
    ours, theirs = KINDS[kinds[0]], KINDS[kinds[1]]
    return align_texts(texts, ids_of(ours, texts, eos=eos), ids_of(theirs, texts, eos=eos), ours, theirs)


def spans_of(text: str, ids: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> list[tuple[int, int]]:
    """Compute begin and end of every token; the space before the text is cut off, and EOS gets one byte after it."""
    size = len(text.encode())
    spelt = [bytes_of(tokenizer, number) for number in ids]
    spaced = {KINDS["always"]: True, KINDS["bytes"]: False}.get(tokenizer, not text.startswith(" "))
    lead = int(spaced and text != "")
    spans, at = [], -lead
    for number, piece in zip(ids, spelt, strict=True):
        if number == tokenizer.eos_token_id:
            spans.append((size, size + 1))
        else:
            spans.append((max(at, 0), max(at + len(piece), 0)))
            at += len(piece)
    return spans


@dataclass
class Walked:
    student: list[int]
    teacher: list[int]
    pairs: list[list[int]]
    overlap: list[list[int]]
    bytes: list[int]


def walk(sides: Sequence[tuple[list[tuple[int, int]], list[tuple[int, int]]]]) -> Walked:
    """Align with two pointers: advance past the token that ends first; a chunk ends where both end together."""
    found = Walked([], [], [], [], [])
    chunk = 0
    for ours, theirs in sides:
        at, there = len(found.student), len(found.teacher)
        i = j = first = other = 0
        while i < len(ours) and j < len(theirs):
            if ours[i][1] < theirs[j][1]:
                i += 1
            elif ours[i][1] > theirs[j][1]:
                j += 1
            else:
                found.student += [chunk] * (i + 1 - first)
                found.teacher += [chunk] * (j + 1 - other)
                if (i, j) == (first, other):
                    found.pairs.append([at + i, there + j])
                i, j, chunk = i + 1, j + 1, chunk + 1
                first, other = i, j
        found.student += [-1] * (len(ours) - first)
        found.teacher += [-1] * (len(theirs) - other)
        for s, mine in enumerate(ours):
            for t, its in enumerate(theirs):
                if (common := min(mine[1], its[1]) - max(mine[0], its[0])) > 0:
                    found.overlap.append([at + s, there + t])
                    found.bytes.append(common)
    return found


def assert_walked(found: Alignment, sides: Sequence[tuple[list[tuple[int, int]], list[tuple[int, int]]]]) -> None:
    expected = walk(sides)
    assert found.student_group.tolist() == expected.student
    assert found.teacher_group.tolist() == expected.teacher
    assert found.pairs.tolist() == expected.pairs
    assert found.overlap.tolist() == expected.overlap
    assert found.overlap_bytes.tolist() == expected.bytes
    assert found.student_ends.tolist() == [end for ours, _ in sides for _, end in ours]
    assert found.teacher_ends.tolist() == [end for _, theirs in sides for _, end in theirs]
    assert all(getattr(found, field.name).dtype == torch.int32 for field in fields(found))


def assert_equal(found: Alignment, expected: Alignment) -> None:
    for field in fields(Alignment):
        assert torch.equal(getattr(found, field.name), getattr(expected, field.name)), field.name


@pytest.mark.parametrize("kinds", MIXED)
@settings(max_examples=40, deadline=None)
@given(texts=st.lists(SENTENCES.map("".join), max_size=5), cut=st.integers(0, 12), eos=st.booleans())
def test_as_two_pointers_find_it(kinds: tuple[str, str], texts: list[str], cut: int, eos: bool) -> None:
    ours, theirs = KINDS[kinds[0]], KINDS[kinds[1]]
    student, teacher = ids_of(ours, texts, eos=eos), ids_of(theirs, texts, eos=eos)
    if cut:  # either side, or both
        student = [one[: max(1, len(one) - cut)] for one in student]
        teacher = [one[: max(1, len(one) - cut // 2)] for one in teacher]
    found = align_texts(texts, student, teacher, ours, theirs)
    sides = [
        (spans_of(text, mine, ours), spans_of(text, its, theirs))
        for text, mine, its in zip(texts, student, teacher, strict=True)
    ]
    assert_walked(found, sides)


@pytest.mark.parametrize("kinds", MIXED)
def test_chunks_pairs_and_overlaps_are_the_same_bytes(kinds: tuple[str, str]) -> None:
    found = aligned(TEXTS, kinds)
    ours, theirs = (
        [
            span
            for text, ids in zip(TEXTS, ids_of(KINDS[kind], TEXTS), strict=True)
            for span in spans_of(text, ids, KINDS[kind])
        ]
        for kind in kinds
    )
    assert (found.student_group >= 0).all() and (found.teacher_group >= 0).all()
    assert found.chunk_share == 1.0
    for chunk in range(found.chunks):
        mine = [ours[index] for index in (found.student_group == chunk).nonzero()[:, 0].tolist()]
        its = [theirs[index] for index in (found.teacher_group == chunk).nonzero()[:, 0].tolist()]
        assert (mine[0][0], mine[-1][1]) == (its[0][0], its[-1][1])
    assert len(found.pairs) > 20
    assert found.exact_match_share == len(found.pairs) / len(ours)
    for s, t in found.pairs.tolist():
        assert ours[s] == theirs[t]
    for column, side in ((0, ours), (1, theirs)):
        total = torch.zeros(len(side), dtype=torch.int32)
        total.index_add_(0, found.overlap[:, column], found.overlap_bytes)
        assert total.tolist() == [end - begin for begin, end in side]


@pytest.mark.parametrize("kinds", MIXED)
def test_pairs_decode_to_equal_bytes(kinds: tuple[str, str]) -> None:
    texts = [f"x{text}" for text in TEXTS]
    found = aligned(texts, kinds, eos=False)
    student, teacher = ([number for one in ids_of(KINDS[kind], texts, eos=False) for number in one] for kind in kinds)
    for s, t in found.pairs.tolist():
        mine, its = bytes_of(KINDS[kinds[0]], student[s]), bytes_of(KINDS[kinds[1]], teacher[t])
        assert mine == its or mine.strip() == its.strip() == b"x"


def test_one_tokenizer_is_aligned_with_itself_token_by_token() -> None:
    for kind in KINDS:
        found = aligned(TEXTS, (kind, kind))
        count = torch.arange(len(found.student_group), dtype=torch.int32)
        assert torch.equal(found.student_group, count)
        assert torch.equal(found.pairs, torch.stack([count, count], dim=1))
        assert found.exact_match_share == 1.0


def test_the_space_before_a_text_is_not_in_it() -> None:
    # Mistral spells "\nnew" as space, newline, ...: the space belongs to the newline's chunk and has no bytes.
    found = aligned(["\nnew"], ("always", "bytes"))
    tokens = KINDS["always"].convert_ids_to_tokens(ids_of(KINDS["always"], ["\nnew"])[0])
    assert tokens[:2] == ["▁", "\n"]
    assert found.student_group[:2].tolist() == [0, 0]
    assert found.student_ends[:2].tolist() == [0, 1]
    assert found.overlap[0].tolist() == [1, 0]
    # Where both write it, it is a pair.
    assert aligned(["\nnew"], ("always", "first")).pairs[0].tolist() == [0, 0]
    # The first word is the same word, whoever writes a space before it.
    assert aligned(["the shells"], ("always", "bytes")).pairs.tolist() == [[0, 0], [1, 1], [2, 2]]


def test_eos_pairs_with_eos_by_rule() -> None:
    ours, theirs = byte_level(330), sentencepiece(200)
    assert ours.eos_token_id != theirs.eos_token_id
    text = ["the shells"]
    (mine,), (its,) = ids_of(ours, text), ids_of(theirs, text)
    both = align_texts(text, [mine], [its], ours, theirs)
    assert both.pairs[-1].tolist() == [len(mine) - 1, len(its) - 1]
    assert both.overlap[-1].tolist() == [len(mine) - 1, len(its) - 1] and both.overlap_bytes[-1] == 1
    one = align_texts(text, [mine], [its[:-1]], ours, theirs)
    assert one.student_group[-1] == -1 and (one.student_group[:-1] >= 0).all()
    assert [len(mine) - 1] not in one.overlap[:, :1].tolist()
    only = align_texts([""], [[ours.eos_token_id]], [[theirs.eos_token_id]], ours, theirs)
    assert only.pairs.tolist() == [[0, 0]]


def test_what_is_cut_off_has_no_chunk() -> None:
    ours, theirs = byte_level(330), sentencepiece(200)
    text = ["she sells sea shells, and so on"]
    (mine,), (its,) = ids_of(ours, text), ids_of(theirs, text)
    found = align_texts(text, [mine], [its[:3]], ours, theirs)
    last = int(found.teacher_ends[-1])
    assert [group >= 0 for group in found.student_group.tolist()] == [
        end <= max(set(found.student_ends.tolist()) & set(found.teacher_ends.tolist()))
        for end in found.student_ends.tolist()
    ]
    assert found.chunk_share < 1
    assert found.overlap_bytes.sum() == last


@pytest.mark.parametrize("kinds", MIXED)
def test_a_selection_is_the_alignment_of_the_selected(kinds: tuple[str, str]) -> None:
    ours, theirs = KINDS[kinds[0]], KINDS[kinds[1]]
    student, teacher = ids_of(ours, TEXTS), [one[: 1 + len(one) // 2] for one in ids_of(theirs, TEXTS)]
    whole = align_texts(TEXTS, student, teacher, ours, theirs)
    for chosen in ([3], [5, 4, 0, 9], [2, 2, 4, 4, 2], list(range(len(TEXTS))), []):
        expected = align_texts(*([side[index] for index in chosen] for side in (TEXTS, student, teacher)), ours, theirs)
        assert_equal(whole.select(chosen), expected)
        assert whole.select(chosen).texts == len(chosen)
    for chosen in ([len(TEXTS)], [-1]):
        with pytest.raises(IndexError, match="of an alignment of 10"):
            whole.select(chosen)


@pytest.mark.parametrize("kinds", MIXED)
def test_lengths_alone_say_the_same(kinds: tuple[str, str]) -> None:
    ours, theirs = KINDS[kinds[0]], KINDS[kinds[1]]
    student, teacher = ids_of(ours, TEXTS), ids_of(theirs, TEXTS)
    found = align(
        student,
        teacher,
        byte_lengths(ours),
        byte_lengths(theirs),
        student_eos=ours.eos_token_id,
        teacher_eos=theirs.eos_token_id,
        student_lead=leading_spaces(ours, TEXTS),
        teacher_lead=leading_spaces(theirs, TEXTS),
    )
    assert_equal(found, align_texts(TEXTS, student, teacher, ours, theirs))


def test_a_token_without_bytes_before_a_text() -> None:
    lengths = torch.tensor([0, 1, 2], dtype=torch.int32)
    found = align([[1, 2], [0, 2, 1]], [[1, 2], [1, 1]], lengths, lengths, student_lead=[0, 1])
    assert found.student_ends.tolist() == [1, 3, 0, 1, 2]
    assert found.student_group.tolist() == [0, 1, 2, 2, 3]
    assert found.teacher_group.tolist() == [0, 1, 2, 3]


def test_a_large_corpus_needs_wide_numbers() -> None:
    """Offsets are counted in 32 bits only if they fit."""
    lengths = torch.tensor([1, 2, 2**30])
    student, teacher = [[0, 0, 1], [1, 0], [2, 1]] * 2, [[1, 1], [0, 1], [2, 0, 0]] * 2
    found = align(student, teacher, lengths, lengths)
    spans = {0: 1, 1: 2, 2: 2**30}

    def of(ids: list[int]) -> list[tuple[int, int]]:
        ends = [sum(spans[number] for number in ids[: nth + 1]) for nth in range(len(ids))]
        return list(zip([0, *ends], ends, strict=False))

    assert_walked(found, [(of(mine), of(its)) for mine, its in zip(student, teacher, strict=True)])


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (byte_level(nfc=True), "cafe\u0301 the shells"),
        (byte_level(nfc=True), "q\u0302\u0323 the shells"),
        (sentencepiece(200), "the ▁ 😀 shells"),
        (sentencepiece(200), "▁the shells"),
        (byte_level(330), "so </s> the shells"),
    ],
)
def test_a_text_that_is_changed_is_aligned_by_the_tokenizers_offsets(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    other = byte_level(350, prefix=True, skip=1) if "</s>" not in text else sentencepiece(200)
    texts = ["sea shells", text, "the fox"]
    student, teacher = ids_of(tokenizer, texts), ids_of(other, texts)
    found = align_texts(texts, student, teacher, tokenizer, other).select([1])
    size = len(text.encode())
    assert found.student_ends[-1] == found.teacher_ends[-1] == size + 1
    total = torch.zeros(len(found.student_ends), dtype=torch.int32)
    total.index_add_(0, found.overlap[:, 0], found.overlap_bytes)
    assert torch.equal(total, found.student_ends.diff(prepend=torch.zeros(1, dtype=torch.int32)))
    # What lies behind the change is aligned exactly.
    shells = size - len(" shells")
    assert shells in found.student_ends.tolist() and shells in found.teacher_ends.tolist()
    assert found.pairs[-1].tolist() == [len(student[1]) - 1, len(teacher[1]) - 1]
    cut = align_texts(texts, [one[:-2] for one in student], teacher, tokenizer, other).select([1])
    assert torch.equal(cut.student_ends, found.student_ends[:-2])


def test_ids_that_are_not_of_their_text() -> None:
    ours, theirs = byte_level(330), sentencepiece(200)
    texts = ["the shells", "sea shells"]
    student, teacher = ids_of(ours, texts), ids_of(theirs, texts)
    with pytest.raises(
        DataError, match="the student's ids of text 0 are not what its tokenizer makes of it: 'the shells'"
    ):
        align_texts(texts, student[::-1], teacher, ours, theirs)
    with pytest.raises(DataError, match="the teacher's ids of text 1 are not what"):
        align_texts(texts, student, [teacher[0], [teacher[1][0], teacher[1][-1]]], ours, theirs)
    with pytest.raises(DataError, match="1 texts of the teacher's ids for 2 texts"):
        align_texts(texts, student, teacher[:1], ours, theirs)
    with pytest.raises(DataError, match="student token id 9999 is not in its vocabulary of 333"):
        align_texts(texts, [student[0], [9999]], teacher, ours, theirs)
    lengths = byte_lengths(ours), byte_lengths(theirs)
    with pytest.raises(DataError, match="teacher token id -1 is not in its vocabulary"):
        align(student, [teacher[0], [-1]], *lengths)
    with pytest.raises(DataError, match="2 texts of the student, 1 of the teacher"):
        align(student, teacher[:1], *lengths)
    with pytest.raises(DataError, match="text 0 has 10 bytes in the student's tokens, 11 in the teacher's"):
        align(student, teacher, *lengths, student_eos=ours.eos_token_id, teacher_eos=theirs.eos_token_id)


def test_files(tmp_path: Path) -> None:
    ours, theirs = byte_level(330), sentencepiece(200)
    student, teacher = ids_of(ours, TEXTS), ids_of(theirs, TEXTS)
    found, path = align_texts(TEXTS, student, teacher, ours, theirs), tmp_path / "deep" / "alignment.safetensors"
    key = alignment_key(ours, theirs, student, teacher)
    found.save(path, key)
    found.save(path, key)
    assert [child.name for child in path.parent.iterdir()] == [path.name]
    assert_equal(Alignment.load(path, key), found)
    others = [
        alignment_key(ours, ours, student, teacher),
        alignment_key(theirs, ours, student, teacher),
        alignment_key(ours, sentencepiece(200, always=True), student, teacher),
        alignment_key(ours, theirs, student[:-1], teacher[:-1]),
        alignment_key(ours, theirs, [*student[:-2], student[-2] + student[-1], []], teacher),
    ]
    assert len({key, *others}) == 6
    for other in others:
        with pytest.raises(DataError, match="is stale: it was made of other tokenizers or token ids"):
            Alignment.load(path, other)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="is damaged or no alignment file"):
        Alignment.load(path, key)
    with pytest.raises(DataError, match="no alignment file at"):
        Alignment.load(tmp_path / "none", key)


def test_nothing_at_all() -> None:
    found = aligned([], ("bytes", "first"))
    assert found.texts == found.chunks == found.exact_match_share == found.chunk_share == 0
    assert found.pairs.shape == found.overlap.shape == (0, 2)


@pytest.mark.parametrize(
    ("student", "teacher", "share"),
    [
        ("tinyllama-1.1b-3T", "mistral-7b-v0.1", 0.888),
        ("gpt2-base", "mistral-7b-v0.1", 0.883),
        ("gpt2-base", "builtin:smollm2-135m-instruct", 0.928),
    ],
)
def test_published_tokenizers_on_real_responses(student: str, teacher: str, share: float) -> None:
    sides = [
        load_tokenizer(resolve(name)) if name.startswith("builtin:") else published(name) for name in (student, teacher)
    ]
    if None in sides or not (SHARED / "dolly/dev.jsonl").is_file():
        pytest.skip("the development data is not here")
    lines = (SHARED / "dolly/dev.jsonl").read_text(encoding="utf-8").splitlines()
    texts = TEXTS + [json.loads(line)["output"] for line in lines]
    ids = [ids_of(side, texts, eos=False) for side in sides]  # type: ignore[arg-type]
    found = align_texts(texts, *ids, *sides)  # type: ignore[arg-type]
    assert found.exact_match_share == pytest.approx(share, abs=0.001)
    assert found.chunk_share == 1.0
    spans = []
    for nth, text in enumerate(texts[:50]):
        here = []
        for side, one in zip(sides, ids, strict=True):
            pieces = [bytes_of(side, number) for number in one[nth]]  # type: ignore[arg-type]
            at = len(text.encode()) - len(b"".join(pieces))
            assert b" " * -at + text.encode() == b"".join(pieces)
            ends = [max(0, at + sum(map(len, pieces[: n + 1]))) for n in range(len(pieces))]
            here.append(list(zip([0, *ends], ends, strict=False)))
        spans.append((here[0], here[1]))
    assert_walked(found.select(range(50)), spans)
