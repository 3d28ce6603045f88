"""Data set ``builtin:instruct``: instructions with real answers, made from ``builtin:reviews`` by templates."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from raycloud.data.reviews import reviews
from raycloud.data.splits import Split, split_of

_DOMAIN_NAMES = {
    "movie": "a movie review",
    "news": "a newspaper editorial",
    "product": "a product review",
    "tweet": "a tweet",
}


def instruct(notify: Callable[[str], None] = lambda line: None) -> pa.Table:
    """Table of domain, text, task, instruction, input and output; one row for each sentence of ``builtin:reviews``.

    A row keeps its sentence as ``text`` and so belongs to the split of that sentence; a comparison takes its second
    sentence from the same split, so no text of the test split is used for training, here or in ``builtin:reviews``.
    """
    return pa.Table.from_pylist(list(_rows(reviews(notify).to_pylist())))


def _rows(sentences: list[dict[str, Any]]) -> Iterator[dict[str, str]]:
    previous: dict[tuple[str, Split], dict[str, Any]] = {}
    for row in sentences:
        domain, text, split = row["domain"], row["text"], split_of(row)
        other = previous.get((domain, split))
        previous[domain, split] = row
        task = hashlib.sha256(text.encode()).digest()[0] % 4
        made = None
        if task == 3:
            made = _second_half(text)
        elif task == 2 and other is not None:
            made = _more_positive(row, other)
        elif task == 1:
            made = ("domain", "Where is this sentence from?", text, f"It is from {_DOMAIN_NAMES[domain]}.")
        name, instruction, given, output = made or _sentiment(row)
        made_row = {"task": name, "instruction": instruction, "input": given, "output": output}
        yield {"domain": domain, "text": text, **made_row}


def _strength(score: float) -> str:
    return "strongly" if abs(score) >= 2.0 else "clearly" if abs(score) >= 1.0 else "slightly"


def _sentiment(row: dict[str, Any]) -> tuple[str, str, str, str]:
    label = row["label"]
    answer = "neutral" if label == "neutral" else f"{_strength(row['score'])} {label}"
    question = "What is the sentiment of this sentence, and how strong is it?"
    return "sentiment", question, row["text"], f"The sentiment is {answer}."


def _more_positive(row: dict[str, Any], other: dict[str, Any]) -> tuple[str, str, str, str] | None:
    if abs(row["score"] - other["score"]) < 0.5:
        return None  # the ratings are too close to each other
    first, second = (row, other) if len(row["text"]) % 2 else (other, row)
    answer = "first" if first["score"] > second["score"] else "second"
    given = f"1. {first['text']}\n2. {second['text']}"
    return (
        "compare",
        "Which of these two sentences is more positive?",
        given,
        f"The {answer} sentence is more positive.",
    )


def _second_half(text: str) -> tuple[str, str, str, str] | None:
    words = text.split(" ")
    if len(words) < 8:
        return None
    middle = len(words) // 2
    return "complete", "Complete this sentence.", " ".join(words[:middle]), " ".join(words[middle:])
