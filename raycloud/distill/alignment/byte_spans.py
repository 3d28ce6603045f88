"""Alignment of two tokenisations of the same texts by the bytes that their tokens cover.

Student token i and teacher token i seldom cover the same text. The byte offsets at which tokens end are comparable:
exactly, in time linear in the number of tokens, and for a whole corpus at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from raycloud.distill.alignment.vocabulary import Bools, Ints, characters, offsets_of, token_bytes, utf8_lengths
from raycloud.durable import write_atomically
from raycloud.errors import DataError
from raycloud.models.texts import end_ids

IdLists = Sequence[Sequence[int]]


@dataclass(frozen=True, eq=False)
class Alignment:
    """Alignment of B texts with n student tokens and m teacher tokens, concatenated over the texts.

    A chunk is the text between two neighbouring byte boundaries that both tokenisations have. All tensors are int32.
    """

    student_offsets: Tensor
    """(B + 1,): the student tokens of text b are ``student_offsets[b]`` to ``student_offsets[b + 1]``."""
    teacher_offsets: Tensor
    """(B + 1,)"""
    student_group: Tensor
    """(n,): chunk of each student token, ascending; -1 after the last shared boundary of its text."""
    teacher_group: Tensor
    """(m,)"""
    student_ends: Tensor
    """(n,): byte offset in its text at which each student token ends and the next begins."""
    teacher_ends: Tensor
    """(m,)"""
    pairs: Tensor
    """(P, 2): student and teacher tokens that are a chunk each, ascending."""
    overlap: Tensor
    """(E, 2): student and teacher tokens with common bytes, ascending. EOS counts as one byte."""
    overlap_bytes: Tensor
    """(E,): number of common bytes."""

    @property
    def texts(self) -> int:
        """Number of texts B."""
        return len(self.student_offsets) - 1

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return int(self.student_group.max()) + 1 if len(self.student_group) else 0

    @property
    def exact_match_share(self) -> float:
        """Share of student tokens with a teacher token of exactly the same bytes."""
        return len(self.pairs) / max(1, len(self.student_group))

    @property
    def chunk_share(self) -> float:
        """Share of student tokens that are in a chunk."""
        return int((self.student_group >= 0).sum()) / max(1, len(self.student_group))

    def to(self, device: torch.device) -> Alignment:
        """The same alignment on another device."""
        return Alignment(**{name: tensor.to(device) for name, tensor in self._tensors().items()})

    def select(self, texts: Sequence[int]) -> Alignment:
        """Alignment of some texts, such as a batch, in the given order.

        Raises:
            IndexError: there is no such text.
        """
        chosen = torch.as_tensor(texts, dtype=torch.long, device=self.student_offsets.device)
        if ((chosen < 0) | (chosen >= self.texts)).any():
            raise IndexError(f"texts {list(texts)} of an alignment of {self.texts}")
        student, student_offsets, student_moved = _select_runs(self.student_offsets, chosen)
        teacher, teacher_offsets, teacher_moved = _select_runs(self.teacher_offsets, chosen)
        moved = torch.stack([student_moved, teacher_moved], dim=1)

        def rows(of: Tensor) -> tuple[Tensor, Tensor]:
            """Indices of the token pairs that belong to the texts, and these pairs renumbered."""
            first = torch.searchsorted(of[:, 0].contiguous(), self.student_offsets)
            which, offsets, _ = _select_runs(first, chosen)
            return which, of[which] + moved.repeat_interleave(offsets.diff(), dim=0)

        overlapping, overlap = rows(self.overlap)
        return Alignment(
            student_offsets.int(),
            teacher_offsets.int(),
            _renumbered(self.student_group[student], student_offsets),
            _renumbered(self.teacher_group[teacher], teacher_offsets),
            self.student_ends[student],
            self.teacher_ends[teacher],
            rows(self.pairs)[1].int(),
            overlap.int(),
            self.overlap_bytes[overlapping],
        )

    def save(self, path: str | Path, key: str) -> None:
        """Write the file atomically; ``key`` identifies what it is valid for, see :func:`alignment_key`."""
        where = Path(path).expanduser()
        write_atomically(where, safetensors.torch.save(self._tensors(), {"key": key}))

    @classmethod
    def load(cls, path: str | Path, key: str) -> Alignment:
        """Read a file that :meth:`save` wrote.

        Raises:
            DataError: the file is missing or damaged, or it was made from other tokenizers or ids.
        """
        where = Path(path).expanduser()
        if not where.is_file():
            raise DataError(f"no alignment file at '{path}'")
        try:
            with safe_open(where, framework="pt") as file:
                stored = (file.metadata() or {}).get("key")
                if stored == key:
                    return cls(**{field.name: file.get_tensor(field.name).clone() for field in fields(cls)})
        except SafetensorError as error:
            raise DataError(f"'{path}' is damaged or no alignment file: {str(error).splitlines()[0]}") from error
        raise DataError(f"alignment file '{path}' is stale: it was made of other tokenizers or token ids")

    def _tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name).contiguous() for field in fields(self)}


def _select_runs(offsets: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Select runs that begin at ``offsets``: element indices, new offsets, and by how much each run has moved."""
    starts = offsets.long()[chosen]
    lengths = offsets.long()[chosen + 1] - starts
    new = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    moved = new[:-1] - starts
    return torch.arange(int(new[-1]), device=new.device) - moved.repeat_interleave(lengths), new, moved


def _renumbered(group: Tensor, offsets: Tensor) -> Tensor:
    """Renumber the chunks; every text begins with a new chunk, even if the same text is selected twice in a row."""
    fresh = torch.ones(len(group) + 1, dtype=torch.bool, device=group.device)
    fresh[1:-1] = group[1:] != group[:-1]
    fresh[offsets] = True
    counted = (fresh[:-1] & (group >= 0)).cumsum(0) - 1
    return torch.where(group >= 0, counted, -1).int()


def alignment_key(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, student_ids: IdLists, teacher_ids: IdLists
) -> str:
    """Identity of an alignment: SHA-256 of the bytes of both vocabularies and of all token ids."""
    digest = hashlib.sha256(b"2")
    for tokenizer, ids in ((student, student_ids), (teacher, teacher_ids)):
        offsets, flat = _flat(ids)
        ends = sorted(end_ids(tokenizer))
        digest.update(f"|{token_bytes(tokenizer).fingerprint}|{ends}|{len(ids)}|".encode())
        digest.update(offsets.tobytes() + flat.tobytes())
    return digest.hexdigest()


def align_texts(
    texts: Sequence[str],
    student_ids: IdLists,
    teacher_ids: IdLists,
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
) -> Alignment:
    """Align the token ids that two fast tokenizers made of the same texts, without special tokens.

    The bytes of the tokens are compared with the texts. If a tokenizer normalises a text, or finds a special token
    spelled out in it, the tokenizer's own offsets are used for that text.

    Args:
        texts: B texts.
        student_ids: ids of each text; they may be cut at the end, and may end with an end-of-text token.
        teacher_ids: likewise.
        student: tokenizer of the student's ids.
        teacher: tokenizer of the teacher's ids.

    Raises:
        DataError: ids do not belong to their text, or a tokenizer is neither byte-level BPE nor SentencePiece.
    """
    return _aligned(
        _spans_of_texts("student", texts, student_ids, student), _spans_of_texts("teacher", texts, teacher_ids, teacher)
    )


def align(
    student_ids: IdLists,
    teacher_ids: IdLists,
    student_lengths: Tensor,
    teacher_lengths: Tensor,
    *,
    student_eos: int | None = None,
    teacher_eos: int | None = None,
    student_lead: Sequence[int] | Ints | None = None,
    teacher_lead: Sequence[int] | Ints | None = None,
) -> Alignment:
    """Align two tokenisations of the same texts by the byte lengths of their tokens alone, without the texts.

    Training has the texts and uses :func:`align_texts`.

    Args:
        student_ids: ids of each text.
        teacher_ids: ids of each text.
        student_lengths: (V,) bytes of every student token, see ``vocabulary.byte_lengths``.
        teacher_lengths: (W,) likewise.
        student_eos: a text is complete if its last token is this one.
        teacher_eos: likewise.
        student_lead: number of bytes that each text's tokens have before the text, as SentencePiece's space; see
            :func:`leading_spaces`.
        teacher_lead: likewise.

    Raises:
        DataError: ids are outside their vocabulary, or complete texts differ in their number of bytes.
    """
    ours, ours_closed = _spans_of_lengths("student", student_ids, student_lengths, student_eos, student_lead)
    theirs, theirs_closed = _spans_of_lengths("teacher", teacher_ids, teacher_lengths, teacher_eos, teacher_lead)
    if len(ours_closed) != len(theirs_closed):
        raise DataError(f"{len(ours_closed)} texts of the student, {len(theirs_closed)} of the teacher")
    both = np.flatnonzero(ours_closed & theirs_closed)
    here, there = ours.ends[ours.offsets[both + 1] - 1], theirs.ends[theirs.offsets[both + 1] - 1]
    if (here != there).any():
        nth = int(np.flatnonzero(here != there)[0])
        raise DataError(
            f"text {both[nth]} has {here[nth] - 1} bytes in the student's tokens, {there[nth] - 1} in the teacher's; "
            "both must be of the same text and leave its bytes as they are"
        )
    return _aligned(ours, theirs)


def leading_spaces(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Ints:
    """Number (B,) of spaces that the tokenizer adds before each text: 1 if it is in the tokens and not in the text."""
    plain, spaced = token_bytes(tokenizer).lead
    return np.array([(spaced if text[0] == " " else plain) if text else 0 for text in texts], np.int64)


@dataclass(frozen=True)
class _Spans:
    """One side's tokens: start of each text (B + 1,), and the byte offset in its text at which each token ends (n,)."""

    offsets: Ints
    ends: Ints


def _flat(ids: IdLists) -> tuple[Ints, Ints]:
    """Start of each text's ids, and all ids concatenated."""
    offsets = offsets_of(np.fromiter(map(len, ids), np.int64, len(ids)))
    return offsets, np.fromiter(chain.from_iterable(ids), np.int64, int(offsets[-1]))


def _check_range(side: str, flat: Ints, size: int) -> None:
    if len(flat) and not 0 <= flat.min() <= flat.max() < size:
        wrong = flat[(flat < 0) | (flat >= size)][0]
        raise DataError(f"{side} token id {wrong} is not in its vocabulary of {size}")


def _closed(offsets: Ints, flat: Ints, ends: Collection[int]) -> Bools:
    """Mask (B,) of the texts whose last token ends the text."""
    closed = np.zeros(len(offsets) - 1, bool)
    some = np.flatnonzero(np.diff(offsets))
    closed[some] = np.isin(flat[offsets[some + 1] - 1], list(ends))
    return closed


def _ends(offsets: Ints, lengths: Ints, lead: Ints, closed: Bools) -> Ints:
    """Byte offset in its text at which each token ends. The end-of-text token counts as one byte after the text."""
    lengths = lengths.copy()
    lengths[offsets[1:][closed] - 1] = 1
    total = offsets_of(lengths)
    before = total[offsets[:-1]] + lead
    return np.maximum(total[1:] - np.repeat(before, np.diff(offsets)), 0)


def _spans_of_lengths(
    side: str, ids: IdLists, lengths: Tensor, eos: int | None, lead: Sequence[int] | Ints | None
) -> tuple[_Spans, Bools]:
    """Spans of one side's tokens, and which texts end with EOS."""
    offsets, flat = _flat(ids)
    table = lengths.numpy()
    _check_range(side, flat, len(table))
    closed = _closed(offsets, flat, () if eos is None else (eos,))
    before = np.zeros(len(ids), np.int64) if lead is None else np.asarray(lead)
    return _Spans(offsets, _ends(offsets, table[flat], before, closed)), closed


def _spans_of_texts(side: str, texts: Sequence[str], ids: IdLists, tokenizer: PreTrainedTokenizerBase) -> _Spans:
    """Spans of one side's tokens, after a comparison of their bytes with the texts."""
    if len(ids) != len(texts):
        raise DataError(f"{len(ids)} texts of the {side}'s ids for {len(texts)} texts")
    vocabulary = token_bytes(tokenizer)
    offsets, flat = _flat(ids)
    _check_range(side, flat, len(vocabulary.lengths))
    stops = end_ids(tokenizer)
    lead, closed = leading_spaces(tokenizer, texts), _closed(offsets, flat, stops)
    tokens = vocabulary.take(flat)
    ends = _ends(offsets, tokens.lengths, lead, closed)
    spelt, bounds = tokens.data.tobytes(), tokens.offsets[offsets].tolist()
    for nth, (start, end, space, whole) in enumerate(
        zip(bounds, bounds[1:], lead.tolist(), closed.tolist(), strict=False)
    ):
        given = b" " * space + texts[nth].encode()
        if not given.startswith(spelt[start:end]) or (whole and len(given) != end - start):
            ends[offsets[nth] : offsets[nth + 1]] = _ends_by_offsets(side, nth, texts[nth], ids[nth], tokenizer, stops)
    return _Spans(offsets, ends)


def _ends_by_offsets(
    side: str, nth: int, text: str, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, stops: Collection[int]
) -> Ints:
    """Result of :func:`_ends` from the tokenizer's own character offsets, for a text that the tokenizer has changed."""
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    known = made["input_ids"]
    rest = list(ids[len(known) :])
    if list(ids[: len(known)]) != known[: len(ids)] or rest not in ([], *([end] for end in stops)):
        raise DataError(f"the {side}'s ids of text {nth} are not what its tokenizer makes of it: {text[:40]!r}")
    byte_at = offsets_of(utf8_lengths(characters(text)))
    ends = byte_at[[end for _, end in made["offset_mapping"]][: len(ids)]]
    return np.append(ends, [byte_at[-1] + 1] * len(rest)).astype(np.int64)


@dataclass(frozen=True)
class _TokenEnds:
    """Distinct ends of one side's tokens, each as one ascending number that combines text and byte."""

    distinct: Ints
    first: Ints
    """First token with this end: the one that holds the byte before it. Other tokens with this end are empty."""
    rank: Ints
    """(n,): index of each token's end among the distinct ends."""

    @classmethod
    def of(cls, side: _Spans, stride: int, dtype: type[np.signedinteger]) -> _TokenEnds:
        text = np.repeat(np.arange(len(side.offsets) - 1, dtype=dtype), np.diff(side.offsets))
        ends = side.ends.astype(dtype) + dtype(stride) * text
        new = np.ones(len(ends), bool)
        new[1:] = ends[1:] != ends[:-1]
        first = np.flatnonzero(new)
        return cls(ends[first], first, np.cumsum(new, dtype=np.int32) - 1)


def _aligned(student: _Spans, teacher: _Spans) -> Alignment:
    stride = 1 + max(int(side.ends.max(initial=0)) for side in (student, teacher))
    # int32 halves the memory if the numbers fit.
    dtype = np.int32 if 2 * stride * len(student.offsets) < 2**31 else np.int64
    ours, theirs = _TokenEnds.of(student, stride, dtype), _TokenEnds.of(teacher, stride, dtype)
    # One sorted merge; at equal ends the student's comes before the teacher's. Everything else is counting.
    merged = np.sort(np.concatenate([2 * ours.distinct, 2 * theirs.distinct + 1]), kind="stable")
    ends, teachers = merged >> 1, (merged & 1).astype(bool)
    from_student, from_teacher = np.flatnonzero(~teachers), np.flatnonzero(teachers)
    text, shared = ends // stride, np.zeros(len(merged), bool)
    shared[1:] = ends[1:] == ends[:-1]
    chunk = np.cumsum(shared, dtype=np.int32) - shared
    next_shared = np.append(text[np.flatnonzero(shared)], dtype(-1))
    chunk = np.where(next_shared.take(chunk) == text, chunk, -1)
    student_group = chunk.take(from_student).take(ours.rank)
    teacher_group = chunk.take(from_teacher).take(theirs.rank)
    single = _single(student_group) & _single(teacher_group)
    # The bytes between neighbouring ends are common to one token of each side.
    cuts = np.flatnonzero(~shared)
    begins = text[cuts] * dtype(stride)
    begins[1:] = np.maximum(begins[1:], ends[cuts[:-1]])
    student_at = (np.cumsum(~teachers, dtype=np.int32) - ~teachers)[cuts]
    teacher_at = cuts - student_at
    common = ends[cuts] - begins
    for side, at in ((ours, student_at), (theirs, teacher_at)):
        common[np.append(side.distinct, dtype(-1))[at] // stride != text[cuts]] = 0
    some = np.flatnonzero(common > 0)
    arrays = {
        "student_offsets": student.offsets,
        "teacher_offsets": teacher.offsets,
        "student_group": student_group,
        "teacher_group": teacher_group,
        "student_ends": student.ends,
        "teacher_ends": teacher.ends,
        "pairs": np.stack([np.flatnonzero(single.take(group)) for group in (student_group, teacher_group)], axis=1),
        "overlap": np.stack([ours.first.take(student_at[some]), theirs.first.take(teacher_at[some])], axis=1),
        "overlap_bytes": common[some],
    }
    return Alignment(**{name: torch.from_numpy(array.astype(np.int32)) for name, array in arrays.items()})


def _single(group: Ints) -> Bools:
    """Mark chunks with exactly one token; one more entry, always False, is for tokens outside of chunks, -1."""
    counts = np.bincount(group + 1)
    return np.append(counts[1:] == 1, False)
