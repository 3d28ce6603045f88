"""Options have the same name and help in every verb."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from raycloud.cli import verbs
from raycloud.cli.app import main
from raycloud.cli.options import read_recipe
from raycloud.errors import RecipeError, ResultError
from raycloud.split.recipe import SplitEvaluateRecipe
from tests.cli.surface import FILE, surface


def test_the_command_line_is_frozen_down_to_its_options() -> None:
    """A change of the command line is a decision; ``python -m tests.cli.surface`` writes the file anew."""
    assert surface() == FILE.read_text(encoding="utf-8"), "if the change is meant: python -m tests.cli.surface"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("job: split_evaluate\noutput: of-the-recipe\n")
    return path


def test_out_is_the_recipes_output_and_overrides_win(recipe: Path, tmp_path: Path) -> None:
    def output(overrides: list[str] | None, out: Path | None) -> str:
        return read_recipe(SplitEvaluateRecipe, recipe, overrides, out).output

    odd = tmp_path / "run #2: [x]"  # as it is, not as YAML
    assert output(None, None) == "of-the-recipe"
    assert output(None, odd) == str(odd)
    assert output(["output=other"], odd) == "other"
    with pytest.raises(RecipeError, match=r"recipe\.yaml: unknown key 'outptu'"):
        read_recipe(SplitEvaluateRecipe, recipe, ["outptu=x"], odd)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["split", "calibrate", "--out", "there"], "'there' exists; pass --overwrite to replace it"),
        (["privacy", "--out", "folder"], "'folder' exists already; pass --overwrite to replace it"),
        (["privacy", "--out", "folder", "--overwrite"], "'folder' holds no privacy.json, so it is no folder of this"),
    ],
)
def test_what_is_there_is_kept_before_anything_is_loaded(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").write_text("kept")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("kept")
    done = CliRunner().invoke(verbs.app, [*words, "--model", "./no-model", "--start-block", "1", "--end-block", "2"])
    assert isinstance(done.exception, ResultError) and message in str(done.exception)
    assert (tmp_path / "there").read_text() == (tmp_path / "folder" / "mine").read_text() == "kept"


def test_export_ends_with_json(tiny_llama: Path, tmp_path: Path) -> None:
    words = ["split", "export", "--model", str(tiny_llama), "--start-block", "1", "--end-block", "3", "--json"]
    done = CliRunner().invoke(verbs.app, [*words, "--out", str(tmp_path / "parts")])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["out"] == str(tmp_path / "parts") and said["tensor_bytes"]["edge"] > said["tensor_bytes"]["cloud"] > 0


def test_the_evaluation_of_a_plan_ends_with_its_table_and_then_json(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "plan.yaml"
    values = {
        "model": str(tiny_llama),
        "output": str(tmp_path / "out"),
        "start_block": 1,
        "end_block": 3,
        "tokens": 300,
    }
    recipe.write_text(json.dumps({**values, "new_tokens": 5, "device": "cpu", "dtype": "float32"}))
    done = CliRunner().invoke(verbs.app, ["split", "evaluate", "--recipe", str(recipe), "--json"])
    assert done.exit_code == 0, done.output
    *before, last = done.stdout.splitlines()
    assert json.loads(last) == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert before[-1].startswith("results: ") and before[-2].startswith("└")


@pytest.mark.parametrize(
    ("words", "new"),
    [
        (["distill", "--recipe", "r.yaml", "--output", "x"], "--out"),
        (["search", "--space", "s.py", "--output", "x"], "--out"),
        (["edge", "serve", "--cloud-token", "x"], "--token"),
    ],
)
def test_an_option_by_its_old_name_is_answered_with_the_new_one(
    words: list[str], new: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["raycloud", *words])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.count("\n") == 1
    assert said.startswith(f"error: No such option: {words[-2]} ") and re.search(rf"[ ,]{new}[,)?]", said)
