"""The one registry of jobs: its records are whole, and everything that runs no actors works where there is no ray."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import typer

from raycloud.cli.verbs import app
from raycloud.errors import RecipeError, ResultError
from raycloud.jobs.registry import JOBS, REPORTS, Lazy, job_named, load_recipe
from raycloud.recipe import Recipe
from raycloud.report.render import render
from raycloud.report.runs import RunReport, find_runs

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", JOBS)
def test_a_record_is_whole(name: str) -> None:
    """What it names can be loaded, its recipe is of this job, and its verb is one of the command line's."""
    job = JOBS[name]
    records: list[Any] = [job, job.report, *([job.search] if job.search is not None else [])]
    named = [getattr(record, field.name) for record in records for field in fields(record)]
    assert all(callable(one.load()) for one in named if isinstance(one, Lazy))
    assert job.recipe_class.model_fields["job"].default == job.name
    assert job.run_here is not None or job.run_on_ray is not None
    command = typer.main.get_command(app)
    for word in job.verb.split():
        command = command.commands[word]  # type: ignore[attr-defined]
    assert command.help


def test_reports_name_what_can_be_loaded() -> None:
    pages = [report.render for report in REPORTS.values() if report.render is not None]
    assert len(pages) == 6
    assert all(isinstance(page, Lazy) and callable(page.load()) for page in pages)


def test_no_other_job_is_known() -> None:
    with pytest.raises(RecipeError, match=r"no job 'tune'; allowed: tune_teacher, distill, evaluate, split_"):
        job_named("tune")
    with pytest.raises(RecipeError, match="no job 3"):
        job_named(3)


class CountRecipe(Recipe):
    job: Literal["count"] = "count"
    output: str = "results/count"
    number: int = 3


def _page(folder: Path) -> Path:
    return folder / "page.html"


def test_a_job_takes_one_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its recipe, its file and its report are known everywhere through it."""

    def count(recipe: CountRecipe, mode: str) -> dict[str, Any]:
        folder = Path(recipe.output)
        (folder / "weights").mkdir(parents=True)
        (folder / "recipe.yaml").write_text(recipe.dump())
        summary = {"mode": mode, "last": recipe.number, "parts": {"a": 1, "b": None}}
        (folder / "summary.json").write_text(json.dumps(summary))
        return summary

    report = RunReport(("last", "parts:part"), _page)
    record = replace(
        JOBS["evaluate"], name="count", recipe=Lazy(f"{__name__}:CountRecipe"), run_here=count, report=report,
        model="weights",
    )  # fmt: skip
    monkeypatch.setitem(JOBS, "count", record)
    file = tmp_path / "count.yaml"
    file.write_text(f"job: count\noutput: {tmp_path / 'out'}\n")
    recipe = load_recipe(file, ["number=5"])
    result = job_named("count").run(recipe)
    assert result.summary["last"] == 5 and result.path == tmp_path / "out"
    assert result.model_path == tmp_path / "out" / "weights"
    (run,) = find_runs([tmp_path], {"count": report})
    assert (run.job, run.state, run.numbers) == ("count", "complete", {"last": 5, "part a": 1})
    assert render(tmp_path / "out", {"count": report}) == tmp_path / "out" / "page.html"
    with pytest.raises(ResultError, match="has written no single model"):
        replace(result, model="").model_path  # noqa: B018


LIGHT = """
import sys
import raycloud.jobs.registry
heavy = {"ray", "torch", "transformers", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""


def test_the_registry_loads_neither_ray_nor_torch() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


WITHOUT_RAY = """
import sys, typer

class NoRay:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError("No module named 'ray'", name="ray")

sys.meta_path.insert(0, NoRay())
import torch
torch.set_num_threads(1)
from raycloud.cli import verbs
from raycloud.cli.app import main
from raycloud.evaluation.privacy import evaluation
from raycloud.jobs.registry import JOBS

evaluation.PUBLIC_TEXTS = 8

def call(status, *words):
    sys.argv[1:] = words
    try:
        main()
    except SystemExit as end:
        assert end.code == status, (words, end.code)

def below(command, words=()):
    yield words
    for name, one in getattr(command, "commands", {}).items():
        yield from below(one, (*words, name))

for words in below(typer.main.get_command(verbs.app)):
    call(0, *words, "--help")
for job in JOBS:
    call(0, "schema", job)
    call(0, "validate", f"{job}.yaml")
model = MODEL
call(0, "evaluate", "--model", model, "--data", "words.jsonl", "--split", "all", "--seeds", "1", "--new-tokens", "2",
     "--out", "results/evaluation")
cut = ("--model", model, "--start-block", "0", "--end-block", "4")
call(0, "privacy", *cut, "--texts", "1", "--out", "results/privacy")
call(0, "report", "results/privacy")
call(0, "split", "export", "--model", model, "--start-block", "1", "--end-block", "3")
call(0, "runs")
call(2, "distill", "--recipe", "distill.yaml")
call(2, "tune-teacher", "--recipe", "tune_teacher.yaml")
call(2, "split-tune", "--recipe", "edges.yaml")
assert not [name for name in sys.modules if name.partition(".")[0] == "ray"]
"""


def test_what_runs_no_actors_works_without_ray(tiny_llama: Path, tmp_path: Path) -> None:
    for job in JOBS:
        (tmp_path / f"{job}.yaml").write_text(f"job: {job}\n")
    (tmp_path / "evaluate.yaml").write_text("job: evaluate\nmodels: [m]\ndata: [d]\n")
    rows = [{"instruction": f"Name number {number}", "input": "", "output": "one"} for number in range(2)]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "edges.yaml").write_text((ROOT / "jobs" / "recipes" / "split_reviews_edges.yaml").read_text())
    script = WITHOUT_RAY.replace("MODEL", repr(str(tiny_llama)))
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    needs = "needs the extra 'cluster': pip install 'raycloud[cluster]'"
    verbs = ("distill", "tune-teacher", "split-tune with edges")
    assert done.stderr.splitlines() == [f"error: 'raycloud {verb}' {needs}" for verb in verbs]
    for shown in ("a valid distill recipe", "a valid split_tune recipe", "results/evaluation", "results/privacy"):
        assert shown in done.stdout
    assert "ROUGE-L " in done.stdout[done.stdout.rindex("results/evaluation") :]
