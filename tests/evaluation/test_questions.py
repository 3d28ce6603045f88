"""Questions are encoded as in training; there may be several references."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from raycloud.data.batches import encode
from raycloud.data.prompts import Format
from raycloud.data.sources import load_rows
from raycloud.data.splits import Row, evenly_spread_indices
from raycloud.errors import DataError
from raycloud.evaluation.questions import build_questions, references
from raycloud.models.loading import load_tokenizer, resolve

ROWS: list[Row] = [
    {"instruction": "Name a colour.", "input": "", "output": "Red."},
    {"instruction": "Translate.", "input": "Guten Morgen, " * 60, "output": "Good morning."},
    {"instruction": "Say it twice.", "input": "no", "output": "no no"},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(resolve("builtin:smollm2-135m-instruct"))


@pytest.mark.parametrize("form", ["alpaca", "chat"])
@pytest.mark.parametrize("max_prompt_length", [80, 256])
def test_models_are_asked_what_they_were_trained_on(
    tokenizer: PreTrainedTokenizerBase, form: Format, max_prompt_length: int
) -> None:
    questions = build_questions(ROWS, tokenizer, form, max_prompt_length=max_prompt_length)
    for max_length in (90, 512):
        samples = encode(ROWS, tokenizer, form, max_length=max_length, max_prompt_length=max_prompt_length)
        assert references(questions, tokenizer, form, max_length) == samples
    for question in questions:
        assert len(question.ids) <= max_prompt_length
        assert question.prompt == tokenizer.decode(question.ids)


def test_plain_questions_have_no_template(tokenizer: PreTrainedTokenizerBase) -> None:
    questions = build_questions(ROWS, tokenizer, "plain", max_prompt_length=20)
    assert questions[0].prompt == "Name a colour." and questions[2].prompt == "Say it twice.\n\nno"
    assert questions[1].prompt.startswith("Translate.\n\nGuten Morgen,") and len(questions[1].ids) == 20


def test_every_reference_counts(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{**ROWS[0], "output": ["Red.", "Dark blue."]}, ROWS[2]]
    questions = build_questions(rows, tokenizer, "alpaca", max_prompt_length=256)
    assert [question.references for question in questions] == [("Red.", "Dark blue."), ("no no",)]
    samples = references(questions, tokenizer, "alpaca", 512)
    ends = [tokenizer.decode(sample.ids[sample.prompt :]) for sample in samples]
    assert ends == [f"{text}{tokenizer.eos_token}" for text in ("Red.", "Dark blue.", "no no")]
    with pytest.raises(DataError, match="max_length=3"):
        references(questions, tokenizer, "alpaca", 3)


def test_a_limit_spreads_over_the_set_and_keeps_the_numbers(tokenizer: PreTrainedTokenizerBase) -> None:
    assert evenly_spread_indices(10, None) == list(range(10)) == evenly_spread_indices(10, 99)
    assert evenly_spread_indices(10, 4) == [0, 2, 5, 7] and evenly_spread_indices(3, 1) == [0]
    rows = [{**ROWS[0], "instruction": f"Name {number}."} for number in range(10)]
    assert [(q.number, q.prompt) for q in build_questions(rows, tokenizer, "plain", max_prompt_length=9, limit=4)] == [
        (number, f"Name {number}.") for number in (0, 2, 5, 7)
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"text": "a", "output": "b"},
            "row 1: an evaluation needs the text column 'instruction'; the row has: text, o",
        ),
        ({"instruction": "a"}, "row 1: 'output' is null; allowed: a text, or a list of texts"),
        ({"instruction": "a", "output": []}, r"row 1: 'output' is the list \[\]"),
        ({"instruction": "a", "output": ["b", 3]}, r"row 1: 'output' is the list \['b', 3\]"),
        ({"instruction": "", "output": "b"}, "row 1: the prompt is empty"),
    ],
)
def test_bad_rows_are_named(tokenizer: PreTrainedTokenizerBase, row: Row, message: str) -> None:
    with pytest.raises(DataError, match=message):
        build_questions([ROWS[0], row], tokenizer, "plain", max_prompt_length=64)


def test_all_takes_every_row_of_a_file(tmp_path: Path) -> None:
    lines = "".join(f'{{"instruction": "{number}", "output": "x"}}\n' for number in range(200))
    (tmp_path / "set.jsonl").write_text(lines)
    source = str(tmp_path / "set.jsonl")
    every = load_rows(source, "all")
    assert [row["instruction"] for row in every] == [str(number) for number in range(200)]
    parts = [load_rows(source, split) for split in ("train", "valid", "test")]
    assert sorted(map(str, every)) == sorted(str(row) for part in parts for row in part)
    assert all(len(part) < 200 for part in parts)
