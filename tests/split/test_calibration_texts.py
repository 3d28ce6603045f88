"""Calibration texts begin and end like the texts of users."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raycloud.split.calibration_texts import MAX_TOKENS, load_calibration_texts
from tests.tokenizers import BOS, EOS, GEMMA, TURN, tokenizer_of

QUESTION = {"instruction": "Say it.", "input": "", "output": "It."}
LONG = {**QUESTION, "input": "w" * 300}
TEXT, PASSAGE = {"text": "A film."}, {"text": "A film. " * 10, "domain": "movie"}


@pytest.mark.parametrize(
    ("row", "template", "own", "end", "cut"),
    [
        (QUESTION, GEMMA, [], TURN, False),
        (LONG, GEMMA, [], TURN, True),
        (QUESTION, None, [], EOS, False),
        (LONG, None, [], EOS, True),
        (TEXT, GEMMA, [], None, False),
        (TEXT, None, ["<eos>"], EOS, False),  # the tokenizer itself ends texts so
        (PASSAGE, None, ["<eos>"], EOS, True),
    ],
)
def test_texts_have_one_bos_and_the_end_of_their_format(
    tmp_path: Path, row: dict[str, Any], template: str | None, own: list[str], end: int | None, cut: bool
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = ({"domain": str(number), "number": number, **row} for number in range(64))
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    tokenizer = tokenizer_of(begin=["<bos>"], end=own, template=template)
    found = load_calibration_texts([str(path)], "train", tokenizer, 1500)
    assert found
    for sample in found:
        assert sample.ids[0] == BOS and sample.ids.count(BOS) == 1
        assert (len(sample.ids) == MAX_TOKENS) == cut
        text = str(row.get("text") or row["output"]).strip()
        whole = tokenizer.decode(sample.ids).endswith(text + ("" if end is None else tokenizer.decode([end])))
        assert whole != cut
