"""Data files of users: values are read unchanged, and errors name the line."""

from __future__ import annotations

import json
import pickle
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raycloud.data.files import location_of, optional_text_in, read_file, text_in
from raycloud.data.prompts import check_rows
from raycloud.data.recipe import DataRecipe
from raycloud.data.sources import load_rows, load_split_rows
from raycloud.data.splits import split_of
from raycloud.errors import DataError, RecipeError

ROWS = [{"text": "Ä day", "n": 1}, {"text": "\u2028 two", "n": None}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def written(folder: Path, content: str | bytes, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        LINES,
        LINES.rstrip(),
        LINES.replace("\n", "\r\n"),
        "\ufeff" + LINES,
        "\n \r\n" + LINES.replace("\n", "\n\n"),
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        "\ufeff\n" + json.dumps(ROWS, indent=2, ensure_ascii=False) + "\n",
        "\n".join(json.dumps(row, indent=2) for row in ROWS),
    ],
)
@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_json_in_all_the_ways_that_it_is_written(content: str, name: str, tmp_path: Path) -> None:
    assert read_file(written(tmp_path, content, name)) == ROWS


def test_values_stay_what_they_are(tmp_path: Path) -> None:
    """Regression: pyarrow turned dates into timestamps, refused columns of mixed types, and failed for missing
    lists."""
    rows: list[dict[str, Any]] = [
        {"text": "2024-01-31", "id": 1, "tags": ["a"]},
        {"text": "2024-02-01 10:00:00", "id": "x2", "extra": {"b": [1, "two"]}},
        {"text": "12:30", "id": None, "tags": 3},
    ]
    found = read_file(written(tmp_path, "".join(json.dumps(row) + "\n" for row in rows)))
    columns = {"text": None, "id": None, "tags": None, "extra": None}
    assert found == [{**columns, **row} for row in rows]
    assert [text_in(row, "text") for row in found] == [row["text"] for row in rows]
    assert location_of(found[1]) == f"'{tmp_path / 'data.jsonl'}', line 2"
    again = pickle.loads(pickle.dumps(found[1]))
    assert (again, location_of(again)) == (found[1], location_of(found[1]))


def test_rows_of_a_list_know_their_lines(tmp_path: Path) -> None:
    found = read_file(written(tmp_path, json.dumps(ROWS, indent=2)))
    assert [location_of(row).rpartition(" ")[2] for row in found] == ["2", "6"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{\"text\": \"a\"}\n{\"text\": \"caf\xe9\"}\n".encode("latin-1"), "line 2: byte 0xe9 at offset 27"),
        ("[\n{\"text\": \"caf\xe9\"}]".encode("latin-1"), "line 2: byte 0xe9 at offset 15 of the file is not UTF-8"),
        ("\ufeff{\"a\": 1}\n".encode() + b"\xff", "line 2: byte 0xff at offset 12 of the file is not UTF-8"),
        ("{\"text\": \"a\"}".encode("utf-16"), "line 1: byte 0xff at offset 0 of the file is not UTF-8"),
        ('{"a": 1}\n\n{"a": }\n', "line 3: column 7: Expecting value; allowed: an object a line, or one"),
        ('[{"a": 1},\n {"a": }]', "line 2: column 8: Expecting value"),
        ('{"a": 1}\n[{"a": 1}]\n', "line 2: a row is the list"),
        ('{"a": 1}\n7\n', "line 2: a row is the number 7; allowed: an object a line"),
        ('"text"\n', "line 1: a row is the text 'text'"),
        ('[1, 2]', "line 1: a row is the number 1"),
        ('[{"a": 1}\n{"a": 2}]', "line 1: a comma or the list's end is missing"),
        ('[{"a": 1}]\n[{"a": 2}]', "line 2: there is more text after the list"),
        ('[{"a": 1}', "line 1: a comma or the list's end is missing"),
        ('{"a": ' + "[" * 100_000 + "\n", "line 1: nested too deeply"),
        ('{"a": 1}\n{"a": ' + "9" * 5_000 + "}\n", "line 2: Exceeds the limit"),
        ("text,label\na,b\n", "line 1: column 1: Expecting value"),
        ("[]", "is empty"),
        (" \n\n", "is empty"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line(content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as raised:
        read_file(written(tmp_path, content))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400
    assert "data.jsonl" in str(raised.value)


@pytest.mark.parametrize("column", ["instruction", "input", "output"])
@pytest.mark.parametrize(
    ("value", "said"),
    [("7", "the number 7"), ("[\"a\"]", r"the list \['a'\]"), ("NaN", "the number nan"),
     ("true", "the truth value True"),
     ("null", "null"), ('"\\ud83d"', "half of a surrogate pair"), ("{}", "the object {}")],
)  # fmt: skip
def test_columns_that_must_be_texts(column: str, value: str, said: str, tmp_path: Path) -> None:
    """Regression: these were TypeErrors in an actor, or None as an instruction."""
    good = {"instruction": '"Say it."', "input": '""', "output": '"It."'}
    lines = [
        "{" + ", ".join(f'"{name}": {one}' for name, one in row.items()) + "}"
        for row in (good, {**good, column: value})
    ]
    rows = read_file(written(tmp_path, "\n".join(lines)))
    if (column, value) == ("input", "null"):
        check_rows(rows, "alpaca")
        return
    with pytest.raises(DataError, match=rf"data.jsonl', line 2: '{column}' (is|has) {said}; allowed: a text") as raised:
        check_rows(rows, "alpaca")
    assert "\n" not in str(raised.value)


def test_an_input_may_be_absent_or_null() -> None:
    rows: list[dict[str, Any]] = [{"instruction": "Say it.", "output": "It."}, {"input": None}, {"input": ""}]
    assert [optional_text_in(row, "input") for row in rows] == [""] * 3


def test_parquet_has_its_own_types(tmp_path: Path) -> None:
    when = [datetime(2024, 1, 31), datetime(2024, 2, 1)]
    (tmp_path / "year=2024").mkdir()
    path = tmp_path / "year=2024" / "data.parquet"
    pq.write_table(pa.table({"text": when, "category": pa.array(["a", "b"]).dictionary_encode()}), path)
    rows = read_file(path)
    assert rows == [{"text": when[0], "category": "a"}, {"text": when[1], "category": "b"}]  # and no column 'year'
    with pytest.raises(DataError, match=r"data.parquet', row 1: 'text' is the datetime datetime.*; allowed: a text$"):
        check_rows(rows, "plain")
    assert len(load_rows(str(path), "all")) == 2


def test_a_parquet_file_with_broken_text_is_one_line(tmp_path: Path) -> None:
    broken = pa.array([b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"text": broken}), tmp_path / "data.parquet")
    with pytest.raises(DataError, match=r"cannot read '.*data.parquet': .*UTF") as raised:
        read_file(tmp_path / "data.parquet")
    assert "\n" not in str(raised.value)


def test_a_validation_file_is_all_that_is_held_out(tmp_path: Path) -> None:
    """Regression: a set of six rows lost one to a test split that was not requested."""
    six = [{"text": f"sentence {n}"} for n in range(6)]
    train = written(tmp_path, json.dumps(six), "six.json")
    held_out = written(tmp_path, json.dumps([{"text": "another"}]), "held_out.json")
    data = DataRecipe(source=str(train), validation=str(held_out))
    parts = load_split_rows(data, "test")
    assert (parts.train, parts.held_out) == (six, [{"text": "another"}])
    assert parts.counts == {"train": 6, "validation": 1, "skipped": 0}
    assert parts.message(data) == f"rows of '{train}': 6 train, 1 validation, 0 skipped"
    assert parts.trained(six[:4]).counts == {"train": 4, "validation": 1, "skipped": 2}
    with pytest.raises(RecipeError, match="is the source itself; allowed: another one, or null"):
        DataRecipe.parse({"source": "a.jsonl", "validation": "a.jsonl"})


def test_what_is_held_out_without_one_is_said(tmp_path: Path) -> None:
    rows = [{"text": f"sentence {n}"} for n in range(60)]
    data = DataRecipe(source=str(written(tmp_path, json.dumps(rows))))
    parts = load_split_rows(data, "test")
    counts = parts.counts
    assert counts["train"] == len(parts.train) and counts["test"] == len(parts.held_out)
    assert counts["train"] + counts["valid"] + counts["test"] == 60 and counts["skipped"] == 0
    assert parts.train == load_rows(data.source, "train") and parts.held_out == load_rows(data.source, "test")
    assert "data.validation=FILE holds none of them out" in parts.message(data)
    few = DataRecipe(source=str(written(tmp_path, '{"text": "sentence 1"}', "few.jsonl")))
    empty = "test" if split_of({"text": "sentence 1"}) != "test" else "valid"
    with pytest.raises(DataError, match=r"has no rows in its \w+ split; data.validation=FILE holds none of it out"):
        load_split_rows(few, empty)
