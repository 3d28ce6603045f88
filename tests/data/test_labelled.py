"""Texts with labels as tokens."""

from __future__ import annotations

import pytest
import torch

from raycloud.data.labelled import classes_of, collate_labelled, encode_labelled
from raycloud.data.splits import Row
from raycloud.errors import DataError
from raycloud.models.loading import load_tokenizer, resolve

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
        ({"classes": None}, "a number is wanted, got 'good'"),
    ],
)
def test_what_rows_lack_is_named(changes: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode(**changes)


def test_a_text_without_a_token_is_named() -> None:
    tokenizer = load_tokenizer(resolve("builtin:smollm2-135m-instruct"))
    rows: list[Row] = [{"a": "Yes.", "kind": "good"}, {"a": "", "kind": "bad"}]
    with pytest.raises(DataError, match="a: a row whose kind is 'bad' has no text"):
        encode_labelled(rows, tokenizer, text="a", pair=None, label="kind", classes=["bad", "good"], max_length=8)


@pytest.mark.parametrize(
    ("labels", "message"),
    [(["a", None], "kind: not all values are of one kind"), (["a", "a"], r"kind: all 2 rows have \['a'\]")],
)
def test_labels_that_make_no_classes_are_refused(labels: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        classes_of([{"kind": label} for label in labels], "kind")


def test_numbers_all_count_whatever_they_are() -> None:
    rows: list[Row] = [{"a": "Cold.", "score": -100}, {"a": "Warm.", "score": 20}]
    tokenizer = load_tokenizer(resolve("builtin:minilm-l6"))
    samples = encode_labelled(rows, tokenizer, text="a", pair=None, label="score", classes=None, max_length=8)
    assert collate_labelled(samples, pad=0).targets == 2
