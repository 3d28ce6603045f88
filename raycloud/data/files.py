"""Rows of JSON and Parquet files; values keep the types that the file gives them.

A row holds its file and line, so that error messages can name them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raycloud.data.splits import Row
from raycloud.errors import DataError

SUFFIXES = (".jsonl", ".json", ".parquet")
"""Suffixes of data files; other files are no source."""
_BOM = b"\xef\xbb\xbf"
_BLANK = re.compile(r"[ \t\r\n]*")
_ALLOWED = "allowed: an object a line, or one list of objects"
_SHOWN = 60
"""Number of characters of a value that a message repeats."""
_KINDS = {str: "text", int: "number", float: "number", bool: "truth value", list: "list", dict: "object"}


class LocatedRow(Row):
    """Row with its location, such as file and line."""

    __slots__ = ("place",)

    def __init__(self, values: Row, place: str) -> None:
        super().__init__(values)
        self.place = place

    def __reduce__(self) -> tuple[type[LocatedRow], tuple[Row, str]]:
        return type(self), (dict(self), self.place)


def read_file(path: Path) -> list[Row]:
    """Rows of a file; every row has all columns of the file, with None for a missing value.

    A ``.jsonl`` or ``.json`` file holds one object per line, a sequence of objects, or one list of objects, in UTF-8.

    Raises:
        DataError: it cannot be read; the message names file, line and what is wrong.
    """
    try:
        rows = _parquet(path) if path.suffix == ".parquet" else list(_json_lines(path))
    except OSError as error:
        raise DataError(f"cannot read '{path}': {str(error).splitlines()[0]}") from error
    if not rows:
        raise DataError(f"data file '{path}' is empty")
    columns: Row = {name: None for row in rows for name in row}
    return [row if len(row) == len(columns) else LocatedRow({**columns, **row}, row.place) for row in rows]


def location_of(row: Row, otherwise: str = "a row") -> str:
    """Location of a row for the beginning of a message; ``otherwise`` for a row that is not from a file."""
    return row.place if isinstance(row, LocatedRow) else otherwise


def text_in(row: Row, column: str) -> str:
    """Text of a row in a column.

    Raises:
        DataError: the value is no text; the message names file, line, column, value and what is allowed.
    """
    value = row.get(column)
    if not isinstance(value, str):
        raise DataError(f"{location_of(row)}: '{column}' is {describe_value(value)}; allowed: a text")
    if not value.isascii() and not _is_unicode(value):
        raise DataError(f"{location_of(row)}: '{column}' has half of a surrogate pair; allowed: a text in Unicode")
    return value


def optional_text_in(row: Row, column: str) -> str:
    """Text of a row in a column, see :func:`text_in`; empty if the row has no value there."""
    return "" if row.get(column) is None else text_in(row, column)


def describe_value(value: Any) -> str:
    """Description of a value for a message: its kind and its beginning."""
    if value is None:
        return "null"
    text = repr(value)
    text = text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
    return f"the {_KINDS.get(type(value), type(value).__name__)} {text}"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet(path: Path) -> list[LocatedRow]:
    import pyarrow as pa  # takes a third of a second; recipes import this file and do not need it
    import pyarrow.parquet as pq

    try:
        # Not read_table, which reads a parent folder such as 'year=2024' as a column of the file.
        table = pq.ParquetFile(path).read()
        table.validate(full=True)  # a text column need not be UTF-8
        return [LocatedRow(row, f"'{path}', row {at}") for at, row in enumerate(table.to_pylist(), 1)]
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"cannot read '{path}': {str(error).splitlines()[0]}") from error


def _json_lines(path: Path) -> Iterator[LocatedRow]:
    """Objects of a file with one per line; if the first line is no object, the objects of the file as a whole."""
    with open(path, "rb") as file:
        begin, any_yet = 0, False
        for number, raw in enumerate(file, 1):
            line = _text(raw, path, number, begin)
            begin += len(raw)
            if not line.strip():
                continue
            value = None
            try:
                value = json.loads(line) if any_yet or not line.lstrip().startswith("[") else None
            except (ValueError, RecursionError) as error:
                if any_yet:
                    raise _no_json(error, path, number) from None
            if not any_yet and not isinstance(value, dict):
                break
            any_yet = True
            yield _placed(value, path, number)
        else:
            return
    yield from _json_values(_text(path.read_bytes(), path, 1, 0), path)


def _json_values(text: str, path: Path) -> Iterator[LocatedRow]:
    """Objects of a list or of a sequence of objects; each may extend over several lines."""
    decoder, at, line, counted = json.JSONDecoder(), _after_blanks(text, 0), 1, 0
    listed = text[at] == "["
    at += listed
    while (at := _after_blanks(text, at)) < len(text):
        line += text.count("\n", counted, at)
        counted = at
        if listed and text[at] == "]":
            if (more := _after_blanks(text, at + 1)) < len(text):
                line += text.count("\n", at, more)
                raise DataError(f"cannot read '{path}', line {line}: there is more text after the list; {_ALLOWED}")
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise _no_json(error, path, line) from None
        yield _placed(value, path, line)
        at = _after_blanks(text, at)
        if listed and text[at : at + 1] not in (",", "]"):
            raise DataError(f"cannot read '{path}', line {line}: a comma or the list's end is missing; {_ALLOWED}")
        at += text[at : at + 1] == "," and listed


def _after_blanks(text: str, at: int) -> int:
    found = _BLANK.match(text, at)
    assert found is not None
    return found.end()


def _placed(value: Any, path: Path, line: int) -> LocatedRow:
    if not isinstance(value, dict):
        raise DataError(f"cannot read '{path}', line {line}: a row is {describe_value(value)}; {_ALLOWED}")
    return LocatedRow(value, f"'{path}', line {line}")


def _no_json(error: Exception, path: Path, line: int) -> DataError:
    """One-line error from the error of a parser, with file and line."""
    if isinstance(error, json.JSONDecodeError):
        line, said = line if error.lineno == 1 else error.lineno, f"column {error.colno}: {error.msg}"
    else:
        said = "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]
    return DataError(f"cannot read '{path}', line {line}: {said}; {_ALLOWED}")


def _text(raw: bytes, path: Path, line: int, begin: int) -> str:
    """Text of a file from one of its lines to the end, without the byte order mark that some editors write."""
    if begin == 0 and raw.startswith(_BOM):
        raw, begin = raw.removeprefix(_BOM), len(_BOM)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise DataError(
            f"cannot read '{path}', line {line}: byte {raw[error.start]:#04x} at offset {begin + error.start} of the "
            "file is not UTF-8; allowed: a file in UTF-8"
        ) from None
