"""Values by the core schema of YAML 1.2.2 (section 10.3.2), and limits of documents."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml

from raycloud.errors import RecipeError
from raycloud.recipe import Recipe
from raycloud.yaml12 import dump, load, load_line

NUMBERS = {
    # Example 10.9 of the specification.
    "0": 0, "0o7": 7, "0x3A": 58, "-19": -19, "0.": 0.0, "-0.0": -0.0, ".5": 0.5, "+12e03": 12000.0,
    "-2E+05": -200000.0, ".inf": math.inf, "-.Inf": -math.inf, "+.INF": math.inf,
    # By its regular expressions.
    "1e-4": 1e-4, "1E4": 1e4, "0x10": 16, "010": 10, "+7": 7, "0o17": 15, "1.5": 1.5, "5.e1": 50.0, "-.5": -0.5,
    "08": 8,
}  # fmt: skip
CONSTANTS = {
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
    "null": None, "Null": None, "NULL": None, "~": None, "": None,
}  # fmt: skip
TEXTS = (
    # What version 1.1 takes for booleans, numbers in sixties, octal and binary numbers, dates, and its own signs.
    *("y", "Y", "yes", "Yes", "YES", "n", "N", "no", "No", "NO", "on", "On", "ON", "off", "Off", "OFF"),
    *("12:30:00", "1:1", "190:20:30.15", "1_000", "1_000.5", "0b1010", "-0x1F", "+0o7", "685_230.15", "0x_1"),
    *("2024-01-31", "2024-01-31 10:00:00", "=", "<<", "tRUE", "nULL", "nul", "e5", ".", "-", ".e1", "1e", "+", "-inf"),
    *("inf", "nan", ".iNF", "+.nan", "0o8", "0xG", "1.2.3", "v1", "Norway"),
)  # fmt: skip


@pytest.mark.parametrize(("text", "value"), [*NUMBERS.items(), *CONSTANTS.items()])
def test_words_of_the_core_schema(text: str, value: Any) -> None:
    for found in (load(text), load(f"[{text}]")[0] if text else None, load_line(text)):
        assert (found, type(found)) == (value, type(value))


def test_no_number_at_all() -> None:
    for text in (".nan", ".NaN", ".NAN"):
        assert math.isnan(load(text))


@pytest.mark.parametrize("text", TEXTS)
def test_everything_else_is_text(text: str) -> None:
    # A lone dash begins a list, and an equals sign is a word only by itself.
    if text != "-":
        assert load(f"[{text}]") == [text]
        assert load_line(text) == text


@pytest.mark.parametrize("text", [*TEXTS, *NUMBERS, *CONSTANTS, ".nan", "a #b", " x ", "line\nline", "é", "'", "!x"])
def test_texts_come_back_as_they_were(text: str) -> None:
    """Values also survive readers of version 1.1, which other programs use."""
    for flow in (False, True):
        written = dump({"a": [text], text: 1}, flow=flow)
        assert load(written) == yaml.safe_load(written) == {"a": [text], text: 1}


def test_numbers_come_back_as_they_were() -> None:
    for number in (1e-5, 1e16, 1e-300, 0.1, -0.0, 3.0, 1 << 70, -5, True, None):
        written = dump([number])
        assert [repr(value) for value in (load(written)[0], yaml.safe_load(written)[0])] == [repr(number)] * 2


def test_explicit_tags_of_the_schema() -> None:
    assert load("[!!str 5, !!int '5', !!float 5, !!null '', !!bool 'true', '5', \"no\"]") == [
        "5", 5, 5.0, None, True, "5", "no",
    ]  # fmt: skip


BOMB = "a0: &a0 x\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 10_000, "deeper than 100 levels"),
        ("[" * 10_000 + "]" * 10_000, "deeper than 100 levels"),
        ("{a: " * 10_000 + "}" * 10_000, "deeper than 100 levels"),
        ("\n".join(" " * n + "a:" for n in range(200)), "deeper than 100 levels"),
        (BOMB, "100000 values, aliases expanded"),
        ("a: &a [*a]", "deeper than 100 levels"),
        ("a: &a {b: *a}", "deeper than 100 levels"),
        ("9" * 5_000, "is no int"),
        ("!!int no", "'no' is no int"),
        ("!!python/object/apply:os.system [ls]", "unknown tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
        ("!!timestamp 2024-01-01", "unknown tag"),
        ("!!set {a}", "unknown tag"),
        ("{a: 1, a: 2}", "the key 'a' is given twice"),
        ("{[a]: 1}", "a key is a list or mapping"),
        ("a: [", "expected the node content"),
    ],
)  # fmt: skip
def test_documents_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(yaml.YAMLError, match=message):
        load(text)
    with pytest.raises(RecipeError, match=message) as raised:
        Words.parse({}, [f"word={text}"])
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 250


def test_aliases_are_copies() -> None:
    first, second = load("[&a {b: 1}, *a]")
    first["b"] = 2
    assert second == {"b": 1}


class Words(Recipe):
    """Values of a recipe."""

    word: Any = None
    rate: float = 1.0
    when: bool = False
    where: dict[str, list[Any]] = {}


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("results/run #2", "results/run #2"),
        ("#2", "#2"),
        ("a#b", "a#b"),
        ("'a #b'", "a #b"),
        ("[no, sv]", ["no", "sv"]),
        ("{no: [no, on]}", {"no": ["no", "on"]}),
        ("1e-4", 1e-4),
        ("no", "no"),
        ("'no'", "no"),
        ("12:30:00", "12:30:00"),
        ("", None),
        ("~", None),
        ("a=b", "a=b"),
        ('"a\\n#b"', "a\n#b"),
    ],
)
def test_overrides_keep_what_they_are_given(override: str, value: Any) -> None:
    found = Words.parse({}, [f"word={override}"])
    assert found.word == value
    assert Words.parse(load(found.dump())) == found


def test_lists_and_keys_of_words_stay_texts_in_files(tmp_path: Any) -> None:
    (tmp_path / "words.yaml").write_text("where: {lang: [no, sv], on: [yes]}\nrate: 1e-4\nwhen: yes\n")
    found = Words.load(tmp_path / "words.yaml")
    assert found.where == {"lang": ["no", "sv"], "on": ["yes"]}
    assert (found.rate, found.when) == (1e-4, True)  # what a field wants, its own type reads


@pytest.mark.parametrize("override", ["[a] #b", "'a' #b", "{a: b} # c", "a: b #c"])
def test_a_comment_behind_more_than_a_text_is_refused(override: str) -> None:
    with pytest.raises(RecipeError, match="'#' would begin a comment; put the text in quotes"):
        Words.parse({}, [f"word={override}"])
