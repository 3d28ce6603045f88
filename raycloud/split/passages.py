"""Texts of the length that people send: chats as they are, sentences joined to passages.

A codec sends the first position of a text uncompressed, so its bytes per row depend on the length of texts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from raycloud.data.batches import Sample
from raycloud.data.prompts import Format, example
from raycloud.data.sources import load_rows
from raycloud.data.splits import Row, Split

MAX_TOKENS = 256
"""Longer texts are cut."""
_PASSAGE_CHARACTERS = 500


def passages(
    sources: Sequence[str],
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    notify: Callable[[str], None] = lambda line: None,
) -> list[Sample]:
    """About ``tokens`` tokens of text, an equal share from each source; the same ones at every call.

    Rows with an instruction become the chat of the model's own template (Alpaca's without one), question and answer;
    others are joined, neighbours of the same ``domain``, to passages of about 500 characters.

    Raises:
        DataError: a source cannot be read.
    """
    found: list[Sample] = []
    for source in sources:
        taken = 0
        for text in _texts(load_rows(source, split, notify), tokenizer):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"][:MAX_TOKENS]
            if len(ids) > 1:
                found.append(Sample(tuple(ids), 0))
                taken += len(ids)
            if taken >= tokens / len(sources):
                break
    return found


def _texts(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """In an order that is mixed and always the same."""
    mixed = random.Random(0)
    if "instruction" in rows[0]:
        form: Format = "chat" if tokenizer.chat_template else "alpaca"
        mixed.shuffle(rows)
        for row in rows:
            prompt, answer = example(row, form, tokenizer)
            yield prompt.text + answer + tokenizer.eos_token
    else:
        joined = _joined(rows, tokenizer)
        mixed.shuffle(joined)
        yield from joined


def _joined(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    found = []
    for _, group in groupby(rows, key=lambda row: row.get("domain")):
        passage: list[str] = []
        for row in group:
            passage.append(example(row, "plain", tokenizer)[1])
            if sum(map(len, passage)) >= _PASSAGE_CHARACTERS:
                found.append(" ".join(passage))
                passage = []
        if passage:
            found.append(" ".join(passage))
    return found
