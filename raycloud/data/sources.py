"""Rows of built-in sets, JSON and Parquet files and data sets of the hub, and the choice of the held-out rows."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import pyarrow as pa

from raycloud.data.files import SUFFIXES, LocatedRow, read_file
from raycloud.data.instruct import instruct
from raycloud.data.recipe import DataRecipe
from raycloud.data.reviews import reviews
from raycloud.data.splits import Row, Split, evenly_spread_indices, split_of
from raycloud.errors import DataError, MissingExtra
from raycloud.fetch import PREFIX

_TABLES: dict[str, Callable[[Callable[[str], None]], pa.Table]] = {"reviews": reviews, "instruct": instruct}
_HUB_SPLITS = {"train": "train", "valid": "validation", "test": "test", "all": "all"}
_OUR_NAMES = {"context": "input", "response": "output"}
"""Column names here by their names in instruction sets such as databricks-dolly-15k."""

Part = Split | Literal["all"]
"""Name of one split, or ``all`` for every row."""


class HasSource(Protocol):
    """Recipe part that names the sources of rows."""

    @property
    def source(self) -> str:
        """Source of the training rows."""

    @property
    def validation(self) -> str | None:
        """Source of the held-out rows; None holds out a part of ``source``."""


@dataclass(frozen=True)
class SplitRows:
    """Training and held-out rows of a recipe, with the counts of all rows."""

    train: list[Row]
    held_out: list[Row]
    counts: dict[str, int]
    """Number of rows by part: ``train``; ``validation`` if it is a separate source, else ``valid`` and ``test``, or the
    split of a hub set; ``skipped``, training rows that a limit or a selection left out."""

    def trained(self, rows: list[Row]) -> SplitRows:
        """Copy with only the given training rows; the others count as ``skipped``."""
        skipped = len(self.train) - len(rows)
        return SplitRows(rows, self.held_out, {**self.counts, "train": len(rows), "skipped": skipped})

    def message(self, data: HasSource) -> str:
        """Line for the log with the counts."""
        some = ", ".join(f"{count} {part}" for part, count in self.counts.items())
        hint = "" if data.validation else "; data.validation=FILE holds none of them out"
        return f"rows of '{data.source}': {some}{hint}"


def load_rows(source: str, split: Part | str, notify: Callable[[str], None] = lambda line: None) -> list[Row]:
    """Rows of one split, or all rows; the columns of instructions are ``instruction``, ``input`` and ``output``.

    Args:
        source: ``builtin:reviews``, ``builtin:instruct``, a ``.jsonl``, ``.json`` or ``.parquet`` file (also relative
            to ``RAYCLOUD_DATA``), or a hub id (with the extra ``hub``), with the name of one of its configurations as
            in ``nyu-mll/glue:cola``.
        split: hub sets have their own splits, which may have other names; all other sources, and hub sets with only a
            train split, are split by :func:`split_of`.
        notify: called with one line before each download.

    Raises:
        DataError: the source does not exist, cannot be read, or has no rows in this split.
    """
    rows = _all_rows(source, notify)
    if rows is None:
        return _load_hub_split(source, split)
    _check_split(source, split)
    return _nonempty(rows if split == "all" else [row for row in rows if split_of(row) == split], source, split)


def load_split_rows(data: HasSource, split: Part | str, notify: Callable[[str], None] = lambda line: None) -> SplitRows:
    """Training rows and held-out rows of a recipe; each source is read once.

    With a separate validation source nothing of the training source is held out.

    Raises:
        DataError: a source does not exist, cannot be read, or has no rows in its part.
    """
    if data.validation is not None:
        train, held_out = training_part(data, notify), held_out_part(data, split, notify)
        return SplitRows(train, held_out, {"train": len(train), "validation": len(held_out), "skipped": 0})
    rows = _all_rows(data.source, notify)
    if rows is None:
        train, held_out = _load_hub_split(data.source, "train"), _load_hub_split(data.source, split)
        return SplitRows(train, held_out, {"train": len(train), split: len(held_out), "skipped": 0})
    _check_split(data.source, split)
    parts: dict[str, list[Row]] = {"train": [], "valid": [], "test": []}
    for row in rows:
        parts[split_of(row)].append(row)
    counts = {**{part: len(some) for part, some in parts.items()}, "skipped": 0}
    parts["all"] = rows
    train, held_out = (_nonempty(parts[part], data.source, part) for part in ("train", split))
    return SplitRows(train, held_out, counts)


def training_part(data: HasSource, notify: Callable[[str], None] = lambda line: None) -> list[Row]:
    """Training rows: the train split, or all rows if a separate validation source is held out.

    Raises:
        DataError: they cannot be read, or there are none.
    """
    if data.validation is None or (rows := _all_rows(data.source, notify)) is None:
        return load_rows(data.source, "train", notify)
    return _nonempty(rows, data.source, "train")


def held_out_part(data: HasSource, split: Part | str, notify: Callable[[str], None] = lambda line: None) -> list[Row]:
    """Held-out rows: a split of the source, or all rows of the validation source.

    Raises:
        DataError: they cannot be read, or there are none.
    """
    if data.validation is None or (rows := _all_rows(data.validation, notify)) is None:
        return load_rows(data.validation or data.source, split, notify)
    return _nonempty(rows, data.validation, split)


def training_rows(data: DataRecipe, notify: Callable[[str], None] = lambda line: None) -> list[Row]:
    """Training rows of a recipe, within its limit.

    Raises:
        DataError: they cannot be read.
    """
    return limit_rows(training_part(data, notify), data.limit)


def limit_rows(rows: list[Row], most: int | None) -> list[Row]:
    """Select up to ``most`` of the rows, evenly spread over them."""
    return [rows[index] for index in evenly_spread_indices(len(rows), most)]


def path_of(source: str) -> Path | None:
    """Path of the file of a source; None for a source that is no file.

    Raises:
        DataError: there is no such file.
    """
    if source.startswith(PREFIX) or Path(source).suffix not in SUFFIXES:
        return None
    path, root = Path(source).expanduser(), os.environ.get("RAYCLOUD_DATA")
    if not path.is_file() and root:
        path = Path(root).expanduser() / source
    if not path.is_file():
        also = f", nor under RAYCLOUD_DATA={root}" if root else ""
        raise DataError(f"no data file at '{source}'{also}")
    if path.stat().st_size == 0:
        raise DataError(f"data file '{path}' is empty")
    return path


def _all_rows(source: str, notify: Callable[[str], None]) -> list[Row] | None:
    """All rows of a source without splits of its own; None for a hub set that has splits."""
    if source.startswith(PREFIX):
        name = source.removeprefix(PREFIX)
        if name not in _TABLES:
            raise DataError(f"no built-in data set '{source}'; there are: {', '.join(PREFIX + k for k in _TABLES)}")
        return _TABLES[name](notify).to_pylist()
    if (path := path_of(source)) is not None:
        return _renamed(read_file(path))
    return _load_hub_split(source, "all") if _splits_of_hub(source) == ["train"] else None


def _check_split(source: str, split: str) -> None:
    if split not in _HUB_SPLITS:
        raise DataError(f"data set '{source}' has no split '{split}'; allowed: {', '.join(_HUB_SPLITS)}")


def _renamed(rows: list[Row]) -> list[Row]:
    if not rows or not {"instruction", "response"} <= rows[0].keys() or "output" in rows[0]:
        return rows
    for row in rows:
        for theirs, ours in _OUR_NAMES.items():
            if theirs in row:
                row[ours] = row.pop(theirs)
    return rows


def _nonempty(rows: list[Row], source: str, split: str) -> list[Row]:
    if not rows:
        raise DataError(
            f"data set '{source}' has no rows in its {split} split; data.validation=FILE holds none of it out"
        )
    return rows


def _load_hub_split(source: str, split: str) -> list[Row]:
    """Rows of one split of a hub set."""
    name = _HUB_SPLITS.get(split, split)
    rows = _asked_of_hub(source, lambda hub, which: list(hub.load_dataset(*which, split=name)))
    return _nonempty(
        _renamed([LocatedRow(row, f"'{source}', row {at} of {name}") for at, row in enumerate(rows, 1)]), source, split
    )


def _splits_of_hub(source: str) -> list[str]:
    return _asked_of_hub(source, lambda hub, which: list(hub.get_dataset_split_names(*which)))


def _asked_of_hub(source: str, ask: Callable[[Any, tuple[str, ...]], list[Any]]) -> list[Any]:
    if source.startswith((".", "/", "~")):
        raise DataError(
            f"no data set at '{source}'; allowed: a {', '.join(SUFFIXES)} file, a hub id, or a builtin: name"
        )
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra(f"data set '{source}' from the hub", "hub") from error
    name, _, configuration = source.partition(":")
    try:
        return ask(datasets, (name, configuration) if configuration else (name,))
    except Exception as error:  # the hub and its formats raise errors of many kinds
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"cannot load data set '{source}': {first}") from error
