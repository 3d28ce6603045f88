"""Rows from anywhere: built-in sets, JSONL and Parquet files, data sets of the hub."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq

from raycloud.data.instruct import instruct
from raycloud.data.recipe import DataRecipe
from raycloud.data.reviews import reviews
from raycloud.data.splits import Row, Split, split_of, spread
from raycloud.errors import DataError, MissingExtra
from raycloud.fetch import PREFIX

_TABLES: dict[str, Callable[[Callable[[str], None]], pa.Table]] = {"reviews": reviews, "instruct": instruct}
_HUB_SPLITS = {"train": "train", "valid": "validation", "test": "test", "all": "all"}
_OUR_NAMES = {"context": "input", "response": "output"}
"""Of columns that instruction sets such as databricks-dolly-15k name otherwise."""

Part = Split | Literal["all"]
"""One split, or every row."""


def load_rows(source: str, split: Part | str, notify: Callable[[str], None] = lambda line: None) -> list[Row]:
    """The rows of one split, or all of them; an instruction's columns are ``instruction``, ``input`` and ``output``.

    Args:
        source: ``builtin:reviews``, ``builtin:instruct``, a ``.jsonl`` or ``.parquet`` file (also relative to
            ``RAYCLOUD_DATA``), or a hub id (with the extra ``hub``), with the name of one of its configurations as in
            ``nyu-mll/glue:cola``.
        split: hub sets bring their own splits, which may have names of their own; everything else, and those with
            nothing but a train split, is split by :func:`split_of`.
        notify: told one line before each download.

    Raises:
        DataError: the source is not there, cannot be read, or has no rows in this split.
    """
    name = source.removeprefix(PREFIX)
    if source.startswith(PREFIX):
        if name not in _TABLES:
            raise DataError(f"no built-in data set '{source}'; there are: {', '.join(PREFIX + k for k in _TABLES)}")
        rows = _TABLES[name](notify).to_pylist()
    elif Path(source).suffix in (".jsonl", ".json", ".parquet"):
        rows = _renamed(_read_file(source).to_pylist())
    else:
        rows, whole = _read_hub(source, split)
        rows = _renamed(rows)
        if not whole:
            return _nonempty(rows, source, split)
    if split not in _HUB_SPLITS:
        raise DataError(f"data set '{source}' has no split '{split}'; allowed: {', '.join(_HUB_SPLITS)}")
    return _nonempty([row for row in rows if split in ("all", split_of(row))], source, split)


def training_rows(data: DataRecipe, notify: Callable[[str], None] = lambda line: None) -> list[Row]:
    """The rows that a recipe trains on.

    Raises:
        DataError: they cannot be read.
    """
    rows = load_rows(data.source, "train", notify)
    return [rows[place] for place in spread(len(rows), data.limit)]


def _renamed(rows: list[Row]) -> list[Row]:
    if not rows or not {"instruction", "response"} <= rows[0].keys() or "output" in rows[0]:
        return rows
    return [{_OUR_NAMES.get(name, name): value for name, value in row.items()} for row in rows]


def _nonempty(rows: list[Row], source: str, split: str) -> list[Row]:
    if not rows:
        raise DataError(f"data set '{source}' has no rows in its {split} split")
    return rows


def _read_file(source: str) -> pa.Table:
    path = Path(source).expanduser()
    root = os.environ.get("RAYCLOUD_DATA")
    if not path.is_file() and root:
        path = Path(root).expanduser() / source
    if not path.is_file():
        also = f", nor under RAYCLOUD_DATA={root}" if root else ""
        raise DataError(f"no data file at '{source}'{also}")
    if path.stat().st_size == 0:
        raise DataError(f"data file '{path}' is empty")
    try:
        return pq.read_table(path) if path.suffix == ".parquet" else pyarrow.json.read_json(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"cannot read '{path}': {str(error).splitlines()[0]}") from error


def _read_hub(source: str, split: str) -> tuple[list[Row], bool]:
    """Rows of a hub set, and whether they are all of one that is not split yet."""
    if source.startswith((".", "/", "~")):
        raise DataError(f"no data set at '{source}'; allowed: a .jsonl or .parquet file, a hub id, or a builtin: name")
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra(f"data set '{source}' from the hub", "hub") from error
    name, _, configuration = source.partition(":")
    which = (name, configuration) if configuration else (name,)
    try:
        whole = datasets.get_dataset_split_names(*which) == ["train"]
        return list(datasets.load_dataset(*which, split="all" if whole else _HUB_SPLITS.get(split, split))), whole
    except Exception as error:  # the hub and its formats raise many kinds
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"cannot load data set '{source}': {first}") from error
