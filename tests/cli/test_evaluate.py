"""Options of ``raycloud evaluate``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from raycloud.cli.evaluate import evaluate
from raycloud.errors import RaycloudError, RecipeError

app = typer.Typer()
app.command()(evaluate)


def call(*words: str) -> str:
    result = CliRunner().invoke(app, words)
    if isinstance(result.exception, RaycloudError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_options_and_overrides_become_the_recipe(tiny_llama: Path, tmp_path: Path) -> None:
    """Options replace values of the recipe file, and overrides replace both; the last line is JSON."""
    (tmp_path / "base.yaml").write_text(
        "models: [nowhere]\nmax_prompt_length: 200\nformat: chat\ngeneration: {top_k: 7, max_new_tokens: 99}\n"
    )
    out = tmp_path / "out"
    options = ["--model", str(tiny_llama), "--data", "builtin:instruct", "--limit", "3", "--seeds", "10,20"]
    drawn = ["--new-tokens", "4", "--temperature", "0.9", "--batch-size", "2", "--no-repeat-ngram", "3"]
    more = ["--recipe", str(tmp_path / "base.yaml"), "--out", str(out), "--json", "format=plain", "generation.top_p=.5"]
    text = call(*options, *drawn, *more)
    *before, last = text.splitlines()
    summary = json.loads(last)
    bottom = max(at for at, line in enumerate(before) if line.startswith("└"))
    assert before[-1] == f"results: {out}" and " ".join(before[bottom + 1 : -1]).strip().startswith("BOS added: ")
    assert summary["recipe"]["generation"] == {
        "max_new_tokens": 4,
        "temperature": 0.9,
        "top_p": 0.5,
        "top_k": 7,
        "no_repeat_ngram_size": 3,
        "batch_size": 2,
    }
    wanted = {"models": [str(tiny_llama)], "seeds": [10, 20], "limit": 3, "max_prompt_length": 200, "format": "plain"}
    assert {key: summary["recipe"][key] for key in wanted} == wanted
    assert summary["questions"] == {"instruct": 3}
    said = "no (the tokenizer's own post-processor)"
    assert list(summary["bos"].values()) == [said] and f"BOS added: {said}" in text
    assert "ROUGE-L" in text and "±" in text and "2 seeds, plain prompts" in text
    assert json.loads((out / "summary.json").read_text()) == summary
    assert "is complete" in call(*options, *drawn, *more, "--resume")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no model to evaluate; give --model"),
        (["--model", "m", "--seeds", "10,x"], "seeds.1: input should be a valid integer.*got 'x'"),
        (["--model", "m", "--format", "xml"], "format: input should be 'plain', 'alpaca' or 'chat', got 'xml'"),
        (["--model", "m", "--top-p", "2"], "generation.top_p: input should be less than or equal to 1, got 2.0"),
        (["--model", "m", "generation.topk=2"], "unknown key 'generation.topk'"),
        (["--model", "m", "--resume"], "give --out"),
        (["--model", "m", "--out", "x", "--resume", "--overwrite"], "exclude each other"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        call(*words)
