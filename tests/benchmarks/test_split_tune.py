"""The benchmark of split fine-tuning on real MiniLM, with hardly any sentences."""

from __future__ import annotations

import json

import pytest

from raycloud.benchmarks import split_tune
from raycloud.split.finetune.crossing import fitting
from raycloud.split.finetune.numbers import Packing, Packings


def test_it_ends_with_its_figures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in {"TRAIN": 32, "TEST": 32, "EPOCHS": 1}.items():
        monkeypatch.setattr(split_tune, name, value)
    result = split_tune.run(as_json=True, quick=True)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert {row["cut"] for row in result["rows"]} == {"unsplit", *split_tune.CUTS}
    # Exact however few sentences there are: 1,536 against 36 a token, headers, and the code, which comes once.
    [ours] = [row["first_cut_bytes"] for row in result["rows"] if row["cut"] == "ours, 36 bytes"]
    packings = Packings(Packing("int8", 34), Packing("float32", 384))
    code = fitting([], packings, 384, first=True, second=False).total()
    assert 40 <= result["byte_ratio_36"] * ours / (ours - code) < 1536 / 36
