"""The commands and links of the documentation hold.

A fence that follows the line ``<!-- run -->`` is run as it stands; ``<!-- run: slow -->`` runs in the slow tier. Every
other ``raycloud`` command of a ``console`` fence is parsed, and the recipe that it names is checked with its overrides.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from raycloud.cli import verbs

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
FENCE = re.compile(
    r"(?:^<!-- run(?P<tier>: slow)? -->\n)?^```(?P<language>\w+)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")


@dataclass(frozen=True)
class Fence:
    """Fenced block of a page."""

    page: str
    line: int
    language: str
    tier: str | None
    """``fast`` or ``slow`` if it is to be run."""
    body: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def fences(page: Path) -> list[Fence]:
    text = page.read_text()
    found = []
    for match in FENCE.finditer(text):
        marked = match[0].startswith("<!--")
        tier = ("slow" if match["tier"] else "fast") if marked else None
        line = text.count("\n", 0, match.start()) + 1
        found.append(Fence(str(page.relative_to(ROOT)), line, match["language"], tier, match["body"]))
    return found


FENCES = [fence for page in PAGES for fence in fences(page)]


def test_every_fence_begins_and_ends_a_line() -> None:
    """One that was wrapped into a paragraph is shown as text, and no test would see its commands."""
    broken = [
        f"{page.name}:{number}"
        for page in PAGES
        for number, line in enumerate(page.read_text().splitlines(), 1)
        if "```" in line and (not line.lstrip().startswith("```") or line.count("```") > 1)
    ]
    assert broken == []


def commands(fence: Fence) -> list[list[str]]:
    """The ``raycloud`` commands of a console fence, without those that leave something out (…)."""
    lines = fence.body.replace("\\\n", " ").splitlines()
    shown = [line.removeprefix("$ ") for line in lines if line.startswith("$ raycloud ") and "…" not in line]
    return [shlex.split(line, comments=True)[1:] for line in shown]


COMMANDS = [
    pytest.param(words, id=f"{fence}: {' '.join(words[:2])}")
    for fence in FENCES
    if fence.language == "console"
    for words in commands(fence)
]


def run(fence: Fence, folder: Path) -> None:
    """Run a fence in a folder that has what a clone has, and is not one."""
    for name in ("jobs", "serve_apps", "tune_spaces"):
        (folder / name).symlink_to(ROOT / name)
    binaries = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "TERM": "dumb"}
    program = {"bash": ["bash", "-euc"], "python": [sys.executable, "-c"]}[fence.language]
    done = subprocess.run(
        [*program, fence.body], cwd=folder, env=environment, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, f"{fence}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("fence", [fence for fence in FENCES if fence.tier == "fast"], ids=str)
def test_a_marked_fence_runs(fence: Fence, tmp_path: Path) -> None:
    run(fence, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("fence", [fence for fence in FENCES if fence.tier == "slow"], ids=str)
def test_a_fence_marked_slow_runs(fence: Fence, tmp_path: Path) -> None:
    run(fence, tmp_path)


@pytest.mark.parametrize("words", COMMANDS)
def test_a_shown_command_is_one_that_exists(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its verb and options exist, its values have the right types, and its recipe is valid with its overrides."""
    monkeypatch.chdir(ROOT)
    command: Any = typer.main.get_command(verbs.app)
    rest = list(words)
    while hasattr(command, "commands") and rest and rest[0] in command.commands:
        command = command.commands[rest.pop(0)]
    if hasattr(command, "commands"):
        assert not rest
        return
    if rest == ["--help"]:
        return
    said = command.make_context(words[0], rest).params
    recipe = said.get("recipe")
    if recipe is not None and str(recipe).startswith("jobs/"):
        done = CliRunner().invoke(verbs.app, ["validate", str(recipe), *(said.get("overrides") or ())])
        assert done.exit_code == 0, done.exception


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_files_lead_somewhere(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert not missing


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
