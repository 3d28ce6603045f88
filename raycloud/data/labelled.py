"""Texts, or pairs of them, with a label for the whole: a class, a number, or where in the text an answer stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from raycloud.data.batches import Batch
from raycloud.data.splits import Row
from raycloud.errors import DataError


@dataclass(frozen=True)
class LabelledText:
    """Token ids with the tokenizer's special ones, token types where the tokenizer has them, and the label."""

    ids: tuple[int, ...]
    types: tuple[int, ...] | None
    label: int | float | tuple[int, int]


def classes_of(rows: Sequence[Row], column: str) -> list[Any]:
    """The values that a column has, sorted.

    Raises:
        DataError: there is no such column, its values cannot be sorted, or all are the same.
    """
    if rows and column not in rows[0]:
        raise DataError(f"no column '{column}'; the rows have: {', '.join(rows[0])}")
    try:
        found = sorted({row[column] for row in rows})
    except TypeError:
        raise DataError(f"{column}: not all values are of one kind, or some are null; name the classes") from None
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
    """The rows as the tokenizer has them, cut at ``max_length`` tokens.

    Args:
        rows: with the columns that are named next.
        tokenizer: adds its special tokens.
        text: column of the text.
        pair: column of a second text, if there is one.
        label: column of the label.
        classes: values of the label, in the order of their numbers; rows with another value are left out. None for
            labels that are numbers.
        max_length: of both texts together.

    Raises:
        DataError: a column is missing, a label is no number, a text is empty, or no row is left.
    """
    for column in (text, pair, label):
        if column is not None and rows and column not in rows[0]:
            raise DataError(f"no column '{column}'; the rows have: {', '.join(rows[0])}")
    number: Mapping[Any, int] | None = None if classes is None else {value: at for at, value in enumerate(classes)}
    kept = [row for row in rows if number is None or row[label] in number]
    if not kept:
        raise DataError(f"no row of {len(rows)} has a {label} of {list(classes or ())}")
    coded = tokenizer(
        [str(row[text]) for row in kept],
        None if pair is None else [str(row[pair]) for row in kept],
        truncation=True,
        max_length=max_length,
    )
    types = coded.get("token_type_ids") or [None] * len(kept)
    samples = []
    for row, ids, kinds in zip(kept, coded["input_ids"], types, strict=True):
        if not ids:
            raise DataError(f"{text}: a row whose {label} is {row[label]!r} has no text; all rows need one")
        try:
            value = float(row[label]) if number is None else number[row[label]]
        except (TypeError, ValueError):
            raise DataError(f"{label}: a number is wanted, got {row[label]!r}") from None
        samples.append(LabelledText(tuple(ids), None if kinds is None else tuple(kinds), value))
    return samples


def collate_labelled(samples: Sequence[LabelledText], pad: int) -> Batch:
    """Samples padded on the right to the longest of them; labels (B,), or (B, 2) where they are spans."""
    lengths = torch.tensor([len(sample.ids) for sample in samples])
    valid = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.full(valid.shape, pad)
    ids[valid] = torch.tensor([token for sample in samples for token in sample.ids])
    types = None
    if all(sample.types is not None for sample in samples):
        types = torch.zeros_like(ids)
        types[valid] = torch.tensor([kind for sample in samples for kind in sample.types or ()])
    return Batch(ids, valid, torch.tensor([sample.label for sample in samples]), types)
