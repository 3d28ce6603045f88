"""Splits of rows by content, selections by column, and disjoint shards. All are pure functions of the rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from raycloud.errors import DataError

Split = Literal["train", "valid", "test"]
Row = dict[str, Any]


def split_of(row: Row) -> Split:
    """Split of a row: a pure function of its content, with shares of eight tenths, one tenth and one tenth.

    Equal texts belong to the same split, so no sentence of the test split is used for training. The content is
    the text column, or instruction and input; for other rows it is all their texts.
    """
    key: Any
    if "text" in row:
        key = row["text"]
    elif "instruction" in row:
        key = [row["instruction"], row.get("input")]
    else:
        key = [value for _, value in sorted(row.items()) if isinstance(value, str)]
    bucket = hashlib.sha256(json.dumps(key, default=str).encode()).digest()[1] % 10
    return "valid" if bucket == 8 else "test" if bucket == 9 else "train"


def select(rows: Sequence[Row], where: Mapping[str, Sequence[Any]]) -> list[Row]:
    """Rows whose columns hold one of the given values.

    Raises:
        DataError: there is no such column, or no row matches.
    """
    for column, values in where.items():
        if any(column not in row for row in rows[:1]):
            raise DataError(f"where: no column '{column}'; the rows have: {', '.join(rows[0])}")
        found = [row for row in rows if row.get(column) in values]
        if not found:
            known = sorted({str(row.get(column)) for row in rows})
            shown = ", ".join(known[:10]) + (" …" if len(known) > 10 else "")
            raise DataError(f"where: no row with {column} in {list(values)}; there are: {shown}")
        rows = found
    return list(rows)


def shard(rows: Sequence[Row], part: int, of: int) -> list[Row]:
    """Shard ``part`` of the rows, every ``of``-th row starting at ``part``; the shards are disjoint and cover all rows.

    Raises:
        DataError: the shard is empty.
    """
    if not 0 <= part < of:
        raise DataError(f"shard: part must be from 0 to {of - 1}, got {part}")
    found = list(rows[part::of])
    if not found:
        raise DataError(f"shard {part} of {of} is empty: the data set has {len(rows)} rows")
    return found


def evenly_spread_indices(count: int, most: int | None) -> list[int]:
    """Select up to ``most`` of the indices 0 to ``count`` − 1, evenly spaced, since files are often sorted by kind."""
    wanted = count if most is None else min(most, count)
    return [index * count // wanted for index in range(wanted)]
