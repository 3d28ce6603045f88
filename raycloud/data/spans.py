"""Extractive questions, whose answer is a span of a text, as windows of tokens that fit a model of limited length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from raycloud.data.files import describe_value, location_of, text_in
from raycloud.data.labelled import LabelledText
from raycloud.data.splits import Row
from raycloud.errors import DataError


@dataclass(frozen=True)
class SpanQuestion:
    """Text of a question and its right answers; any of them counts as right."""

    context: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class SpanWindow(LabelledText):
    """Question and a part of its text. The label is the first and the last token of the answer.

    If the answer is not in the window, both are the window's first token, which belongs to neither question nor text.
    """

    question: int
    """Index of the question."""
    offsets: np.ndarray
    """Character offsets (tokens, 2) of each token in the text; -1 for tokens that are not part of the text."""


def encode_spans(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    question: str,
    context: str,
    answers: str,
    max_length: int,
    max_question: int,
    stride: int,
) -> tuple[list[SpanWindow], list[SpanQuestion]]:
    """Encode rows as overlapping windows; return the windows and their questions.

    Args:
        rows: rows in the format of SQuAD: ``answers`` is a map of ``text`` and ``answer_start``, lists of equal length.
        tokenizer: a fast tokenizer, which adds its special tokens.
        question: column of the question.
        context: column of the text.
        answers: column of the answers.
        max_length: largest number of tokens of a window, question included.
        max_question: largest number of tokens of a question; longer ones are truncated.
        stride: number of tokens that two consecutive windows of a text share.

    Raises:
        DataError: there are no rows, a column is missing, or a value in it has the wrong type or is empty.
    """
    for column in (question, context, answers):
        if rows and column not in rows[0]:
            raise DataError(f"no column '{column}'; the rows have: {', '.join(rows[0])}")
    if not rows:
        raise DataError("no rows with questions")
    given = [_answers(row, answers) for row in rows]
    for row in rows:
        if not text_in(row, context).strip():
            raise DataError(
                f"{location_of(row)}: '{context}' is {describe_value(row[context])}; allowed: a text with answers"
            )
    asked = _shortened([text_in(row, question).strip() for row in rows], tokenizer, max_question)
    coded = tokenizer(
        asked,
        [text_in(row, context) for row in rows],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    types = coded.get("token_type_ids") or [None] * len(coded["input_ids"])
    windows = []
    for at, (ids, kinds, number) in enumerate(
        zip(coded["input_ids"], types, coded["overflow_to_sample_mapping"], strict=True)
    ):
        of_text = np.array([part == 1 for part in coded.sequence_ids(at)])
        offsets = np.where(of_text[:, None], np.array(coded["offset_mapping"][at]), -1)
        label = _answer_in(offsets, of_text, given[number])
        windows.append(SpanWindow(tuple(ids), None if kinds is None else tuple(kinds), label, number, offsets))
    return windows, [SpanQuestion(row[context], answer.texts) for row, answer in zip(rows, given, strict=True)]


@dataclass(frozen=True)
class _Answers:
    """Right answers, and the character offset of the first one."""

    texts: tuple[str, ...]
    begin: int


def _answers(row: Row, column: str) -> _Answers:
    answers = row[column]
    match answers:
        case {"text": [*texts], "answer_start": [*starts]} if len(texts) == len(starts):
            sound = all(isinstance(text, str) for text in texts) and all(type(start) is int for start in starts)
            if sound and min(starts, default=0) >= 0:
                return _Answers(tuple(texts), starts[0] if starts else 0)
    raise DataError(
        f"{location_of(row)}: '{column}' is {describe_value(answers)}; allowed: an object of 'text', a list of texts, "
        "and 'answer_start', a list of as many offsets in the context"
    )


def _shortened(questions: Sequence[str], tokenizer: PreTrainedTokenizerBase, most: int) -> list[str]:
    coded = tokenizer(list(questions), add_special_tokens=False, return_offsets_mapping=True)
    return [
        text if len(offsets) <= most else text[: offsets[most - 1][1]]
        for text, offsets in zip(questions, coded["offset_mapping"], strict=True)
    ]


def _answer_in(offsets: np.ndarray, of_text: np.ndarray, answers: _Answers) -> tuple[int, int]:
    """First and last token of the first answer, or (0, 0) where the window does not have it whole."""
    positions = np.flatnonzero(of_text)
    if not answers.texts or not len(positions):
        return 0, 0
    begin, end = answers.begin, answers.begin + len(answers.texts[0])
    starts, ends = offsets[positions].T
    if begin < starts[0] or end > ends[-1]:
        return 0, 0
    # A token may begin before the answer or end after it.
    first = int(np.searchsorted(starts, begin, side="right")) - 1
    last = int(np.searchsorted(ends, end, side="left"))
    return int(positions[first]), int(positions[last])
