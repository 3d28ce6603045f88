"""Every script in ``examples/`` runs, on a tiny model."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from tests.cluster.recipes import small

FOLDER = Path(__file__).parents[1] / "examples"


def run(name: str, *words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "argv", [name, *words])
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    return capsys.readouterr().out


def test_each_has_a_test_and_fits_a_page() -> None:
    scripts = {path.name: path.read_text().splitlines() for path in FOLDER.glob("*.py")}
    assert set(scripts) == {"split_generate.py", "evaluate.py", "segments.py", "distill.py"}
    assert all(20 <= len(lines) <= 40 for lines in scripts.values())


def test_split_generate(tiny_llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    said = run("split_generate.py", str(tiny_llama), "1", "3", capsys=capsys, monkeypatch=monkeypatch)
    assert said.startswith("The three primary colours are") and len(said) > 40


def test_evaluate(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"instruction": f"Name number {number}", "input": "", "output": "one"} for number in range(3)]
    data = tmp_path / "words.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = run("evaluate.py", str(tiny_llama), str(data), capsys=capsys, monkeypatch=monkeypatch)
    assert "words: ROUGE-L " in said


def test_segments(tiny_llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    said = run("segments.py", str(tiny_llama), "2", capsys=capsys, monkeypatch=monkeypatch)
    assert float(said.split()[-1]) < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_distill(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a Ray of its own."""
    file = tmp_path / "recipe.yaml"
    file.write_text(small(tiny_llama, tmp_path / "run", edges=[{"name": "edge"}], rounds={"count": 1}).dump())
    said = run("distill.py", str(file), capsys=capsys, monkeypatch=monkeypatch)
    assert f"model in {tmp_path / 'run' / 'student'}" in said
