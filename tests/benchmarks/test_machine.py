"""Machine and commit that are printed with a figure."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from raycloud import __version__
from raycloud.benchmarks.machine import commit, machine
from raycloud.benchmarks.measure import Measured


def test_the_processor_is_named(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nmodel name\t: Some Processor 9\nprocessor\t: 1\nmodel name\t: Some Processor 9\n"
    )
    assert machine(cpuinfo).startswith("Some Processor 9, ")
    assert "bfloat16" in machine(cpuinfo)
    assert not machine(tmp_path / "absent").startswith(",")


def test_the_commit_says_whether_the_code_is_that_of_the_commit(tmp_path: Path) -> None:
    assert commit(tmp_path) == f"raycloud {__version__}"

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", "-C", tmp_path, *who, *words], capture_output=True, text=True, check=True).stdout

    git("init", "--quiet")
    (tmp_path / "code.py").write_text("1")
    git("add", ".")
    git("commit", "--quiet", "--message", "one")
    head = git("rev-parse", "HEAD").strip()
    assert commit(tmp_path) == head[:10]
    (tmp_path / "code.py").write_text("2")
    assert commit(tmp_path) == head[:10] + "+"


def test_table_and_figures_end_with_where_they_were_measured(capsys: pytest.CaptureFixture[str]) -> None:
    Measured("Title", ["a", "b"], [["1", "2"]], {"b": 2}, ["beforehand"]).show(quick=False, as_json=True)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == "beforehand"
    assert '"b": 2, "quick": false, "machine": ' in last and '"commit": ' in last
