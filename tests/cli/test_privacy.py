"""Options of ``raycloud privacy``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from raycloud.cli.privacy import privacy
from raycloud.data.batches import Sample
from raycloud.errors import LinkError, ModelError, RaycloudError, RecipeError, ResultError
from raycloud.models.loading import load
from raycloud.split.calibration import calibrate

app = typer.Typer()
app.command()(privacy)


def call(*words: str) -> str:
    result = CliRunner().invoke(app, words)
    if isinstance(result.exception, RaycloudError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_an_open_cut_gives_everything_away(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The edge may have no blocks; the last line is JSON; the folder is complete and is not overwritten."""
    monkeypatch.setattr("raycloud.evaluation.privacy.evaluation.PUBLIC_TEXTS", 24)
    out = tmp_path / "seen"
    words = [
        "--model",
        str(tiny_llama),
        "--start-block",
        "0",
        "--end-block",
        "4",
        "--texts",
        "2",
        "--codec",
        "bfloat16",
    ]
    lines = call(*words, "--out", str(out), "--json").splitlines()
    summary = json.loads(lines[-1])
    assert summary["max_output"] == summary["output"]["a1_plain_lens"]["top1"] == 1.0
    assert summary["max_input"] == summary["input"]["a5_matching"]["top1"] == 1.0
    assert summary["input"]["a5_matching"]["secrets"] == summary["input"]["a5_matching"]["exact"] == 1.0
    assert "a1_plain_lens" not in summary["input"] and summary["output"]["a5_matching"]["secrets"] is None
    assert lines[-4].startswith("└") and lines[-3].startswith("the cloud recovers ") and lines[-2] == f"results: {out}"
    assert json.loads((out / "privacy.json").read_text()) == summary
    assert (out / "privacy.png").read_bytes().startswith(b"\x89PNG")
    assert "A5 matching" in (out / "report.html").read_text()
    with pytest.raises(ResultError, match="exists already"):
        call(*words, "--out", str(out))


def test_calibrated_codecs_take_their_file(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raycloud.evaluation.privacy.evaluation.PUBLIC_TEXTS", 24)
    file, loaded = tmp_path / "calibration.safetensors", load(str(tiny_llama), device="cpu", dtype="float32")
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(3, 40_000, (8, 24), generator=generator).tolist()
    calibrate(loaded.model, [Sample(tuple(text), 0) for text in texts], (0, 4)).save(file)
    words = [
        "--model",
        str(tiny_llama),
        "--end-block",
        "4",
        "--texts",
        "2",
        "--codec",
        "int8",
        "--calibration",
        str(file),
    ]
    summary = json.loads(call(*words, "--start-block", "0", "--json").splitlines()[-1])
    assert summary["codec"] == "int8"
    assert summary["max_input"] == summary["max_output"] == 1.0
    with pytest.raises(LinkError, match="cut 1 is not calibrated; this calibration has: 0, 4"):
        call(*words, "--start-block", "1")


def test_reports_of_drift_are_attacked(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raycloud.retrain.report_privacy.WINDOWS", 40)
    out, data = tmp_path / "seen", tmp_path / "texts.jsonl"
    rows = [{"text": f"The {number} ships of port {7 * number % 31} sail at dawn"} for number in range(1600)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", str(tiny_llama), "--retrain", "--data", str(data), "--out", str(out), "--json"]
    summary = json.loads(call(*words).splitlines()[-1])
    assert set(summary["mean_areas"]) == {"1", "8"} and summary["mean_areas"]["8"]["means"] > 0.6
    assert json.loads((out / "privacy.json").read_text()) == summary
    assert "with means" in (out / "report.html").read_text()
    with pytest.raises(RecipeError, match="attacks no split"):
        call(*words, "--start-block", "1")
    with pytest.raises(RecipeError, match="start-block and end-block are missing"):
        call("--model", str(tiny_llama))


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (
            ["--start-block", "3", "--end-block", "2"],
            ModelError,
            "0 <= start_block <= end_block, got start_block=3, end_block=2",
        ),
        (
            ["--start-block", "0", "--end-block", "4", "--codec", "int7"],
            RecipeError,
            "no codec 'int7'; allowed: float32,",
        ),
        (
            ["--start-block", "0", "--end-block", "4", "--codec", "int8"],
            RecipeError,
            "'int8' needs --calibration, a file of",
        ),
    ],
)
def test_mistakes_are_one_line(tiny_llama: Path, words: list[str], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call("--model", str(tiny_llama), *words)
