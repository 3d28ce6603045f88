"""Command line as a user sees it; in this process where that makes no difference."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from raycloud.cli.app import main
from raycloud.cli.verbs import app

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "jobs" / "recipes" / "demo.yaml")


@dataclass(frozen=True)
class Said:
    """Output and exit status of a command."""

    returncode: int
    stdout: str
    stderr: str


Command = Callable[..., Said]


@pytest.fixture
def raycloud(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["raycloud", *words])
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr()
        return Said(int(left.value.code or 0), said.out, said.err)

    return run


def in_a_process(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "raycloud", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=cwd)


def test_the_surface_is_frozen() -> None:
    """New verbs must be added on purpose."""
    verbs = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}
    assert verbs == {
        "tune-teacher",
        "distill",
        "doctor",
        "evaluate",
        "split",
        "split-tune",
        "edge",
        "privacy",
        "retrain",
        "report",
        "runs",
        "search",
        "signals",
        "validate",
        "schema",
        "fetch",
        "bench",
        "versions",
    }


def test_help_is_enough_to_start(tmp_path: Path) -> None:
    done = in_a_process("--help", cwd=tmp_path)
    assert done.returncode == 0
    for verb in (
        "tune-teacher",
        "distill",
        "doctor",
        "evaluate",
        "split",
        "split-tune",
        "edge",
        "privacy",
        "retrain",
        "report",
        "runs",
        "search",
        "signals",
        "validate",
        "schema",
        "fetch",
        "bench",
        "versions",
    ):
        assert verb in done.stdout


def test_validate_shows_the_whole_recipe(raycloud: Command) -> None:
    done = raycloud("validate", DEMO, "rounds.count=7", "--show")
    assert done.returncode == 0
    assert "count: 7" in done.stdout
    assert "weight_decay" in done.stdout


def test_validate_takes_the_recipe_as_the_others_do(raycloud: Command) -> None:
    done = raycloud("validate", "--recipe", DEMO, "rounds.count=7", "--json")
    shown, said = done.stdout.splitlines()
    assert shown == f"{DEMO}: a valid distill recipe"
    assert json.loads(said)["job"] == "distill" and json.loads(said)["recipe"]["rounds"]["count"] == 7


def test_the_schema_is_json_schema(raycloud: Command) -> None:
    schema = json.loads(raycloud("schema", "distill").stdout)
    assert schema["properties"]["rounds"]


def test_fetch_lists_what_there_is(raycloud: Command) -> None:
    done = raycloud("fetch")
    assert "builtin:smollm2-135m-instruct" in done.stdout
    assert "Apache-2.0" in done.stdout
    listed = json.loads(raycloud("fetch", "--json").stdout.splitlines()[-1])["builtins"]
    assert listed["builtin:reviews"]["megabytes"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["validate"], "no recipe is named: give --recipe FILE"),
        (["validate", "nowhere.yaml"], "cannot read recipe 'nowhere.yaml'"),
        (["validate", DEMO, "training.lrr=1"], "unknown key 'training.lrr' (allowed: lr,"),
        (["validate", DEMO, "job=tune"], "job: input should be 'distill', got 'tune'"),
        (["schema", "tune"], "no job 'tune'; allowed: tune_teacher, distill, evaluate"),
        (["search", "--space", "none.py"], "cannot read space 'none.py': No such file or directory"),
        (["fetch", "gpt5"], "no built-in named 'gpt5'; available: builtin:smollm2-135m-instruct"),
        (["distill", "--recipe", DEMO, "training.lr=0"], "training.lr: input should be greater than 0, got 0"),
        (["distill", "--recipe", DEMO, "--resume", "--overwrite"], "exclude each other"),
        (["distill", "--recipe", DEMO, "data.source=none.jsonl", "output=never"], "no data file at 'none.jsonl'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    raycloud: Command, tmp_path: Path, words: list[str], message: str
) -> None:
    done = raycloud(*words)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_mistake_ends_the_process_likewise(tmp_path: Path) -> None:
    done = in_a_process("distill", "--recipe", DEMO, "training.lrr=1", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == done.stderr.splitlines()[0] + "\n"
    assert "unknown key 'training.lrr' (allowed: lr," in done.stderr
    assert not list(tmp_path.iterdir())
