"""Questions as windows of tokens, and the position of the answer in each."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from raycloud.data.labelled import collate_labelled
from raycloud.data.spans import SpanQuestion, SpanWindow, encode_spans
from raycloud.data.splits import Row
from raycloud.errors import DataError
from raycloud.models.loading import load_tokenizer, resolve

LONG = " ".join(f"Sentence {n} says that house {n} is painted in colour {n * 7}." for n in range(40))


def row(question: str, context: str, *answers: str) -> Row:
    starts = [context.index(answer) for answer in answers]
    return {"question": question, "context": context, "answers": {"text": list(answers), "answer_start": starts}}


ROWS = [
    row("Who wrote it?", "It was written by Ada Lovelace, in 1843.", "Ada Lovelace", "Lovelace"),
    row("Which colour has house 30?", LONG, "colour 210"),
    row("Nothing?", "There is nothing to find."),
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(resolve("builtin:minilm-l6"))


def encoded(
    tokenizer: PreTrainedTokenizerBase, rows: list[Row], **changes: Any
) -> tuple[list[SpanWindow], list[SpanQuestion]]:
    columns = {"question": "question", "context": "context", "answers": "answers"}
    limits = {"max_length": 96, "max_question": 16, "stride": 24}
    return encode_spans(rows, tokenizer, **{**columns, **limits, **changes})


def text_of(window: SpanWindow, questions: list[SpanQuestion]) -> str:
    assert isinstance(window.label, tuple)
    first, last = window.label
    return questions[window.question].context[window.offsets[first, 0] : window.offsets[last, 1]]


def test_labels_are_the_tokens_of_the_first_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    windows, questions = encoded(tokenizer, ROWS)
    short = [window for window in windows if window.question == 0]
    assert len(short) == 1
    assert text_of(short[0], questions) == "Ada Lovelace"
    assert questions[0].answers == ("Ada Lovelace", "Lovelace")
    assert set(short[0].types or ()) == {0, 1}
    (without,) = (window for window in windows if window.question == 2)
    assert without.label == (0, 0)


def test_a_long_text_is_read_in_windows_that_share_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    windows, questions = encoded(tokenizer, ROWS)
    parts = [window for window in windows if window.question == 1]
    assert len(parts) > 5
    assert max(len(window.ids) for window in parts) == 96
    reached = 0
    for window in parts:
        inside = window.offsets[window.offsets[:, 0] >= 0]
        assert inside[0, 0] <= reached  # no gap
        reached = int(inside[-1, 1])
    assert reached == len(LONG)
    found = [text_of(window, questions) for window in parts if window.label != (0, 0)]
    assert found and set(found) == {"colour 210"}


def test_an_answer_within_a_token_takes_all_of_it(tokenizer: PreTrainedTokenizerBase) -> None:
    context = "They unwrapped it."
    one = {"question": "?", "context": context, "answers": {"text": ["wrap"], "answer_start": [7]}}
    (window,), questions = encoded(tokenizer, [one])
    assert "wrap" in text_of(window, questions)


def test_long_questions_are_cut_and_batches_have_two_labels_a_window(tokenizer: PreTrainedTokenizerBase) -> None:
    windows, _ = encoded(tokenizer, [row("why " * 200, "Because it is so.", "it is so"), ROWS[0]])
    assert len(windows) == 2
    batch = collate_labelled(windows, pad=0)
    assert batch.labels.shape == (2, 2) and batch.targets == 4
    assert [tuple(pair) for pair in batch.labels.tolist()] == [window.label for window in windows]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows with questions"),
        ([{"question": "?", "text": ""}], "no column 'context'; the rows have: question, text"),
        (
            [{"question": "?", "context": "So.", "answers": ["So"]}],
            "'answers' is the list \\['So'\\]; allowed: an object of 'text'",
        ),
        ([row("?", " ")], "a row: 'context' is the text ' '; allowed: a text with answers"),
    ],
)
def test_what_rows_lack_is_named(tokenizer: PreTrainedTokenizerBase, rows: list[Row], message: str) -> None:
    with pytest.raises(DataError, match=message):
        encoded(tokenizer, rows)
