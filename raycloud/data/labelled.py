"""Texts or pairs of texts with one label each: a class, a number, or the span of an answer in the text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from raycloud.data.batches import Batch
from raycloud.data.files import describe_value, location_of, text_in
from raycloud.data.splits import Row
from raycloud.errors import DataError


@dataclass(frozen=True)
class LabelledText:
    """Token ids including special tokens, token types if the tokenizer has them, and the label."""

    ids: tuple[int, ...]
    types: tuple[int, ...] | None
    label: int | float | tuple[int, int]


def classes_of(rows: Sequence[Row], column: str) -> list[Any]:
    """Sorted distinct values of a column.

    Raises:
        DataError: there is no such column, a value is no class, values cannot be sorted, or all are the same.
    """
    if rows and column not in rows[0]:
        raise DataError(f"no column '{column}'; the rows have: {', '.join(rows[0])}")
    try:
        found = sorted({class_in(row, column) for row in rows})
    except TypeError:
        raise DataError(f"{column}: not all values are of one kind; name the classes") from None
    if len(found) < 2:
        raise DataError(f"{column}: all {len(rows)} rows have {found}; two classes or more are needed")
    return found


def encode_labelled(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: str,
    pair: str | None,
    label: str,
    classes: Sequence[Any] | None,
    max_length: int,
) -> list[LabelledText]:
    """Encode rows with their labels, truncated at ``max_length`` tokens.

    Args:
        rows: rows with the columns named below.
        tokenizer: the tokenizer, which adds its special tokens.
        text: column of the text.
        pair: column of a second text, if there is one.
        label: column of the label.
        classes: values of the label, in the order of their class indices; rows with another value are left out. None
            for labels that are numbers.
        max_length: largest number of tokens of both texts together.

    Raises:
        DataError: a column is missing, a text is missing or empty, a label is no class or no number, or no row is left.
    """
    for column in (text, pair, label):
        if column is not None and rows and column not in rows[0]:
            raise DataError(f"no column '{column}'; the rows have: {', '.join(rows[0])}")
    number: Mapping[Any, int] | None = None if classes is None else {value: at for at, value in enumerate(classes)}
    kept = [row for row in rows if number is None or class_in(row, label) in number]
    if not kept:
        raise DataError(f"no row of {len(rows)} has a {label} of {list(classes or ())}")
    coded = tokenizer(
        [text_in(row, text) for row in kept],
        None if pair is None else [text_in(row, pair) for row in kept],
        truncation=True,
        max_length=max_length,
        return_special_tokens_mask=True,
    )
    types = coded.get("token_type_ids") or [None] * len(kept)
    samples = []
    for row, ids, kinds, added in zip(kept, coded["input_ids"], types, coded["special_tokens_mask"], strict=True):
        if all(added):  # tokens that the tokenizer adds to a text, such as BOS, do not count as text
            raise DataError(
                f"{location_of(row)}: '{text}' has no token (its {label} is {row[label]!r}); allowed: a text"
            )
        value = _number_in(row, label) if number is None else number[row[label]]
        samples.append(LabelledText(tuple(ids), None if kinds is None else tuple(kinds), value))
    return samples


def class_in(row: Row, column: str) -> Any:
    """Class of a row in a column: a text, a boolean, or a finite number.

    Raises:
        DataError: the value is none of these.
    """
    if column not in row:
        raise DataError(f"no column '{column}'; the rows have: {', '.join(row)}")
    value = row[column]
    if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise DataError(
        f"{location_of(row)}: '{column}' is {describe_value(value)}; allowed: a class, as a text or a finite number"
    )


def _number_in(row: Row, column: str) -> float:
    """Number of a row in a column."""
    try:
        value = float(row[column])
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{location_of(row)}: '{column}' is {describe_value(row[column])}; allowed: a finite number")
    return value


def collate_labelled(samples: Sequence[LabelledText], pad: int) -> Batch:
    """Batch of samples, padded on the right to the longest of them; labels (B,), or (B, 2) for spans."""
    lengths = torch.tensor([len(sample.ids) for sample in samples])
    valid = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.full(valid.shape, pad)
    ids[valid] = torch.tensor([token for sample in samples for token in sample.ids])
    types = None
    if all(sample.types is not None for sample in samples):
        types = torch.zeros_like(ids)
        types[valid] = torch.tensor([kind for sample in samples for kind in sample.types or ()])
    return Batch(ids, valid, torch.tensor([sample.label for sample in samples]), types)
