"""``raycloud versions`` on a history that no job has to make."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from raycloud.cli.verbs import app
from raycloud.distill.recipe import DistillRecipe
from raycloud.errors import ModelError, ResultError
from raycloud.rounds.versions import VersionStore


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Directory of a finished distillation without its student."""
    (tmp_path / "recipe.yaml").write_text(DistillRecipe().dump())
    (tmp_path / "summary.json").write_text("{}")
    history = VersionStore(tmp_path / "versions")
    history.add({"a": torch.zeros(3), "b": torch.zeros(2)}, note="start", figures={"perplexity": 31.25})
    history.add({"b": torch.ones(2)}, round=1, members=["store", "newsroom"], samples=96, figures={"loss": 2.5})
    return tmp_path


def said(*words: str | Path) -> str:
    """Output of the command; its errors are raised."""
    done = CliRunner().invoke(app, ["versions", *map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def test_the_list_has_a_row_for_each_version(folder: Path) -> None:
    *table, last = said("list", folder, "--json").splitlines()
    assert "start" in "".join(table) and "store, newsroom" in " ".join("".join(table).replace("│", " ").split())
    start, first = json.loads(last)["versions"]
    assert (start["version"], start["parent"], start["cohort"], start["note"]) == (0, None, None, "start")
    assert (first["members"], first["samples"], first["figures"]) == (["store", "newsroom"], 96, {"loss": 2.5})
    assert "tensors" not in first and first["stored_bytes"] > 0


def test_a_version_is_shown_with_what_it_changed(folder: Path) -> None:
    *lines, last = said("show", folder, "1", "--json").splitlines()
    shown = dict(line.split(maxsplit=1) for line in lines)
    assert shown["parent"] == "0" and shown["edges"] == "store, newsroom" and shown["figures"] == "loss 2.5"
    assert shown["tensors"] == "2, of which 1 are stored here"
    plain = json.loads(last)
    assert plain["changed"] == ["b"] and plain["tensors"].keys() == {"a", "b"} and plain["digest"] == shown["digest"]
    assert "none: it holds all tensors" in said("show", folder, "0")


def test_a_rollback_that_fails_leaves_the_history_as_it_was(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"student' is missing, whose configuration"):
        said("rollback", folder, "0")
    assert VersionStore(folder / "versions").current == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "{}", "7"], r"no version 7 in '.*versions'; there are: 0, 1"),
        (["rollback", "{}", "7"], r"no version 7 in '.*versions'; there are: 0, 1"),
        (["show", "{}", "0", "--cohort", "store"], r"no cohort 'store' in '.*'; allowed: none, it has one history"),
        (["list", "{}/versions"], r"'.*versions' is no result directory \(it holds no recipe\.yaml\)"),
        (["list", "nowhere"], r"'nowhere' is no result directory"),
    ],
)
def test_mistakes_are_one_line(folder: Path, words: list[str], message: str) -> None:
    with pytest.raises(ResultError, match=message) as raised:
        said(*(word.format(folder) for word in words))
    assert "\n" not in str(raised.value)


def test_a_directory_without_versions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(DistillRecipe().dump())
    for words in (["list", tmp_path], ["show", tmp_path, "0"], ["rollback", tmp_path, "0"]):
        with pytest.raises(ResultError, match=r"has no versions; jobs whose edges go through rounds keep them"):
            said(*words)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
