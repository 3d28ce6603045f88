"""Result directories: found, identified and rendered again."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raycloud.distill.recipe import DistillRecipe
from raycloud.errors import ResultError
from raycloud.jobs.registry import REPORTS
from raycloud.report.console import console
from raycloud.report.render import render
from raycloud.report.runs import Run, find_runs, print_runs
from raycloud.results import ResultDir

ROOT = Path(__file__).parents[2]
DONE = {"run": "a1", "student_ppl_before": 90.0, "student_ppl_after": 20.0, "gap_closed": 0.5, "seconds": 3.0}
COMPARED = {
    "trials": 2,
    "ran": 2,
    "failed": 1,
    "metrics": [{"name": "ppl", "direction": "min"}],
    "baseline": None,
    "best": "a",
    "variants": [
        {
            "name": "a",
            "reference": False,
            "metrics": {"ppl": {"mean": 2.0, "deviation": None, "count": 1}},
            "seeds": [1],
            "seconds": 3.0,
            "failed": [{"seed": 2, "error": "no space"}],
            "paired": {},
        }
    ],
}


@pytest.fixture
def broken_off(tmp_path: Path) -> Path:
    """Directory of a distillation that was stopped after the second of three rounds."""
    path = tmp_path / "results" / "broken-off"
    with ResultDir.open(path, DistillRecipe.parse({"rounds": {"count": 3}}), "new") as results:
        for number in range(2):
            results.log_metrics({"kind": "round", "round": number, "loss": 3.0 - number})
    return path


@pytest.fixture
def complete(tmp_path: Path) -> Path:
    path = tmp_path / "results" / "deep" / "complete"
    with ResultDir.open(path, DistillRecipe(), "new") as results:
        results.write_summary(DONE)
    return path


@pytest.fixture
def search(tmp_path: Path) -> Path:
    """Directory of a search with one trial."""
    path = tmp_path / "results" / "search"
    with ResultDir.open(path / "trials" / "a-1", DistillRecipe(seed=1), "new") as results:
        results.write_summary(DONE)
    rows = path / "rows.jsonl"
    rows.write_text(json.dumps({"variant": "a", "seed": 1, "recipe": {"job": "distill", "seed": 41}}) + "\n")
    (path / "summary.json").write_text(json.dumps({**COMPARED, "rows": str(rows)}))
    return path


def only(folder: Path) -> Run:
    (run,) = find_runs([folder], REPORTS)
    return run


def test_runs_are_found_at_any_depth_the_newest_last(
    complete: Path, broken_off: Path, search: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for age, path in enumerate((broken_off, search, complete)):
        for file in path.glob("*.*"):
            os.utime(file, (1e9 + age, 1e9 + age))
    found = find_runs([broken_off.parent], REPORTS)
    assert [run.path for run in found] == [broken_off, search, complete]  # the trial belongs to its search
    assert [(run.job, run.state) for run in found] == [
        ("distill", "interrupted"),
        ("search", "complete"),
        ("distill", "complete"),
    ]
    assert [run.numbers for run in found] == [
        {"round": "2/3", "loss": 2.0},
        {"trials": 2.0, "failed": 1.0, "best": "a"},
        {"student_ppl_before": 90.0, "student_ppl_after": 20.0, "gap_closed": 0.5},
    ]
    ids = ["" if run.path == search else (run.path / "run_id").read_text().strip() for run in found]
    assert [run.id for run in found] == ids
    monkeypatch.setattr(console, "width", 300)
    with console.capture() as printed:
        print_runs(found)
    assert ids[0] in printed.get()
    assert "student_ppl_after 20" in printed.get() and "round 2/3" in printed.get()


def test_a_list_is_whole_at_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths and ids are never cut or wrapped, because the user passes them to the next command."""
    names = [
        Path("results") / f"a-run-of-a-long-experiment-with-a-teacher-and-a-student-{seed:02}" for seed in range(3)
    ]
    numbers: dict[str, float | str] = {"student_ppl_before": 556.4, "student_ppl_after": 159.6, "gap_closed": 1.04}
    numbers |= {"agreement_after": 0.5, "best": "skewed_reverse_kl"}
    runs = [Run(path, "tune_teacher", "interrupted", 1e9, numbers, f"0123456{at}") for at, path in enumerate(names)]
    monkeypatch.setattr(console, "width", 80)
    with console.capture() as printed:
        print_runs(runs)
    lines = printed.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if not line.startswith(" ")] == list(map(str, names))
    for at in range(3):
        assert any(line.split()[:3] == [f"0123456{at}", "tune_teacher", "interrupted"] for line in lines)
    said = " ".join(line.strip() for line in lines)
    assert said.count("student_ppl_after 159.6, gap_closed 1.04, agreement_after 0.5, best skewed_reverse_kl") == 3


def test_a_run_whose_lock_is_held_runs(broken_off: Path) -> None:
    with ResultDir.open(broken_off, DistillRecipe.load(broken_off / "recipe.yaml"), "resume"):
        assert only(broken_off).state == "running"
        assert only(broken_off).state == "running"  # asking disturbs nobody
    assert only(broken_off).state == "interrupted"


def test_a_search_whose_rows_are_held_runs(search: Path) -> None:
    (search / "summary.json").unlink()
    assert only(search).state == "interrupted"
    with open(search / "rows.jsonl", "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert (only(search).state, only(search).numbers) == ("running", {"rows": 1.0})


def test_other_jobs_show_what_they_have(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("job: tune_teacher\n")
    assert (only(tmp_path).job, only(tmp_path).numbers) == ("tune_teacher", {})
    (tmp_path / "summary.json").write_text(json.dumps({"text": "x", "loss": 1.5, "ok": True, "nan": float("nan")}))
    assert only(tmp_path).numbers == {"loss": 1.5}
    (tmp_path / "summary.json").write_text("{")
    assert only(tmp_path).numbers == {}


def test_a_search_is_rendered_again(search: Path) -> None:
    assert render(search, REPORTS) == search / "comparison.html"
    page = (search / "comparison.html").read_text()
    assert "no space" in page and "seed: 41" in page
    (search / "rows.jsonl").unlink()
    render(search, REPORTS)
    assert "seed: 1\n" in (search / "comparison.html").read_text()


def test_what_has_no_page_is_refused_in_one_line(broken_off: Path, tmp_path: Path) -> None:
    with pytest.raises(ResultError, match=r"no summary\.json to report yet: the run is interrupted"):
        render(broken_off, REPORTS)
    with pytest.raises(ResultError, match="is not a result directory"):
        render(broken_off.parent, REPORTS)
    with pytest.raises(ResultError, match="no folder"):
        render(tmp_path / "nowhere", REPORTS)
    (tmp_path / "recipe.yaml").write_text("job: evaluate\n")
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ResultError, match="the job 'evaluate', which has no page; allowed: tune_teacher, distill"):
        render(tmp_path, REPORTS)


def test_the_verbs_need_no_ray(complete: Path, search: Path) -> None:
    script = (
        "import sys; sys.modules['ray'] = None\n"  # importing it fails
        "from raycloud.cli.app import main; main()"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        [*command, "runs", "results", "--json"], cwd=search.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout.splitlines()[-1])["runs"]
    assert {run["path"] for run in runs} == {"results/deep/complete", "results/search"}
    done = subprocess.run([*command, "report", str(search)], capture_output=True, text=True)
    assert done.stdout.strip() == str(search / "comparison.html"), done.stderr
    done = subprocess.run([*command, "runs", "nowhere"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: no folder 'nowhere'\n")
