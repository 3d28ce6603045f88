"""Alignment of two tokenisations: byte offsets against dynamic time warping and against an edit script of rapidfuzz.

The published method (MinED, FuseLLM) aligns two lists of tokens by dynamic time warping, where the cost of a match is
the edit distance of the two strings: N x M steps in Python per text. Here rapidfuzz computes these distances in C, each
once. The other method compared is the edit script of rapidfuzz between both lists of token strings, converted to the
same chunks, pairs and overlaps. All methods get token ids, with tables by vocabulary entry made beforehand; none gets
the text. ``align_texts``, which also compares the bytes of the tokens with the text, is measured too.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from raycloud.benchmarks.measure import PAIRS, SMOLLM2, Measured, interleaved, median_ratio
from raycloud.data.sources import load_rows
from raycloud.distill.alignment.byte_spans import Alignment, align, align_texts, leading_spaces
from raycloud.distill.alignment.vocabulary import byte_lengths, token_bytes
from raycloud.errors import MissingExtra
from raycloud.models.loading import load_tokenizer, resolve
from raycloud.report.console import console, timed

BUILT_IN = ("SmolLM2/Gemma", SMOLLM2, "builtin:gemma3-270m")
PUBLISHED = ("TinyLlama/Mistral", "tokenizers/tinyllama-1.1b-3T", "tokenizers/mistral-7b-v0.1")
TEXTS = 2000
QUICK = {"texts": 64, "rounds": 2}
WARPED = 16
"""Number of texts on which time warping is timed, evenly spaced in order of length."""


@dataclass(frozen=True)
class AlignmentCase:
    """Texts, tokenised by the student's and the teacher's tokenizer."""

    texts: list[str]
    student: PreTrainedTokenizerBase
    teacher: PreTrainedTokenizerBase
    student_ids: list[list[int]]
    teacher_ids: list[list[int]]
    student_strings: list[str]
    """String of each vocabulary entry, with spaces written as spaces."""
    teacher_strings: list[str]

    @classmethod
    def of(
        cls, texts: Sequence[str], student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
    ) -> AlignmentCase:
        """Tokenise texts without special tokens; empty texts are dropped."""
        texts = sorted((text for text in texts if text), key=len)
        ids = [tokenizer(texts, add_special_tokens=False)["input_ids"] for tokenizer in (student, teacher)]
        return cls(texts, student, teacher, ids[0], ids[1], _token_strings(student), _token_strings(teacher))

    def checked(self) -> Alignment:
        """Align all texts with ``align_texts``, which compares the bytes of the tokens with the text."""
        return align_texts(self.texts, self.student_ids, self.teacher_ids, self.student, self.teacher)

    def ours(self) -> Callable[[], Alignment]:
        """Return a function that aligns all texts from token ids alone."""
        lengths = byte_lengths(self.student), byte_lengths(self.teacher)
        before = leading_spaces(self.student, self.texts), leading_spaces(self.teacher, self.texts)
        return lambda: align(
            self.student_ids, self.teacher_ids, *lengths, student_lead=before[0], teacher_lead=before[1]
        )

    def strings(self, nth: int) -> tuple[list[str], list[str]]:
        """Return the student's and the teacher's token strings of the text with this index."""
        words, others = self.student_strings, self.teacher_strings
        return [words[token] for token in self.student_ids[nth]], [others[token] for token in self.teacher_ids[nth]]

    @property
    def some(self) -> list[int]:
        """Indices of the texts on which time warping is timed."""
        return np.linspace(0, len(self.texts) - 1, min(WARPED, len(self.texts)) + 2).round().astype(int)[1:-1].tolist()


def _token_strings(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the bytes of each vocabulary entry as latin-1, one spelling for byte-level and SentencePiece tokens."""
    entries = token_bytes(tokenizer)
    data, offsets = entries.data.tobytes(), entries.offsets.tolist()
    return [data[start:end].decode("latin-1") for start, end in zip(offsets, islice(offsets, 1, None), strict=False)]


def warp(student: Sequence[str], teacher: Sequence[str], distance: Callable[[str, str], int]) -> list[tuple[int, int]]:
    """Find the cheapest monotone path through all matches of student and teacher tokens, by dynamic time warping.

    Returns:
        Pairs (student index, teacher index), the last pair first.
    """
    known: dict[tuple[str, str], int] = {}
    cost = [[0.0] * len(teacher) for _ in student]
    for i, ours in enumerate(student):
        for j, theirs in enumerate(teacher):
            here = known.get((ours, theirs))
            if here is None:
                here = known[ours, theirs] = distance(ours, theirs)
            before = 0.0
            if i and j:
                before = min(cost[i - 1][j - 1], cost[i - 1][j], cost[i][j - 1])
            elif i or j:
                before = cost[i - 1][j] if i else cost[i][j - 1]
            cost[i][j] = here + before
    i, j = len(student) - 1, len(teacher) - 1
    path = [(i, j)]
    while i or j:
        steps = [(i - 1, j - 1)] if i and j else []
        steps += [(i - 1, j)] if i else []
        steps += [(i, j - 1)] if j else []
        i, j = min(steps, key=lambda at: cost[at[0]][at[1]])
        path.append((i, j))
    return path


@dataclass
class Edited:
    """Alignment of all texts from edit scripts: chunks, pairs and overlaps as in :class:`Alignment`, but as lists."""

    student: list[int] = field(default_factory=list)
    teacher: list[int] = field(default_factory=list)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    overlap: list[tuple[int, int, int]] = field(default_factory=list)


def edited(case: AlignmentCase, matching: Callable[[list[str], list[str]], Any]) -> Edited:
    """Align all texts with an edit script between their two lists of token strings.

    Args:
        case: texts to align.
        matching: returns the runs of equal tokens as (student index, teacher index, length), an empty run last. The
            tokens between two runs form one chunk.
    """
    found, chunk = Edited(), 0
    for nth in range(len(case.texts)):
        ours, theirs = case.strings(nth)
        at, there = len(found.student), len(found.teacher)
        i = j = 0
        for first, other, size in matching(ours, theirs):
            if first > i or other > j:
                found.student += [chunk] * (first - i)
                found.teacher += [chunk] * (other - j)
                found.overlap += common(
                    list(map(len, ours[i:first])), list(map(len, theirs[j:other])), at + i, there + j
                )
                chunk += 1
            i, j = first + size, other + size
            here, across = range(at + first, at + i), range(there + other, there + j)
            found.student += range(chunk, chunk + size)
            found.teacher += range(chunk, chunk + size)
            found.pairs += zip(here, across, strict=True)
            found.overlap += zip(here, across, map(len, ours[first:i]), strict=True)
            chunk += size
    return found


def common(ours: list[int], theirs: list[int], at: int, there: int) -> list[tuple[int, int, int]]:
    """Count the bytes that each pair of tokens in a chunk shares.

    Args:
        ours: byte lengths of the student's tokens; changed.
        theirs: byte lengths of the teacher's tokens; changed.
        at: index of the first student token.
        there: index of the first teacher token.

    Returns:
        Triples (student index, teacher index, bytes) of the pairs that share at least one byte.
    """
    found = []
    i = j = 0
    while i < len(ours) and j < len(theirs):
        size = min(ours[i], theirs[j])
        if size:
            found.append((at + i, there + j, size))
        ours[i] -= size
        theirs[j] -= size
        i, j = i + (not ours[i]), j + (not theirs[j])
    return found


def measure(texts: Sequence[str], student: str, teacher: str, rounds: int) -> dict[str, float]:
    """Measure one pair of tokenizers; times are medians over ``rounds``.

    Raises:
        MissingExtra: rapidfuzz is not installed.
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ModuleNotFoundError:
        raise MissingExtra("'raycloud bench alignment'", "dev") from None

    def matching(ours: list[str], theirs: list[str]) -> Any:
        return Levenshtein.editops(ours, theirs).as_matching_blocks()

    case = AlignmentCase.of(texts, *(load_tokenizer(resolve(source, console.print)) for source in (student, teacher)))
    alignment = case.checked()
    lists = [case.strings(nth) for nth in case.some]
    times = interleaved(
        {
            "ours": case.ours(),
            "checked": case.checked,
            "rapidfuzz": lambda: edited(case, matching),
            "dtw": lambda: [warp(ours, theirs, Levenshtein.distance) for ours, theirs in lists],
        },
        rounds,
    )
    count = len(case.texts)
    each = {name: [ms / (len(case.some) if name == "dtw" else count) for ms in taken] for name, taken in times.items()}
    script, pairs = set(edited(case, matching).pairs), alignment.pairs.tolist()
    return {
        "texts": count,
        "student_tokens": len(alignment.student_group),
        "teacher_tokens": len(alignment.teacher_group),
        "exact_span_share": alignment.exact_match_share,
        "pairs_per_s": 1e3 / statistics.median(each["ours"]),
        **{f"us_{name}": 1e3 * statistics.median(taken) for name, taken in each.items()},
        "speedup_vs_dtw": median_ratio(each["dtw"], each["ours"]),
        "speedup_vs_rapidfuzz": median_ratio(each["rapidfuzz"], each["ours"]),
        "rapidfuzz_agreement": sum(tuple(pair) in script for pair in pairs) / len(pairs),
    }


def run(*, texts: int = TEXTS, rounds: int = PAIRS) -> Measured:
    """Measure the built-in pair of tokenizers, and the pair of the publication if ``RAYCLOUD_DATA`` has it."""
    measured, notes = {}, []
    rows = load_rows("builtin:instruct", "test", console.print)
    name, student, teacher = BUILT_IN
    with timed(f"{name}, {rounds} rounds"):
        spoken = [f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in rows]
        measured[name] = measure(spoken[:texts], student, teacher, rounds)
    name, student, teacher = PUBLISHED
    root = os.environ.get("RAYCLOUD_DATA")
    folder = Path(root or ".").expanduser()
    if root and all((folder / part).exists() for part in (student, teacher, "dolly/dev.jsonl")):
        rows = [row for split in ("train", "valid", "test") for row in load_rows("dolly/dev.jsonl", split)]
        with timed(f"{name}, {rounds} rounds"):
            measured[name] = measure(
                [row["output"] for row in rows[:texts]], str(folder / student), str(folder / teacher), rounds
            )
    else:
        notes.append(f"skipped: {name}: RAYCLOUD_DATA names no folder with {student}, {teacher} and dolly/dev.jsonl")
    headline = ("exact_span_share", "pairs_per_s", "speedup_vs_dtw", "speedup_vs_rapidfuzz")
    last = list(measured)[-1]
    result = {"pair": last, **{key: measured[last][key] for key in headline}, "pairs": measured}
    return _measured(result, rounds, notes)


def _measured(result: dict[str, Any], rounds: int, notes: Sequence[str]) -> Measured:
    lines = {
        "student tokens with an exact match": ("exact_span_share", ".1%"),
        "texts per second": ("pairs_per_s", ",.0f"),
        "µs per text, by ids": ("us_ours", ".1f"),
        "µs per text, bytes compared": ("us_checked", ".1f"),
        "µs per text, rapidfuzz": ("us_rapidfuzz", ".1f"),
        "µs per text, time warping": ("us_dtw", ",.0f"),
        "time warping / by ids": ("speedup_vs_dtw", ".0f"),
        "rapidfuzz / by ids": ("speedup_vs_rapidfuzz", ".1f"),
    }
    pairs = result["pairs"]
    rows = [[line, *(format(of[key], form) for of in pairs.values())] for line, (key, form) in lines.items()]
    return Measured(f"alignment, medians of {rounds}", ["", *pairs], rows, result, notes)
