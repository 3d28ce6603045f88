"""Questions whose answer is a span of a text, as windows of tokens that a model of limited length can read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from raycloud.data.labelled import LabelledText
from raycloud.data.splits import Row
from raycloud.errors import DataError


@dataclass(frozen=True)
class Question:
    """A text and the answers to a question about it, any of which is right."""

    context: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Window(LabelledText):
    """A question and a part of its text. The label is the first and the last token of the answer.

    Where the window has no answer both are its first token, which is of neither.
    """

    question: int
    """Its number."""
    offsets: np.ndarray
    """(tokens, 2): where each token stands in the text; -1 for those that are not of it."""


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
) -> tuple[list[Window], list[Question]]:
    """The rows as overlapping windows, and the questions they belong to.

    Args:
        rows: as SQuAD has them: ``answers`` is a map of ``text`` and ``answer_start``, lists of equal length.
        tokenizer: a fast one; it adds its special tokens.
        question: column of the question.
        context: column of the text.
        answers: column of the answers.
        max_length: tokens of a window, question included.
        max_question: tokens of a question; longer ones are cut.
        stride: tokens that two windows of a text share.

    Raises:
        DataError: there are no rows, or they lack a column.
    """
    for column in (question, context, answers):
        if rows and column not in rows[0]:
            raise DataError(f"no column '{column}'; the rows have: {', '.join(rows[0])}")
    if not rows:
        raise DataError("no rows with questions")
    asked = _shortened([str(row[question]).strip() for row in rows], tokenizer, max_question)
    coded = tokenizer(
        asked,
        [str(row[context]) for row in rows],
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
        label = _answer_in(offsets, of_text, rows[number][answers])
        windows.append(Window(tuple(ids), None if kinds is None else tuple(kinds), label, number, offsets))
    return windows, [Question(str(row[context]), _texts(row[answers])) for row in rows]


def _texts(answers: Any) -> tuple[str, ...]:
    try:
        return tuple(str(text) for text in answers["text"])
    except (TypeError, KeyError):
        raise DataError(f"answers need 'text' and 'answer_start', got {answers!r}") from None


def _shortened(questions: Sequence[str], tokenizer: PreTrainedTokenizerBase, most: int) -> list[str]:
    coded = tokenizer(list(questions), add_special_tokens=False, return_offsets_mapping=True)
    return [
        text if len(offsets) <= most else text[: offsets[most - 1][1]]
        for text, offsets in zip(questions, coded["offset_mapping"], strict=True)
    ]


def _answer_in(offsets: np.ndarray, of_text: np.ndarray, answers: Any) -> tuple[int, int]:
    """First and last token of the first answer, or (0, 0) where the window does not have it whole."""
    texts = _texts(answers)
    places = np.flatnonzero(of_text)
    if not texts or not len(places):
        return 0, 0
    begin = int(answers["answer_start"][0])
    end = begin + len(texts[0])
    starts, ends = offsets[places].T
    if begin < starts[0] or end > ends[-1]:
        return 0, 0
    # A token may begin ahead of the answer or end behind it.
    first = int(np.searchsorted(starts, begin, side="right")) - 1
    last = int(np.searchsorted(ends, end, side="left"))
    return int(places[first]), int(places[last])
