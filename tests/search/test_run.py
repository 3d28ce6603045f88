"""Search as a real Ray Tune run over a tiny model: its results, and no work is done twice."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raycloud.errors import ClusterError, RecipeError
from raycloud.jobs.registry import JOBS
from raycloud.search import run as search
from raycloud.search.domain import Range
from raycloud.search.rows import TrialRow
from raycloud.search.space import Metric, Space, Variant, trials
from raycloud.search.trials import ListedTrials
from tests.cluster.recipes import small
from tests.endings import report_of

ROOT = Path(__file__).parents[2]


def space(teacher: Path, **changes: Any) -> Space:
    one = small(teacher, Path("unused"), edges=[{"name": "edge"}], rounds={"count": 1, "steps": 2})
    base = one.model_dump(mode="json")
    values: dict[str, Any] = {
        "base": base,
        "variants": {
            "supervised": Variant(overrides={"objective.ce_weight": 1.0, "objective.kd_weight": 0.0}),
            "in the way": Variant(overrides={"training.max_grad_norm": 0.5}),
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
    for folder in (output, tmp_path / "elsewhere"):
        _, doomed = trials(space(tiny_llama))
        (folder / "trials" / doomed.folder / "notes").mkdir(parents=True)
    summary = search.run(space(tiny_llama), output=output, rows=rows).summary
    said = capsys.readouterr().out
    assert "done: supervised (seed 10): student_ppl_after " in said
    assert "Trial status" not in said
    assert (summary["trials"], summary["ran"], summary["failed"], summary["best"]) == (2, 2, 1, "supervised")
    none, good, bad = summary["variants"]
    assert none["metrics"]["student_ppl_after"]["mean"] > good["metrics"]["student_ppl_after"]["mean"]
    (failed,) = bad["failed"]
    assert "exists; pass --resume" in failed["error"]
    (left,) = (output / "trials").glob("supervised-*")
    assert {"recipe.yaml", "summary.json", "student"} <= {path.name for path in left.iterdir()}
    assert {path.name for path in output.iterdir()} == {
        "trials", "comparison.png", "comparison.html", "summary.json", "inputs.json", "origin.json",
    }  # fmt: skip
    assert json.loads((output / "summary.json").read_text()) == summary
    assert "in the way" in (output / "comparison.html").read_text()

    # Elsewhere, with the rows and nothing else: only what failed is tried again.
    shutil.rmtree(output)
    again = search.run(space(tiny_llama), output=tmp_path / "elsewhere", rows=rows).summary
    assert (again["trials"], again["ran"], again["failed"]) == (2, 1, 1)
    assert again["variants"][1] == good
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    assert sorted(line["variant"] for line in lines) == ["in the way", "in the way", "supervised"]
    assert not list((tmp_path / "elsewhere").glob("trials/supervised-*"))


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    def joined(*_: object) -> None:
        raise AssertionError("the search joins a cluster")

    monkeypatch.setattr(search, "ray_connection", joined)


TOO_MANY = "variant '{}': student.blocks is 5; allowed: 1 to 4, the model's blocks"


@pytest.mark.usefixtures("no_cluster")
def test_what_is_wrong_with_a_variant_is_said_before_ray_starts(tiny_llama: Path, tmp_path: Path) -> None:
    """Regression: the error was found by each trial's process, after the others had run."""

    def refused(said: str, **changes: Any) -> None:
        with pytest.raises(RecipeError) as caught:
            search.run(space(tiny_llama, **changes), output=tmp_path / "search")
        assert said in str(caught.value) and "\n" not in str(caught.value)
        assert not (tmp_path / "search" / "inputs.json").exists()

    fine = Variant(overrides={"objective.ce_weight": 1.0})
    refused(TOO_MANY.format("b"), variants={"a": fine, "b": Variant(overrides={"student.blocks": 5})})
    refused(TOO_MANY.format("student.blocks=5"), variants={}, grid={"student.blocks": [2, 5]})
    lost = Variant(overrides={"data.source": "no.jsonl"})
    refused("variant 'b': no data file at 'no.jsonl'", variants={"a": fine, "b": lost})
    encoder = Variant(overrides={"teacher.model": "builtin:minilm-l6"})
    refused("variant 'b': teacher.model 'builtin:minilm-l6' is an encoder", variants={"a": fine, "b": encoder})
    with pytest.raises(AssertionError, match="joins a cluster"):
        search.run(space(tiny_llama, variants={"a": fine, "b": Variant()}), output=tmp_path / "search")


@pytest.mark.usefixtures("no_cluster")
def test_of_what_is_sampled_one_point_must_be_sound(tiny_llama: Path, tmp_path: Path) -> None:
    def sampled(low: int, high: int) -> Space:
        base = {"job": "split_evaluate", "model": str(tiny_llama), "data": ["builtin:reviews"]}
        cuts = {"start_block": Range(low=0, high=1), "end_block": Range(low=low, high=high)}
        return Space(base=base, sample=cuts, metrics=[Metric(name="perplexity", direction="min")])

    with pytest.raises(
        RecipeError, match=r"^variant 'start_block=0, end_block=5': cut 5 is beyond the model's 4 blocks$"
    ):
        search.run(sampled(5, 9), output=tmp_path / "search")
    with pytest.raises(AssertionError, match="joins a cluster"):
        search.run(sampled(3, 9), output=tmp_path / "search")


def test_what_is_done_is_not_checked_again(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Any] = []
    support = JOBS["distill"].search
    assert support is not None
    monkeypatch.setitem(JOBS, "distill", replace(JOBS["distill"], search=replace(support, check=checked.append)))
    here = space(tiny_llama, seeds=[1, 2])
    done, *_ = trials(here)
    one = TrialRow(variant=done.variant, seed=1, recipe=done.recipe.model_dump(mode="json"), metrics={}, seconds=1.0)
    ListedTrials(here, (), [one]).check()
    assert len(checked) == 2  # one of each variant: a seed changes nothing

    checked.clear()
    rows = [
        one.model_copy(update={"variant": trial.variant, "seed": trial.seed, "recipe": trial.recipe.model_dump()})
        for trial in trials(here)
    ]
    ListedTrials(here, (), rows).check()
    assert checked == []


@pytest.mark.usefixtures("local_ray")
def test_a_search_that_does_not_fit_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    five = space(tiny_llama, seeds=[1, 2, 3], concurrent=6)
    with pytest.raises(ClusterError, match="has 4 of the resource 'cloud', this job needs 6"):
        search.run(five, output=tmp_path / "search")


def test_a_trial_begun_before_goes_on(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    def pretend(recipe: Any, mode: str) -> dict[str, Any]:
        modes.append(mode)
        path = Path(recipe.output)
        path.mkdir(parents=True, exist_ok=True)
        (path / "recipe.yaml").write_text(recipe.dump())
        if mode == "new":
            raise OSError("the disk\nis full")
        return {"student_ppl_after": 2.0, "seconds": 5}

    monkeypatch.setitem(JOBS, "distill", replace(JOBS["distill"], run_on_ray=pretend))
    (trial, *_) = trials(space(tiny_llama))
    first, second = (search.run_trial(trial, tmp_path) for _ in range(2))
    assert modes == ["new", "resume"]
    assert first.error == "OSError: is full" and second.error is None
    assert (second.metrics["student_ppl_after"], second.seconds) == (2.0, 5.0)


@pytest.mark.parametrize("perplexity", [math.nan, math.inf, None])
def test_a_trial_without_a_finite_number_has_failed(
    perplexity: float | None, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: its row counted as good, and its variant had the mean of the remaining seeds."""
    told = {"student_ppl_after": perplexity, "teacher_params": 7}
    monkeypatch.setitem(JOBS, "distill", replace(JOBS["distill"], run_on_ray=lambda recipe, mode: told))
    (trial, *_) = trials(space(tiny_llama))
    row = search.run_trial(trial, tmp_path, metrics=["student_ppl_after", "unknown"])
    assert row.error == "student_ppl_after: no finite number, the run has diverged"
    assert row.metrics == {"student_ppl_after": None, "teacher_params": 7.0}


@pytest.mark.waits
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ctrl_c_ends_a_search_and_starting_it_again_goes_on(tiny_llama: Path, tmp_path: Path) -> None:
    """Run the command in a process of its own with its own Ray."""
    base = small(tiny_llama, Path("unused"), edges=[{"name": "edge"}], rounds={"count": 1, "steps": 2}).dump()
    (tmp_path / "base.yaml").write_text(base)
    (tmp_path / "space.py").write_text(
        "from raycloud.search.space import Metric, Space\n"
        "METRICS = [Metric(name='student_ppl_after', direction='min')]\n"
        "SPACE = Space(base='base.yaml', grid={'student.blocks': [2, 3]}, metrics=METRICS)\n"
    )
    command = [sys.executable, "-m", "raycloud", "search", "--space", "space.py", "--out", "out", "--json"]
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
    assert complaint == "error: stopped; run the same search again to continue\n"
    assert len((tmp_path / "out" / "rows.jsonl").read_text().splitlines()) == 1
    done = subprocess.run(command, capture_output=True, timeout=600, **options)
    assert done.returncode == 0, done.stderr
    summary = report_of(done.stdout, done.stderr)
    assert summary is not None
    assert (summary["trials"], summary["ran"], summary["failed"]) == (2, 1, 0)
