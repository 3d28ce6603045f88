"""A search as a real Ray Tune run over a tiny model: what it leaves, and that nothing is done twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raycloud.errors import ClusterError
from raycloud.search import run as search
from raycloud.search.jobs import JOBS
from raycloud.search.space import Metric, Space, Variant, trials
from tests.cluster.recipes import small

ROOT = Path(__file__).parents[2]


def space(teacher: Path, **changes: Any) -> Space:
    base = small(teacher, Path("unused"), rounds={"count": 1, "steps": 2}).model_dump(mode="json")
    values: dict[str, Any] = {
        "base": base,
        "variants": {
            "supervised": Variant(overrides={"objective.ce_weight": 1.0, "objective.kd_weight": 0.0}),
            "too many blocks": Variant(overrides={"student.blocks": 5}),
        },
        "metrics": [Metric(name="student_ppl_after", direction="min")],
        "references": {"none": {"student_ppl_after": "student_ppl_before"}},
        "concurrent": 2,
    }
    return Space(**{**values, **changes})


@pytest.mark.usefixtures("local_ray")
def test_a_failed_trial_is_a_row_and_a_finished_one_is_not_run_again(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, rows = tmp_path / "search", tmp_path / "kept" / "rows.jsonl"
    summary = search.run(space(tiny_llama), output=output, rows=rows).summary
    said = capsys.readouterr().out
    assert "done: supervised (seed 10): student_ppl_after " in said
    assert "Trial status" not in said
    assert (summary["trials"], summary["ran"], summary["failed"], summary["best"]) == (2, 2, 1, "supervised")
    none, good, bad = summary["variants"]
    assert none["metrics"]["student_ppl_after"]["mean"] > good["metrics"]["student_ppl_after"]["mean"]
    (failed,) = bad["failed"]
    assert failed["error"] == "student.blocks is 5; allowed: 1 to 4, the model's blocks"
    (left,) = (output / "trials").iterdir()  # the other one failed before there was anything to keep
    assert {"recipe.yaml", "summary.json", "student"} <= {path.name for path in left.iterdir()}
    assert {path.name for path in output.iterdir()} == {"trials", "comparison.png", "comparison.html", "summary.json"}
    assert json.loads((output / "summary.json").read_text()) == summary
    assert "too many blocks" in (output / "comparison.html").read_text()

    # Elsewhere, with the rows and nothing else: only what failed is tried again.
    shutil.rmtree(output)
    again = search.run(space(tiny_llama), output=tmp_path / "elsewhere", rows=rows).summary
    assert (again["trials"], again["ran"], again["failed"]) == (2, 1, 1)
    assert again["variants"][1] == good
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    assert sorted(line["variant"] for line in lines) == ["supervised", "too many blocks", "too many blocks"]
    assert not list((tmp_path / "elsewhere").glob("trials/*"))


@pytest.mark.usefixtures("local_ray")
def test_a_search_that_does_not_fit_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    five = space(tiny_llama, seeds=[1, 2, 3], concurrent=6)
    with pytest.raises(ClusterError, match="has 4 of the resource 'cloud', this job needs 6"):
        search.run(five, output=tmp_path / "search")


def test_a_trial_begun_before_goes_on(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    def pretend(recipe: Any, mode: str, report: Any) -> dict[str, Any]:
        modes.append(mode)
        path = Path(recipe.output)
        path.mkdir(parents=True, exist_ok=True)
        (path / "recipe.yaml").write_text(recipe.dump())
        if mode == "new":
            raise OSError("the disk\nis full")
        return {"student_ppl_after": 2.0, "seconds": 5}

    monkeypatch.setitem(JOBS, "distill", replace(JOBS["distill"], run=pretend))
    (trial, *_) = trials(space(tiny_llama))
    first, second = (search.run_trial(trial, tmp_path) for _ in range(2))
    assert modes == ["new", "resume"]
    assert first.error == "OSError: is full" and second.error is None
    assert (second.metrics["student_ppl_after"], second.seconds) == (2.0, 5.0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ctrl_c_ends_a_search_and_starting_it_again_goes_on(tiny_llama: Path, tmp_path: Path) -> None:
    """The command in a process of its own, with a Ray of its own."""
    base = small(tiny_llama, Path("unused"), rounds={"count": 1, "steps": 2}).dump()
    (tmp_path / "base.yaml").write_text(base)
    (tmp_path / "space.py").write_text(
        "from raycloud.search.space import Metric, Space\n"
        "METRICS = [Metric(name='student_ppl_after', direction='min')]\n"
        "SPACE = Space(base='base.yaml', grid={'student.blocks': [2, 3]}, metrics=METRICS)\n"
    )
    command = [sys.executable, "-m", "raycloud", "search", "--space", "space.py", "--output", "out", "--json"]
    paths = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    options: dict[str, Any] = {"cwd": tmp_path, "env": {**os.environ, **paths}, "text": True}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **options, **pipes) as process:
        assert process.stdout is not None
        said = ""
        while "done: " not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        # The second trial is about to run.
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=200)
    assert process.returncode == 130
    assert complaint == "error: stopped; the same search again goes on from here\n"
    assert len((tmp_path / "out" / "rows.jsonl").read_text().splitlines()) == 1
    done = subprocess.run(command, capture_output=True, timeout=600, **options)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["trials"], summary["ran"], summary["failed"]) == (2, 1, 0)
