"""Bytes of tokens, and the map between two vocabularies, against a comparison of all pairs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from raycloud.distill.alignment import vocabulary
from raycloud.distill.alignment.vocabulary import (
    ByteStrings,
    VocabularyMap,
    byte_lengths,
    edit_distances,
    offsets_of,
    ranges,
    token_bytes,
)
from raycloud.errors import DataError
from tests.distill.spellings import CORPUS, byte_level, bytes_of, published, sentencepiece

PUBLISHED = ("gpt2-base", "mistral-7b-v0.1", "tinyllama-1.1b-3T")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("RAYCLOUD_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


def strings(parts: list[bytes]) -> ByteStrings:
    return ByteStrings(
        np.frombuffer(b"".join(parts), np.uint8), offsets_of(np.array([len(part) for part in parts], int))
    )


def entries(of: ByteStrings) -> list[bytes]:
    data = of.data.tobytes()
    return [data[start:end] for start, end in zip(of.offsets[:-1], of.offsets[1:], strict=True)]


def levenshtein(left: bytes, right: bytes) -> int:
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


@pytest.mark.parametrize(
    "tokenizer", [byte_level(), byte_level(prefix=True), sentencepiece(), sentencepiece(always=True)]
)
def test_bytes_of_every_token(tokenizer: PreTrainedTokenizerFast) -> None:
    expected = [bytes_of(tokenizer, number) for number in range(len(tokenizer))]
    assert entries(token_bytes(tokenizer)) == expected
    lengths = byte_lengths(tokenizer)
    assert lengths.dtype == torch.int32
    assert lengths.tolist() == list(map(len, expected))
    assert all(lengths[number] == 0 for number in tokenizer.all_special_ids)


@pytest.mark.parametrize("name", PUBLISHED)
def test_bytes_of_published_vocabularies(name: str) -> None:
    tokenizer = published(name)
    if tokenizer is None:
        pytest.skip(f"tokenizers/{name} is not here")
    expected = [bytes_of(tokenizer, number) for number in range(len(tokenizer))]
    assert entries(token_bytes(tokenizer)) == expected


def test_added_tokens_are_written_as_they_are() -> None:
    fresh = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(byte_level().backend_tokenizer.to_str()))
    before = token_bytes(fresh)
    fresh.add_tokens([AddedToken("<töol> x", special=False), AddedToken("<end>", special=True)])
    after = token_bytes(fresh)  # not the one from before
    assert entries(after) == [*entries(before), "<töol> x".encode(), b""]
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize(
    ("tokenizer", "lead"),
    [
        (byte_level(), (0, 0)),
        (byte_level(prefix=True), (1, 0)),
        (sentencepiece(), (1, 0)),
        (sentencepiece(always=True), (1, 1)),
    ],
)
def test_the_space_before_a_text(tokenizer: PreTrainedTokenizerFast, lead: tuple[int, int]) -> None:
    assert token_bytes(tokenizer).lead == lead


def test_other_tokenizers_are_refused() -> None:
    made = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    made.decoder = decoders.WordPiece()
    with pytest.raises(DataError, match="allowed: fast tokenizers that are byte-level BPE or SentencePiece"):
        byte_lengths(PreTrainedTokenizerFast(tokenizer_object=made))
    made = Tokenizer(models.BPE({"a": 0, "漢": 1}, []))
    made.decoder = decoders.ByteLevel()
    with pytest.raises(DataError, match="character '漢' of a byte-level vocabulary stands for no byte"):
        byte_lengths(PreTrainedTokenizerFast(tokenizer_object=made))


def test_ranges() -> None:
    found = ranges(np.array([5, 0, 9]), np.array([2, 0, 3]))
    assert found.tolist() == [5, 6, 9, 10, 11]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=9), st.binary(max_size=9)), max_size=12))
def test_edit_distances(pairs: list[tuple[bytes, bytes]]) -> None:
    found = edit_distances(strings([a for a, _ in pairs]), strings([b for _, b in pairs]))
    assert found.tolist() == [levenshtein(a, b) for a, b in pairs]


def edges(found: VocabularyMap) -> set[tuple[int, int, int]]:
    teacher = torch.arange(len(found.offsets) - 1).repeat_interleave(found.offsets.diff().long())
    return set(zip(teacher.tolist(), found.student_ids.tolist(), found.distances.tolist(), strict=True))


def all_pairs(
    student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast, bound: int
) -> set[tuple[int, int, int]]:
    ours, theirs = ([bytes_of(one, number) for number in range(len(one))] for one in (student, teacher))

    def single(one: PreTrainedTokenizerFast, number: int) -> bool:
        return "ByteFallback" in str(one.backend_tokenizer.decoder.__getstate__()) and 3 <= number < 259

    found = {
        (getattr(teacher, f"{role}_token_id"), getattr(student, f"{role}_token_id"), 0)
        for role in ("eos", "bos", "pad")
    }
    for t, word in enumerate(theirs):
        equal = [s for s, other in enumerate(ours) if word and other == word]
        if equal:
            found.add((t, min(equal, key=lambda s: single(student, s)), 0))
        elif word:
            near = {(t, s, levenshtein(word, other)) for s, other in enumerate(ours) if other and other not in theirs}
            found |= {edge for edge in near if edge[2] <= bound}
    return found


PAIRS = [
    (byte_level(350, skip=1), byte_level(350)),
    (byte_level(420), sentencepiece(260)),
    (sentencepiece(260), byte_level(420)),
    (sentencepiece(260), sentencepiece(230, always=True, skip=1)),
]


@pytest.mark.parametrize("bound", [0, 1, 2])
@pytest.mark.parametrize("pair", PAIRS)
def test_the_map_is_that_of_all_pairs(
    pair: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast], bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "_BLOCK", 3)  # more than one block
    found = VocabularyMap.build(*pair, bound)
    expected = all_pairs(*pair, bound)
    assert edges(found) == expected
    assert len(found.student_ids) == len(expected)
    assert len(found.offsets) == len(pair[1]) + 1 and len(found.covered) == len(pair[0])
    assert set(found.covered.nonzero()[:, 0].tolist()) == {student for _, student, _ in expected}
    if bound:
        assert any(distance for *_, distance in expected)


def test_weights_share_out_all_of_a_teacher_token() -> None:
    found = VocabularyMap.build(*PAIRS[1], 2)
    teacher = torch.arange(len(found.offsets) - 1).repeat_interleave(found.offsets.diff().long())
    total = torch.zeros(len(found.offsets) - 1).index_add_(0, teacher, found.weights)
    reached = found.offsets.diff() > 0
    assert torch.allclose(total[reached], torch.ones(int(reached.sum())))
    assert int(found.offsets.diff().max()) > 1


def test_one_vocabulary_maps_to_itself() -> None:
    found = VocabularyMap.build(byte_level(), byte_level())
    assert torch.equal(found.student_ids, torch.arange(len(byte_level()), dtype=torch.int32))
    assert found.covered.all() and not found.distances.any()


def test_every_token_that_is_produced_is_covered_by_itself() -> None:
    tokenizer = sentencepiece(260)
    found = VocabularyMap.build(tokenizer, tokenizer)
    ids = {number for text in CORPUS for number in tokenizer(text + "\n😀 ÿ", add_special_tokens=False)["input_ids"]}
    assert any(bytes_of(tokenizer, number) == b"\xf0" for number in ids)
    for number in ids:
        assert found.student_ids[found.offsets[number] : found.offsets[number + 1]].tolist() == [number]


def test_roles_count_and_not_strings() -> None:
    def named(**roles: str) -> PreTrainedTokenizerFast:
        state = Tokenizer.from_str(byte_level(nfc=True).backend_tokenizer.to_str())
        return PreTrainedTokenizerFast(tokenizer_object=state, **roles)

    teacher = named(bos_token="<pad>", eos_token="<s>", pad_token="<s>")
    student = named(bos_token="<s>", eos_token="</s>", pad_token="</s>")
    plain = named(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    start, end, pad = (student.convert_tokens_to_ids(name) for name in ("<s>", "</s>", "<pad>"))

    def special(ours: PreTrainedTokenizerFast, theirs: PreTrainedTokenizerFast) -> set[tuple[int, int, int]]:
        return {edge for edge in edges(VocabularyMap.build(ours, theirs)) if edge[0] in (start, end, pad)}

    assert special(student, teacher) == {(start, end, 0), (pad, start, 0)}
    # Padding that shares the student's EOS would be taken for it.
    assert special(student, plain) == {(end, end, 0), (start, start, 0)}


def test_a_map_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = VocabularyMap.build(*PAIRS[0])
    monkeypatch.setattr(vocabulary, "_mapped", None)
    again = VocabularyMap.build(*PAIRS[0])
    assert torch.equal(first.student_ids, again.student_ids)
    with pytest.raises(TypeError):
        VocabularyMap.build(*PAIRS[0], 3)
    with pytest.raises(DataError, match="bound of edits between tokens must be 0 or more, got -1"):
        VocabularyMap.build(*PAIRS[0], -1)
