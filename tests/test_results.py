"""Result directories: modes, locks, atomic writes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from raycloud.cluster.teacher.recipe import TuneTeacherRecipe
from raycloud.distill.recipe import DistillRecipe
from raycloud.durable import write_atomically, write_folder
from raycloud.errors import ResultError
from raycloud.results import Mode, ResultDir, check_inputs, plain_json, record_inputs

RECIPE = DistillRecipe()


def make(path: Path) -> None:
    with ResultDir.open(path, RECIPE, "new") as results:
        results.log_metrics({"round": 0})
        results.log_metrics({"round": 1})


def test_what_is_written_is_json_also_where_numbers_are_not_finite(tmp_path: Path) -> None:
    """Regression: Python wrote NaN and Infinity, which other JSON readers refuse."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    record = {"loss": math.nan, "more": [1, (math.inf, {"deep": -math.inf})], "text": "NaN", "none": None, "one": 1.0}
    plain = {"loss": None, "more": [1, [None, {"deep": None}]], "text": "NaN", "none": None, "one": 1.0}
    with ResultDir.open(tmp_path / "run", RECIPE, "new") as results:
        results.log_metrics(record)
        results.write_summary(record)
    for name in ("metrics.jsonl", "summary.json"):
        assert json.loads((tmp_path / "run" / name).read_text(), parse_constant=refuse) == plain
    assert plain_json({"a": 0.1}) == '{"a": 0.1}'


def test_a_folder_goes_on_with_the_data_that_it_knows(tmp_path: Path) -> None:
    check_inputs(tmp_path, {"a": "1"})  # nothing is known yet
    assert not list(tmp_path.iterdir())
    record_inputs(tmp_path, {"a": "1"})
    record_inputs(tmp_path, {"a": "1", "b": "2"})
    record_inputs(tmp_path, {"b": "2"})
    record_inputs(tmp_path, {})
    for other in ({"a": "2"}, {"b": "1", "a": "1"}):
        with pytest.raises(ResultError, match=r"the data of '[ab]' has changed"):
            record_inputs(tmp_path, other)
    assert json.loads((tmp_path / "inputs.json").read_text()) == {"a": "1", "b": "2"}
    (tmp_path / "inputs.json").write_text("[")
    with pytest.raises(ResultError, match=r"cannot read '.*inputs.json'"):
        check_inputs(tmp_path, {"a": "1"})


def test_a_new_directory_holds_the_recipe_as_run(tmp_path: Path) -> None:
    make(tmp_path / "run")
    assert DistillRecipe.load(tmp_path / "run" / "recipe.yaml") == RECIPE


def test_an_existing_one_is_refused_resumed_or_replaced(tmp_path: Path) -> None:
    path = tmp_path / "run"
    make(path)
    with pytest.raises(ResultError, match="pass --resume to continue it or --overwrite to replace it"):
        make(path)
    with ResultDir.open(path, RECIPE, "resume") as results:
        assert results.metrics() == [{"round": 0}, {"round": 1}]
        results.filter_metrics(lambda record: record["round"] < 1)
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


def test_a_resumed_teacher_may_be_spread_differently_and_nothing_else(tmp_path: Path) -> None:
    def teacher(**changes: Any) -> TuneTeacherRecipe:
        return TuneTeacherRecipe.model_validate({"output": str(tmp_path / "run"), **changes})

    with ResultDir.open(tmp_path / "run", teacher(deepspeed={"stage": 2}, workers={"count": 2}), "new") as results:
        results.log_metrics({"step": 0})
    spread = teacher(deepspeed={"stage": 3}, workers={"count": 1}, threads=1)
    with ResultDir.open(tmp_path / "run", spread, "resume") as results:
        assert TuneTeacherRecipe.load(results.path / "recipe.yaml") == spread
    for changes in ({"dtype": "bfloat16"}, {"training": {"lr": 1e-3}}, {"checkpoints": {"every": 5}}):
        with pytest.raises(ResultError, match=f"changed: {next(iter(changes))}"):
            ResultDir.check(tmp_path / "run", teacher(**changes), "resume")


def test_only_result_directories_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ResultError, match="is not overwritten"), ResultDir.open(tmp_path, RECIPE, "overwrite"):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    with pytest.raises(ResultError, match="is a file"), ResultDir.open(tmp_path / "thesis.tex", RECIPE, "new"):
        pass


def test_two_runs_cannot_hold_one_directory(tmp_path: Path) -> None:
    with ResultDir.open(tmp_path / "run", RECIPE, "new") as results:
        results.log_metrics({"round": 0})
        with pytest.raises(ResultError, match="in use by another run"), ResultDir.open(results.path, RECIPE, "resume"):
            pass


def make_or_take(path: Path, mode: Mode) -> None:
    with ResultDir.open(path, RECIPE, mode):
        pass


def test_links_are_never_followed(tmp_path: Path) -> None:
    """Regression: each of these wrote to, or emptied, the target of the link."""
    make(tmp_path / "home")
    kept = (tmp_path / "home" / "metrics.jsonl").read_text()
    (tmp_path / "link").symlink_to("home")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("link", "dangling"):
        for mode in get_args(Mode):
            with pytest.raises(ResultError, match=f"{name}' is a symbolic link"):
                make_or_take(tmp_path / name, mode)
    make(tmp_path / "run")
    (tmp_path / "mine").write_text("mine")
    for name in ("log.jsonl", "metrics.jsonl", "state"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
        (tmp_path / "run" / name).symlink_to(tmp_path / ("home" if name == "state" else "mine"))
        with pytest.raises(ResultError, match=f"holds the symbolic link '.*{name}'; remove the link"):
            make_or_take(tmp_path / "run", "resume")
    with ResultDir.open(tmp_path / "run", RECIPE, "overwrite") as results:
        results.log_metrics({"round": 0})
    assert not any(path.is_symlink() for path in (tmp_path / "run").iterdir())
    lock = tmp_path / "run" / ".lock"
    lock.unlink()
    lock.symlink_to(tmp_path / "mine")
    with pytest.raises(ResultError, match="symbolic link"), ResultDir.open(tmp_path / "run", RECIPE, "overwrite"):
        pass
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "home" / "metrics.jsonl").read_text() == kept


def test_scratch_of_killed_writers_goes_when_a_run_goes_on(tmp_path: Path) -> None:
    make(tmp_path / "run")
    state = tmp_path / "run" / "state"
    (state / ".round-0002-abcdefgh").mkdir(parents=True)
    (state / ".round-0001-abcdefgh-old").mkdir()  # killed between the two renames
    (tmp_path / "run" / ".report.html-abcdefgh").touch()
    with ResultDir.open(tmp_path / "run", RECIPE, "resume"):
        pass
    assert [path.name for path in state.iterdir()] == ["round-0001"]
    assert not (tmp_path / "run" / ".report.html-abcdefgh").exists()


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
    assert modes == {"folder": 0o755, "deep": 0o755, "own": 0o644, "checksums.json": 0o644}


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


_FULL = """
import resource, signal, sys
from raycloud.distill.recipe import DistillRecipe
from raycloud.errors import StorageError
from raycloud.results import ResultDir

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with ResultDir.open(sys.argv[1], DistillRecipe(), "new") as results:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    for method in (results.log_metrics, results.write_summary):
        try:
            method({"text": "x" * 20_000})
        except StorageError as error:
            print(error)
"""


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _FULL, str(tmp_path / "run")], capture_output=True, text=True)
    files = [tmp_path / "run" / name for name in ("metrics.jsonl", "summary.json")]
    assert done.stdout.splitlines() == [f"cannot write '{path}': File too large" for path in files], done.stderr
