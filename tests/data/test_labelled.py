"""Texts with labels as tokens."""

from __future__ import annotations

import json
import math
from datetime import date
from pathlib import Path

import pytest
import torch

from raycloud.data.files import read_file
from raycloud.data.labelled import classes_of, collate_labelled, encode_labelled
from raycloud.data.splits import Row
from raycloud.errors import DataError
from raycloud.models.loading import load_tokenizer, resolve
from tests.tokenizers import tokenizer_of

ROWS: list[Row] = [
    {"a": "A fine film.", "b": "Really?", "kind": "good", "score": 2.5},
    {"a": "Dull.", "b": "Not at all: I was glued to my seat from start to end.", "kind": "bad", "score": -1},
    {"a": "It is a film.", "b": "Yes.", "kind": "neither", "score": 0},
]


def encode(**changes: object) -> list:
    options = {"text": "a", "pair": None, "label": "kind", "classes": ["bad", "good"], "max_length": 32, **changes}
    return encode_labelled(ROWS, load_tokenizer(resolve("builtin:minilm-l6")), **options)  # type: ignore[arg-type]


def test_classes_are_numbered_in_their_order_and_others_left_out() -> None:
    assert [sample.label for sample in encode()] == [1, 0]
    assert classes_of(ROWS, "kind") == ["bad", "good", "neither"]


def test_pairs_have_types_and_are_padded_on_the_right() -> None:
    samples = encode(pair="b", label="score", classes=None)
    batch = collate_labelled(samples, pad=0)
    assert batch.labels.tolist() == [2.5, -1.0, 0.0]
    assert batch.valid.sum(dim=1).tolist() == [len(sample.ids) for sample in samples]
    assert batch.types is not None and batch.targets == 3
    assert bool((batch.ids[~batch.valid] == 0).all()) and bool((batch.types[~batch.valid] == 0).all())
    first = samples[0].types
    assert first == tuple(sorted(first)) and set(first) == {0, 1}
    assert torch.equal(batch.types[0, : len(first)], torch.tensor(first))


def test_long_texts_are_cut() -> None:
    assert max(len(sample.ids) for sample in encode(pair="b", max_length=8)) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "c"}, "no column 'c'; the rows have: a, b, kind, score"),
        ({"classes": ["fair"]}, "no row of 3 has a kind of"),
        ({"classes": None}, "a row: 'kind' is the text 'good'; allowed: a finite number"),
    ],
)
def test_what_rows_lack_is_named(changes: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode(**changes)


def test_a_text_without_a_token_is_named() -> None:
    tokenizer = load_tokenizer(resolve("builtin:smollm2-135m-instruct"))
    rows: list[Row] = [{"a": "Yes.", "kind": "good"}, {"a": "", "kind": "bad"}]
    with pytest.raises(DataError, match="'a' has no token \\(its kind is 'bad'\\)"):
        encode_labelled(rows, tokenizer, text="a", pair=None, label="kind", classes=["bad", "good"], max_length=8)


@pytest.mark.parametrize("empty", ["", " "])
@pytest.mark.parametrize(("text", "pair"), [("a", None), ("a", "b")])
def test_a_text_of_nothing_but_what_the_tokenizer_adds_is_named(
    tmp_path: Path, text: str, pair: str | None, empty: str
) -> None:
    """Regression: an empty text was used if the tokenizer adds BOS, or [CLS] and [SEP]."""
    path = tmp_path / "rows.jsonl"
    rows: list[Row] = [{"a": "Yes.", "b": "No.", "kind": "good"}, {"a": empty, "b": "", "kind": "bad"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = {"text": text, "pair": pair, "label": "kind", "classes": ["bad", "good"], "max_length": 8}
    writers = [tokenizer_of(begin=["<bos>"])] if empty == "" else []  # a space is a token to this one
    for tokenizer in (*writers, load_tokenizer(resolve("builtin:minilm-l6"))):
        with pytest.raises(DataError, match=r"rows\.jsonl', line 2: 'a' has no token \(its kind is 'bad'\); allowed"):
            encode_labelled(read_file(path), tokenizer, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", 1], "kind: not all values are of one kind"),
        (["a", "a"], r"kind: all 2 rows have \['a'\]"),
        (["a", None], "a row: 'kind' is null; allowed: a class, as a text or a finite number"),
        ([1.0, math.nan], "a row: 'kind' is the number nan; allowed: a class"),
        ([["a"], ["b"]], r"'kind' is the list \['a'\]; allowed: a class"),
        ([date(2024, 1, 31), date(2024, 2, 1)], "'kind' is the date datetime.date"),
    ],
)
def test_labels_that_make_no_classes_are_refused(labels: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        classes_of([{"kind": label} for label in labels], "kind")


@pytest.mark.parametrize("score", [math.nan, math.inf, "nan", None, "good", [1.0]])
def test_scores_that_are_no_finite_numbers_are_refused(score: object) -> None:
    rows: list[Row] = [{"a": "Cold.", "score": 1.0}, {"a": "Warm.", "score": score}]
    tokenizer = load_tokenizer(resolve("builtin:minilm-l6"))
    with pytest.raises(DataError, match=r"'score' is .*; allowed: a finite number"):
        encode_labelled(rows, tokenizer, text="a", pair=None, label="score", classes=None, max_length=8)


@pytest.mark.parametrize("column", ["a", "b", "kind"])
@pytest.mark.parametrize("value", [None, math.nan])
def test_nothing_becomes_the_word_none(column: str, value: object) -> None:
    """Regression: a missing text was used as 'None' or 'nan', or dropped as having no class."""
    rows: list[Row] = [dict(ROWS[0]), {**ROWS[1], column: value}]
    tokenizer = load_tokenizer(resolve("builtin:minilm-l6"))
    with pytest.raises(DataError, match=f"'{column}' is (null|the number nan); allowed: a "):
        encode_labelled(rows, tokenizer, text="a", pair="b", label="kind", classes=["bad", "good"], max_length=8)


def test_numbers_all_count_whatever_they_are() -> None:
    rows: list[Row] = [{"a": "Cold.", "score": -100}, {"a": "Warm.", "score": 20}]
    tokenizer = load_tokenizer(resolve("builtin:minilm-l6"))
    samples = encode_labelled(rows, tokenizer, text="a", pair=None, label="score", classes=None, max_length=8)
    assert collate_labelled(samples, pad=0).targets == 2
