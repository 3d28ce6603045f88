"""Exit of every verb: status, one line for an error, traceback only on request, Ctrl-C at any time."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import typer

from raycloud.cli import app as ending
from raycloud.cli import verbs
from raycloud.errors import (
    ClusterError,
    ClusterSetupError,
    FetchError,
    Interrupted,
    LinkError,
    LinkSetupError,
    NoBuiltinError,
    RaycloudError,
    RecipeError,
    TrainingError,
)
from raycloud.link.channel import LinkDown
from raycloud.link.client import SessionRefused

DEMO = str(Path(__file__).parents[2] / "jobs" / "recipes" / "demo.yaml")
Ending = Callable[..., tuple[int, str]]


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ending:
    """Return the exit status and the text on standard error when the verb ``runs`` raises an error."""

    def run(error: BaseException, *words: str) -> tuple[int, str]:
        def failing(*_: object) -> NoReturn:
            raise error

        monkeypatch.setattr("raycloud.report.runs.find_runs", failing)
        monkeypatch.setattr(sys, "argv", ["raycloud", *words, "runs"])
        monkeypatch.setattr(ending.signal, "signal", lambda *_: None)  # pytest keeps its own Ctrl-C
        with pytest.raises(SystemExit) as left:
            ending.main()
        return int(left.value.code or 0), capsys.readouterr().err

    return run


class Wrapped(Exception):
    """Error as Ray wraps one of an actor: its text is a traceback."""

    def __init__(self, cause: Exception) -> None:
        super().__init__('Traceback (most recent call last):\n  File "x", line 1\nValueError: deep')
        self.cause = cause


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (RecipeError("lr: too high"), 2, "error: lr: too high"),
        (RaycloudError("the port is taken"), 2, "error: the port is taken"),
        (NoBuiltinError("no built-in named 'x'"), 2, "error: no built-in named 'x'"),
        (FetchError("no index"), 1, "error: no index"),
        (LinkSetupError("wrong token"), 2, "error: wrong token"),
        (SessionRefused("the cloud has other blocks", "plan"), 2, "error: the cloud has other blocks"),
        (LinkError("it broke"), 1, "error: it broke"),
        (LinkDown("it is down"), 1, "error: it is down"),
        (ClusterSetupError("no room"), 2, "error: no room"),
        (ClusterError("a node died"), 1, "error: a node died"),
        (TrainingError("loss is no number"), 1, "error: loss is no number"),
        (Interrupted("stopped; continue with --resume"), 130, "error: stopped; continue with --resume"),
        (KeyboardInterrupt(), 130, "stopped"),
        (OSError(errno.ENOENT, "No such file", "a/b"), 2, "error: a/b: No such file"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 2, "error: a/b: No space left on device"),
        (
            OSError(errno.EMFILE, "Too many open files"),
            1,
            "error: input/output: Too many open files (--debug shows the traceback)",
        ),
        (ValueError("two\nlines"), 1, "error: ValueError: two (--debug shows the traceback)"),
        (AssertionError(), 1, "error: AssertionError (--debug shows the traceback)"),
        (Wrapped(ValueError("deep")), 1, "error: ValueError: deep (--debug shows the traceback)"),
    ],
)
def test_an_error_is_one_line_and_a_status(ended: Ending, error: BaseException, status: int, line: str) -> None:
    assert ended(error) == (status, line + "\n")


def test_an_import_that_ctrl_c_broke_off_is_ctrl_c(ended: Ending) -> None:
    broken = ImportError("cannot import name 'x'")
    broken.__context__ = KeyboardInterrupt()
    assert ended(broken) == (130, "stopped\n")


@pytest.mark.parametrize("error", [ValueError("deep"), RecipeError("lr: too high")])
def test_debug_shows_the_traceback(ended: Ending, error: Exception) -> None:
    status, shown = ended(error, "--debug")
    assert status == getattr(error, "exit_code", 1)
    assert shown.startswith("Traceback (most recent call last):") and "in failing" in shown
    assert shown.endswith(f"{error}\n") and "--debug" not in shown.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["distill"], "error: Missing option '--recipe'. (see: raycloud distill --help)"),
        (["distil"], "error: No such command 'distil'. Did you mean 'distill'? (see: raycloud --help)"),
        (["edge", "serve", "--cloud-token", "x"], "error: No such option: --cloud-token"),
        (["edge", "serve", "--port", "x"], "error: Invalid value for '--port': Input should be a valid integer"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    words: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["raycloud", *words])
    with pytest.raises(SystemExit) as left:
        ending.main()
    shown = capsys.readouterr().err
    assert left.value.code == 2 and shown.count("\n") == 1
    assert shown.startswith(line)


@pytest.mark.parametrize("module", ["typer", "raycloud.cli.verbs", "raycloud.report.runs"])
def test_ctrl_c_while_modules_are_imported(module: str, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Stop())\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.argv[1:] = ['runs', '.']\n"
        "from raycloud.cli.app import main; main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=280, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


@pytest.mark.parametrize("buffered", ["", "1"])
def test_whoever_reads_the_output_may_leave(tmp_path: Path, buffered: str) -> None:
    """Close the reader of the output before the first line, as ``| head`` may do."""
    reading, writing = os.pipe()
    os.close(reading)
    env = {**os.environ, "PYTHONUNBUFFERED": buffered}
    command = [sys.executable, "-m", "raycloud", "fetch"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=280, env=env)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def every_command() -> list[tuple[str, ...]]:
    """List the arguments that select every verb and group."""

    def below(command: object, words: tuple[str, ...]) -> list[tuple[str, ...]]:
        inner: dict[str, object] = getattr(command, "commands", {})
        return [words, *(found for name in inner for found in below(inner[name], (*words, name)))]

    return below(typer.main.get_command(verbs.app), ())


def test_no_flag_shows_a_type(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for words in every_command():
        monkeypatch.setattr(sys, "argv", ["raycloud", *words, "--help"])
        with pytest.raises(SystemExit) as left:
            ending.main()
        shown = capsys.readouterr().out
        assert left.value.code == 0 and "Usage: raycloud" in shown
        assert "<bool>" not in shown, words


def test_shell_completion_is_printed_and_completes_verbs() -> None:
    def asked(words: list[str], **env: str) -> str:
        command = [sys.executable, "-m", "raycloud", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, env={**os.environ, **env})
        assert done.returncode == 0, done.stderr
        return done.stdout

    for shell in ("bash", "zsh", "fish"):
        assert "_RAYCLOUD_COMPLETE" in asked([], _RAYCLOUD_COMPLETE=f"source_{shell}")
    completing = {"_RAYCLOUD_COMPLETE": "complete_bash"}
    assert asked([], **completing, COMP_WORDS="raycloud spl", COMP_CWORD="1").split() == ["split-tune", "split"]
    options = asked([], **completing, COMP_WORDS="raycloud edge serve --", COMP_CWORD="3").split()
    assert {"--token", "--api-key", "--cloud"} <= set(options)


@pytest.mark.cluster
def test_ctrl_c_while_ray_starts(tmp_path: Path) -> None:
    """Send SIGINT to all processes of the command, as a terminal does, after Ray has made its folder."""
    script = (
        "import os, pathlib, signal, sys, threading, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "folder = pathlib.Path(os.environ['RAY_TMPDIR'])\n"
        "def stop():\n"
        "    while not any(folder.rglob('session_*')): time.sleep(0.01)\n"
        "    os.killpg(0, signal.SIGINT)\n"
        "threading.Thread(target=stop, daemon=True).start()\n"
        f"sys.argv[1:] = ['distill', '--recipe', {DEMO!r}, '--out', 'never']\n"
        "from raycloud.cli.app import main; main()\n"
    )
    with tempfile.TemporaryDirectory(prefix="rt-") as short:
        env = {**os.environ, "RAY_TMPDIR": short}
        command = [sys.executable, "-c", script]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=env, start_new_session=True
        )
    assert done.returncode == 130
    assert done.stderr == "error: stopped before there were results to keep\n"
    assert not list(tmp_path.iterdir())
