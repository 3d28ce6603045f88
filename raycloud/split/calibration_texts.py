"""Calibration texts of realistic length: chats unchanged, sentences joined to passages.

A codec sends the first position of a text uncompressed, so its bytes per token depend on the length of texts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from raycloud.data.batches import Sample
from raycloud.data.prompts import Format, bounds_of, default_format, prompt_and_response
from raycloud.data.sources import load_rows
from raycloud.data.splits import Row, Split

MAX_TOKENS = 256
"""Largest number of tokens of a text; longer texts are truncated."""
_PASSAGE_CHARACTERS = 500


def load_calibration_texts(
    sources: Sequence[str],
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    notify: Callable[[str], None] = lambda line: None,
) -> list[Sample]:
    """Texts of about ``tokens`` tokens in total, an equal share from each source; the same ones at every call.

    Rows with an instruction become a chat of question and answer in the model's own template (Alpaca's without one);
    other rows, if adjacent and of the same ``domain``, are joined to passages of about 500 characters.

    Raises:
        DataError: a source cannot be read.
    """
    found: list[Sample] = []
    for source in sources:
        rows, taken = load_rows(source, split, notify), 0
        form = default_format(rows, tokenizer)
        bounds = bounds_of(tokenizer, form)
        ending = bounds.end if form == "plain" else bounds.answer
        for text in _texts(rows, form, tokenizer):
            made = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = [*bounds.begun(made), *ending][:MAX_TOKENS]
            if len(ids) > 1:
                found.append(Sample(tuple(ids), 0))
                taken += len(ids)
            if taken >= tokens / len(sources):
                break
    return found


def _texts(rows: list[Row], form: Format, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield the texts in a shuffled order that is always the same."""
    mixed = random.Random(0)
    if form == "plain":
        joined = _join_sentences(rows, tokenizer)
        mixed.shuffle(joined)
        yield from joined
    else:
        mixed.shuffle(rows)
        for row in rows:
            prompt, answer = prompt_and_response(row, form, tokenizer)
            yield prompt.text + answer


def _join_sentences(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    found = []
    for _, group in groupby(rows, key=lambda row: row.get("domain")):
        passage: list[str] = []
        for row in group:
            passage.append(prompt_and_response(row, "plain", tokenizer)[1])
            if sum(map(len, passage)) >= _PASSAGE_CHARACTERS:
                found.append(" ".join(passage))
                passage = []
        if passage:
            found.append(" ".join(passage))
    return found
