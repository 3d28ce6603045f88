"""Bytes of the tokens of a vocabulary, and the map between two vocabularies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from raycloud.errors import DataError
from raycloud.fetch import cache_dir, cached_folder

Bytes = NDArray[np.uint8]
Ints = NDArray[np.signedinteger]
Bools = NDArray[np.bool_]

_SPACE = "\u2581"
"""SentencePiece writes a space as this character."""
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_LETTERS = np.array([chr(byte) for byte in range(256)], object)
"""Characters with which GPT-2 writes bytes: the Latin-1 character if it is printable, else the next one from U+0100
on."""
_LETTERS[np.setdiff1d(np.arange(256), _PRINTABLE)] = [chr(0x100 + nth) for nth in range(256 - len(_PRINTABLE))]
_FILE = "map.safetensors"
_ROLES = ("eos_token_id", "bos_token_id", "pad_token_id")


@dataclass(frozen=True, eq=False)
class ByteStrings:
    """Byte strings, concatenated."""

    data: Bytes
    offsets: Ints
    """(count + 1,)"""

    @cached_property
    def lengths(self) -> Ints:
        """Number of bytes (count,) of each string."""
        return np.diff(self.offsets)

    def take(self, chosen: Ints) -> ByteStrings:
        """Select strings, in the given order."""
        _, offsets, data = self.arrow().take(pa.array(chosen)).buffers()
        return ByteStrings(np.frombuffer(data, np.uint8), np.frombuffer(offsets, np.int64, len(chosen) + 1))

    def arrow(self) -> pa.Array:
        """The same memory as an Arrow array of binary strings, for fast lookups over millions of strings."""
        buffers = [None, pa.py_buffer(self.offsets), pa.py_buffer(self.data)]
        return pa.Array.from_buffers(pa.large_binary(), len(self.lengths), buffers)


@dataclass(frozen=True, eq=False)
class TokenBytes(ByteStrings):
    """Bytes of every token id; special tokens have none."""

    fallback: Bools
    """(V,) marks SentencePiece's tokens for single bytes: if the character has its own token, they are never
    produced."""
    lead: tuple[int, int]
    """Number of bytes that a text's tokens begin with and the text does not (SentencePiece's space): for a text in
    general, and for a text that begins with a space."""
    fingerprint: str
    """SHA-256 of all fields."""


def ranges(starts: Ints, lengths: Ints) -> Ints:
    """Concatenate ``arange(start, start + length)`` of each pair."""
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - before, lengths)


def offsets_of(lengths: Ints) -> Ints:
    """Start (count + 1,) of each part if parts of these lengths are concatenated, and the end of the last one."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def characters(text: str) -> Ints:
    """Code point of every character."""
    return np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.int64)


def utf8_lengths(codes: Ints) -> Ints:
    """Number of UTF-8 bytes of each code point."""
    return 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)


_token_bytes_cache: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, TokenBytes]] = WeakKeyDictionary()


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
    """Bytes of every token of a fast tokenizer, computed once per tokenizer and process.

    Raises:
        DataError: the tokenizer is neither byte-level BPE nor SentencePiece.
    """
    size, known = _token_bytes_cache.get(tokenizer, (-1, None))
    if known is None or size != len(tokenizer):
        known = _token_bytes(tokenizer)
        _token_bytes_cache[tokenizer] = (len(tokenizer), known)
    return known


def byte_lengths(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Number of bytes of every token id, int32 (V,).

    Raises:
        DataError: see :func:`token_bytes`.
    """
    return torch.from_numpy(token_bytes(tokenizer).lengths.astype(np.int32))


def _token_bytes(tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
    added = tokenizer.added_tokens_decoder
    size = 1 + max(*tokenizer.get_vocab().values(), *added)
    tokens = [token or "" for token in tokenizer.convert_ids_to_tokens(list(range(size)))]
    special = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
    for number in special:
        tokens[number] = ""
    fallback = np.zeros(size, bool)
    match _spelling(tokenizer):
        case "byte-level":
            # Only added tokens are stored as plain text.
            for number in added.keys() - special:
                tokens[number] = "".join(_LETTERS[list(added[number].content.encode())])
            strings = _byte_level(tokens)
        case "sentencepiece":
            number_of = tokenizer.backend_tokenizer.token_to_id
            ids = {byte: number_of(f"<0x{byte:02X}>") for byte in range(256)}
            bytes_of = {number: byte for byte, number in ids.items() if number is not None}
            strings = _sentencepiece(tokens, bytes_of)
            fallback[list(bytes_of)] = True
        case _:
            raise DataError(
                f"cannot tell the bytes of the tokens of {type(tokenizer).__name__} '{tokenizer.name_or_path}'; "
                "allowed: fast tokenizers that are byte-level BPE or SentencePiece"
            )
    probes = tokenizer(["a", " a"], add_special_tokens=False)["input_ids"]
    plain, spaced = (min(1, max(0, int(strings.lengths[ids].sum()) - at)) for at, ids in enumerate(probes, 1))
    digest = hashlib.sha256(f"{plain}{spaced}".encode() + strings.offsets.tobytes() + strings.data.tobytes())
    digest.update(fallback.tobytes())
    return TokenBytes(strings.data, strings.offsets, fallback, (plain, spaced), digest.hexdigest())


def _spelling(tokenizer: PreTrainedTokenizerBase) -> Literal["byte-level", "sentencepiece"] | None:
    """Encoding of bytes in token strings, as found from the decoder."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    state = json.loads(decoder.__getstate__()) if decoder is not None else {}
    steps = state.get("decoders", [state])
    if any(step.get("type") == "ByteLevel" for step in steps):
        return "byte-level"
    if any(step.get("type") == "Metaspace" or step.get("pattern") == {"String": _SPACE} for step in steps):
        return "sentencepiece"
    return None


def _byte_level(tokens: list[str]) -> ByteStrings:
    """Decode tokens in which every character is a byte, as GPT-2 writes them.

    Raises:
        DataError: a character does not encode a byte.
    """
    codes = characters("".join(tokens))
    bytes_of = np.full(max(256 + 68, int(codes.max(initial=0)) + 1), -1)
    bytes_of[characters("".join(_LETTERS))] = np.arange(256)
    data = bytes_of[codes]
    if (data < 0).any():
        raise DataError(f"character {chr(codes[data < 0][0])!r} of a byte-level vocabulary stands for no byte")
    return ByteStrings(data.astype(np.uint8), offsets_of(np.fromiter(map(len, tokens), np.int64, len(tokens))))


def _sentencepiece(tokens: list[str], bytes_of: Mapping[int, int]) -> ByteStrings:
    """Encode tokens as UTF-8 after replacing the space character; some tokens are single bytes."""
    text = "".join(tokens).replace(_SPACE, " ")
    starts = offsets_of(np.fromiter(map(len, tokens), np.int64, len(tokens)))
    offsets = offsets_of(utf8_lengths(characters(text)))[starts]
    data, lengths = np.frombuffer(text.encode(), np.uint8).copy(), np.diff(offsets)
    single = np.fromiter(bytes_of, np.int64)
    data[offsets[single]] = np.fromiter(bytes_of.values(), np.uint8)
    lengths[single] = 1
    return ByteStrings(data[ranges(offsets[:-1], lengths)], offsets_of(lengths))


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    """Student ids that receive a teacher id's probability, as a sparse matrix in CSR form with one row per teacher id.

    A teacher token with the same bytes as a student token maps to it and to no other; that student token receives from
    no other. Remaining tokens of both sides are joined if a few byte edits lead from one to the other. (FuseLLM, arXiv
    2401.10491, joins by the least edit distance, also tokens that have an equal.)
    """

    offsets: Tensor
    """int32 (W + 1,)"""
    student_ids: Tensor
    """int32 (E,); those of teacher id ``t`` are ``offsets[t]`` to ``offsets[t + 1]``."""
    distances: Tensor
    """int32 (E,): edit distance between the two byte strings, 0 if they are equal."""
    covered: Tensor
    """bool (V,): student ids that some teacher id maps to; no other id can receive probability."""

    @property
    def weights(self) -> Tensor:
        """float32 (E,): share of the teacher token's probability that each receives; the shares of a teacher id sum to
        1."""
        fan = self.offsets.diff().long()
        return (1.0 / fan.clamp_min(1)).repeat_interleave(fan)

    @classmethod
    def build(
        cls,
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        bound: int = 1,
        ends: tuple[int | None, int | None] = (None, None),
    ) -> VocabularyMap:
        """Map between two fast tokenizers, computed once and then read from the cache.

        Special tokens are joined by role: the end of an answer, EOS, BOS, PAD, each id once.

        Args:
            student: tokenizer whose vocabulary the student predicts.
            teacher: tokenizer whose vocabulary the teacher predicts.
            bound: maximum number of edits between tokens that have no equal; 0 joins equal tokens only.
            ends: ids that end an answer of student and teacher, if they are not EOS.

        Raises:
            DataError: the bound is negative, or a tokenizer is neither byte-level BPE nor SentencePiece.
        """
        if bound < 0:
            raise DataError(f"bound of edits between tokens must be 0 or more, got {bound}")
        ours, theirs = token_bytes(student), token_bytes(teacher)
        roles = _roles(student, teacher, ends)
        key = hashlib.sha256(f"1|{ours.fingerprint}|{theirs.fingerprint}|{roles}|{bound}".encode()).hexdigest()

        def prepare(folder: Path) -> None:
            save_file(_mapped(ours, theirs, roles, bound), folder / _FILE)

        return cls(**load_file(cached_folder(cache_dir() / "vocabularies" / key[:24], prepare) / _FILE))


def _roles(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, ends: tuple[int | None, int | None]
) -> dict[int, int]:
    """Teacher id to student id of special tokens. Ends come first: if padding shares the id of an end, the id means the
    end."""
    found: dict[int, int] = {}
    for ours, theirs in (ends, *((getattr(student, role), getattr(teacher, role)) for role in _ROLES)):
        if None not in (ours, theirs) and theirs not in found and ours not in found.values():
            found[theirs] = ours
    return found


def _mapped(student: TokenBytes, teacher: TokenBytes, roles: Mapping[int, int], bound: int) -> dict[str, Tensor]:
    ours, theirs = student.arrow(), teacher.arrow()
    # ``index_in`` returns the first of several tokens with equal bytes.
    produced_first = np.argsort(student.fallback, kind="stable")
    found = pc.index_in(theirs, ours.take(pa.array(produced_first))).fill_null(-1).to_numpy(zero_copy_only=False)
    equal = np.flatnonzero((found >= 0) & (teacher.lengths > 0))
    edges = [np.stack([equal, produced_first[found[equal]], np.zeros_like(equal)])]
    edges.append(np.array([(*pair, 0) for pair in roles.items()], np.int64).reshape(-1, 3).T)
    if bound:
        alone = np.flatnonzero(~_is_in(ours, theirs) & (student.lengths > 0))
        unmatched = np.flatnonzero((found < 0) & (teacher.lengths > 0))
        mine, other, distances = _pairs_within(student.take(alone), teacher.take(unmatched), bound)
        edges.append(np.stack([unmatched[other], alone[mine], distances]))
    rows, columns, distances = np.concatenate(edges, axis=1)
    order = np.lexsort((columns, rows))
    covered = np.zeros(len(student.lengths), bool)
    covered[columns] = True
    offsets = offsets_of(np.bincount(rows, minlength=len(teacher.lengths)))
    numbers = {"offsets": offsets, "student_ids": columns[order], "distances": distances[order]}
    return {name: torch.from_numpy(array.astype(np.int32)) for name, array in numbers.items()} | {
        "covered": torch.from_numpy(covered)
    }


def _is_in(strings: pa.Array, others: pa.Array) -> Bools:
    return np.asarray(pc.is_in(strings, others).to_numpy(zero_copy_only=False), bool)


_BLOCK = 8192
"""Number of strings, or pairs of strings, processed together."""


def _pairs_within(student: ByteStrings, teacher: ByteStrings, bound: int) -> tuple[Ints, Ints, Ints]:
    """All pairs within ``bound`` edits, as indices of both sides, and their distances.

    Two strings within the bound have a common remainder after deleting at most ``bound`` bytes from either (the
    deletion neighbourhood of SymSpell); only the pairs found in this way are measured.
    """
    remainders, owners = _neighbourhood(student, bound)
    numbered = remainders.arrow().dictionary_encode()
    code = numbered.indices.to_numpy(zero_copy_only=False)
    order = np.argsort(code, kind="stable")
    owners, first = owners[order], offsets_of(np.bincount(code, minlength=len(numbered.dictionary)))
    found = [np.zeros((3, 0), np.int64)]
    for at in range(0, len(teacher.lengths), _BLOCK):
        block = np.arange(at, min(at + _BLOCK, len(teacher.lengths)))
        others, of = _neighbourhood(teacher.take(block), bound)
        shared = pc.index_in(others.arrow(), numbered.dictionary).fill_null(-1).to_numpy(zero_copy_only=False)
        of, shared = block[of[shared >= 0]], shared[shared >= 0]
        fan = np.diff(first)[shared]
        pairs = np.unique(np.stack([owners[ranges(first[shared], fan)], np.repeat(of, fan)]), axis=1)
        edits = edit_distances(student.take(pairs[0]), teacher.take(pairs[1]))
        found.append(np.concatenate([pairs, edits[None]])[:, edits <= bound])
    mine, other, distances = np.concatenate(found, axis=1)
    return mine, other, distances


def _neighbourhood(strings: ByteStrings, bound: int) -> tuple[ByteStrings, Ints]:
    """The strings and all remainders after deleting up to ``bound`` of their bytes, and the index of each one's
    string."""
    owners = np.arange(len(strings.lengths))
    parts, whose = [strings], [owners]
    for _ in range(bound):
        lengths = strings.lengths
        source, gone = np.repeat(np.arange(len(lengths)), lengths), ranges(np.zeros_like(lengths), lengths)
        left = lengths[source] - 1
        within = ranges(np.zeros_like(left), left)
        within += within >= np.repeat(gone, left)
        strings = ByteStrings(strings.data[np.repeat(strings.offsets[source], left) + within], offsets_of(left))
        owners = owners[source]
        parts.append(strings)
        whose.append(owners)
    lengths = np.concatenate([part.lengths for part in parts])
    return ByteStrings(np.concatenate([part.data for part in parts]), offsets_of(lengths)), np.concatenate(whose)


def edit_distances(left: ByteStrings, right: ByteStrings) -> Ints:
    """Levenshtein distance in bytes between each left string and the right string of the same index."""
    distances = np.zeros(len(left.lengths), np.int64)
    order = np.argsort(np.maximum(left.lengths, right.lengths), kind="stable")
    for at in range(0, len(order), _BLOCK):
        block = order[at : at + _BLOCK]
        distances[block] = _edit_distances(left.take(block), right.take(block))
    return distances


def _edit_distances(left: ByteStrings, right: ByteStrings) -> Ints:
    """Wagner–Fischer table, row by row, for all pairs at once."""
    rows, columns = left.lengths, right.lengths
    here, there = _padded(left), _padded(right)
    steps = np.arange(there.shape[1] + 1)
    row = np.broadcast_to(steps, (len(rows), len(steps)))
    distances = columns.copy()
    for nth in range(1, here.shape[1] + 1):
        replaced = row[:, :-1] + (here[:, nth - 1, None] != there)
        row = np.concatenate([np.full((len(rows), 1), nth), np.minimum(row[:, 1:] + 1, replaced)], axis=1)
        # Insertions refer to the same row: the minimum over all earlier columns, plus the number of columns between.
        row = np.minimum.accumulate(row - steps, axis=1) + steps
        ended = rows == nth
        distances[ended] = row[ended, columns[ended]]
    return distances


def _padded(strings: ByteStrings) -> Bytes:
    slots = np.arange(strings.lengths.max(initial=0))
    padded = np.zeros((len(strings.lengths), len(slots)), np.uint8)
    padded[slots < strings.lengths[:, None]] = strings.data
    return padded
