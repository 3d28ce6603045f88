"""Result directories: modes, locks, atomic writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raycloud.distill.recipe import DistillRecipe
from raycloud.errors import ResultError
from raycloud.results import ResultDir, write_atomically, write_folder

RECIPE = DistillRecipe()


def make(path: Path) -> None:
    with ResultDir.open(path, RECIPE, "new") as results:
        results.log({"round": 0})
        results.log({"round": 1})


def test_a_new_directory_holds_the_recipe_as_run(tmp_path: Path) -> None:
    make(tmp_path / "run")
    assert DistillRecipe.load(tmp_path / "run" / "recipe.yaml") == RECIPE


def test_an_existing_one_is_refused_resumed_or_replaced(tmp_path: Path) -> None:
    path = tmp_path / "run"
    make(path)
    with pytest.raises(ResultError, match="pass --resume to go on with it or --overwrite to replace it"):
        make(path)
    with ResultDir.open(path, RECIPE, "resume") as results:
        assert results.metrics() == [{"round": 0}, {"round": 1}]
        results.keep_metrics(lambda record: record["round"] < 1)
        assert results.metrics() == [{"round": 0}]
    with ResultDir.open(path, RECIPE, "overwrite") as results:
        assert results.metrics() == []


def test_resuming_wants_a_run_and_the_same_recipe(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="nothing to resume"), ResultDir.open(tmp_path / "no", RECIPE, "resume"):
        pass
    make(tmp_path / "run")
    other = DistillRecipe(seed=11, output="elsewhere")
    with pytest.raises(ResultError, match="changed: seed"), ResultDir.open(tmp_path / "run", other, "resume"):
        pass


def test_only_result_directories_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ResultError, match="is not overwritten"), ResultDir.open(tmp_path, RECIPE, "overwrite"):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    with pytest.raises(ResultError, match="is a file"), ResultDir.open(tmp_path / "thesis.tex", RECIPE, "new"):
        pass


def test_two_runs_cannot_hold_one_directory(tmp_path: Path) -> None:
    with ResultDir.open(tmp_path / "run", RECIPE, "new") as results:
        results.log({"round": 0})
        with pytest.raises(ResultError, match="in use by another run"), ResultDir.open(results.path, RECIPE, "resume"):
            pass


def test_a_run_that_did_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), ResultDir.open(tmp_path / "run", RECIPE, "new"):
        raise KeyError
    assert not (tmp_path / "run").exists()


def test_a_half_written_metrics_line_is_left_out(tmp_path: Path) -> None:
    make(tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"round": 2, "lo')
    with ResultDir.open(tmp_path / "run", RECIPE, "resume") as results:
        assert len(results.metrics()) == 2


def test_folders_are_readable_all_through(tmp_path: Path) -> None:
    def fill(to: Path) -> None:
        (to / "deep").mkdir(0o700)
        (to / "deep" / "own").touch(0o600)

    write_folder(tmp_path / "folder", fill)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"folder": 0o755, "deep": 0o755, "own": 0o644}


def test_writes_are_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    write_folder(target, lambda to: (to / "a").write_text("old") and None)

    def broken(to: Path) -> None:
        (to / "a").write_text("new")
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011
        write_folder(target, broken)
    assert (target / "a").read_text() == "old"
    write_atomically(tmp_path / "s.json", json.dumps({}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "s.json"]
