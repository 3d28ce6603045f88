"""``raycloud privacy`` as a function of its options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from raycloud.cli.privacy import privacy
from raycloud.errors import ModelError, RaycloudError, RecipeError, ResultError

app = typer.Typer()
app.command()(privacy)


def call(*words: str) -> str:
    result = CliRunner().invoke(app, words)
    if isinstance(result.exception, RaycloudError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_an_open_cut_gives_everything_away(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No block at either end of the edge; the last line is JSON, the folder is whole and is not written twice."""
    monkeypatch.setattr("raycloud.evaluation.privacy.examination.PUBLIC_TEXTS", 24)
    out = tmp_path / "seen"
    words = ["--model", str(tiny_llama), "--first", "0", "--second", "4", "--texts", "2", "--codec", "bfloat16"]
    lines = call(*words, "--out", str(out), "--json").splitlines()
    summary = json.loads(lines[-1])
    assert summary["max_output"] == summary["output"]["a1_plain_lens"]["top1"] == 1.0
    assert summary["max_input"] == summary["input"]["a5_matching"]["top1"] == 1.0
    assert summary["input"]["a5_matching"]["secrets"] == summary["input"]["a5_matching"]["exact"] == 1.0
    assert "a1_plain_lens" not in summary["input"] and summary["output"]["a5_matching"]["secrets"] is None
    assert any(line.startswith("the cloud recovers ") for line in lines)
    assert json.loads((out / "privacy.json").read_text()) == summary
    assert (out / "privacy.png").read_bytes().startswith(b"\x89PNG")
    assert "A5 matching" in (out / "report.html").read_text()
    with pytest.raises(ResultError, match="exists already"):
        call(*words, "--out", str(out))


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (["--first", "3", "--second", "2"], ModelError, "0 <= first <= second <= 4, got first=3, second=2"),
        (["--first", "0", "--second", "4", "--codec", "int7"], RecipeError, "no codec 'int7'; allowed: float32,"),
    ],
)
def test_mistakes_are_one_line(tiny_llama: Path, words: list[str], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call("--model", str(tiny_llama), *words)
