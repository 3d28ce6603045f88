"""Which rows go where: splits by content, selections by column, disjoint shards. All pure functions of the rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from raycloud.errors import DataError

Split = Literal["train", "valid", "test"]
Row = dict[str, Any]


def split_of(row: Row) -> Split:
    """The split a row belongs to: a pure function of its content, eight tenths, one tenth and one tenth.

    Equal texts land in the same split, so none of the test split's sentences was trained on. What a row's text is, is
    known of texts and instructions; of others it is all their text.
    """
    key: Any
    if "text" in row:
        key = row["text"]
    elif "instruction" in row:
        key = [row["instruction"], row.get("input")]
    else:
        key = [value for _, value in sorted(row.items()) if isinstance(value, str)]
    bucket = hashlib.sha256(json.dumps(key).encode()).digest()[1] % 10
    return "valid" if bucket == 8 else "test" if bucket == 9 else "train"


def select(rows: Sequence[Row], where: Mapping[str, Sequence[Any]]) -> list[Row]:
    """The rows whose columns hold one of the given values.

    Raises:
        DataError: there is no such column, or no row matches.
    """
    for column, values in where.items():
        if any(column not in row for row in rows[:1]):
            raise DataError(f"where: no column '{column}'; the rows have: {', '.join(rows[0])}")
        found = [row for row in rows if row[column] in values]
        if not found:
            known = sorted({str(row[column]) for row in rows})
            shown = ", ".join(known[:10]) + (" …" if len(known) > 10 else "")
            raise DataError(f"where: no row with {column} in {list(values)}; there are: {shown}")
        rows = found
    return list(rows)


def shard(rows: Sequence[Row], part: int, of: int) -> list[Row]:
    """Every ``of``-th row from ``part`` on: disjoint shards that together hold all rows.

    Raises:
        DataError: the shard is empty.
    """
    if not 0 <= part < of:
        raise DataError(f"shard: part must be from 0 to {of - 1}, got {part}")
    found = list(rows[part::of])
    if not found:
        raise DataError(f"shard {part} of {of} is empty: the data set has {len(rows)} rows")
    return found


def spread(count: int, most: int | None) -> list[int]:
    """At most ``most`` of the places 0 to ``count`` − 1, at even distances: files are often sorted by kind."""
    wanted = count if most is None else min(most, count)
    return [place * count // wanted for place in range(wanted)]
