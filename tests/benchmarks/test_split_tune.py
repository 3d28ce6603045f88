"""The benchmark of split fine-tuning on real MiniLM, with hardly any sentences."""

from __future__ import annotations

import json

import pytest

from raycloud.benchmarks import split_tune


def test_it_ends_with_its_figures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in {"TRAIN": 32, "TEST": 32, "EPOCHS": 1}.items():
        monkeypatch.setattr(split_tune, name, value)
    result = split_tune.run(as_json=True, quick=True)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert {row["cut"] for row in result["rows"]} == {"unsplit", *split_tune.CUTS}
    # Bytes are exact however few sentences there are: 1,536 against 36 a token, and the headers.
    assert 40 <= result["byte_ratio_36"] < 1536 / 36
