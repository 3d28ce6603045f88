"""Sampling spaces: domains, points, proposals of the optimiser, and whole searches on a tiny model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.search import Searcher

from raycloud.errors import RecipeError
from raycloud.search import run as search
from raycloud.search.domain import Choice, Range
from raycloud.search.rows import TrialRow
from raycloud.search.sampling import OptunaProposals
from raycloud.search.space import Metric, Space, Trial, example_trial, point_of, trial_at
from tests.endings import report_of

ROOT = Path(__file__).parents[2]
BASE: dict[str, Any] = {"job": "split_evaluate", "tokens": 128, "new_tokens": 3, "device": "cpu", "dtype": "float32"}
METRICS = [Metric(name="perplexity", direction="min"), Metric(name="edge_mb", direction="min")]


def space(base: dict[str, Any] | None = None, **changes: Any) -> Space:
    values: dict[str, Any] = {
        "base": {**BASE, **(base or {})},
        "sample": {
            "start_block": Range(low=0, high=3),
            "end_block": Range(low=1, high=4),
            "codec": Choice(values=["float32", "bfloat16"]),
        },
        "trials": 6,
        "metrics": METRICS,
    }
    return Space(**{**values, **changes})


def row(trial: Trial, perplexity: float | None = 5.0, **more: Any) -> TrialRow:
    recipe = {**trial.recipe.model_dump(mode="json"), "output": "elsewhere"}
    metrics = {"perplexity": perplexity, "edge_mb": 1.0}
    return TrialRow(variant=trial.variant, seed=trial.seed, recipe=recipe, metrics=metrics, **more)


@given(st.floats(0.01, 0.99))
def test_sampled_floats_are_short_and_stay_between_the_ends(value: float) -> None:
    domain = Range(low=0.0123456, high=0.98765)
    drawn = domain.plain(min(max(value, 0.0123456), 0.98765))
    assert domain.contains(drawn) and drawn == pytest.approx(value, rel=0.01, abs=0.003)
    assert domain.plain(drawn) == drawn


@pytest.mark.parametrize(
    ("domain", "inside", "outside"),
    [
        (Range(low=2, high=14, step=4), [2, 6, 14], [3, 0, 18, 6.0, True, "6", None]),
        (Range(low=0.0, high=1.0), [0.5, 0, 1], [1.5, -1, "0.5", True]),
        (Choice(values=["a", 1]), ["a", 1], ["b", True, 1.0, None]),
    ],
)
def test_what_a_domain_contains(domain: Choice | Range, inside: list[Any], outside: list[Any]) -> None:
    assert all(domain.contains(one) for one in inside)
    assert not any(domain.contains(one) for one in outside)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"low": 3, "high": 3}, "low=3 and high=3; allowed: low < high"),
        ({"low": 0.0, "high": 3.0, "log": True}, "low=0.0 with log; allowed: above 0"),
        ({"low": 0.0, "high": 3.0, "step": 2}, "step=2; allowed: only with integers"),
        ({"low": 0, "high": 3, "step": 2}, "step=2 does not lead from 0 to 3"),
    ],
)
def test_domains_that_make_no_sense_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Range(**values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {"seed": [1]}}, "sample replaces variants, grid and baseline, and takes one seed"),
        ({"seeds": [1, 2]}, "takes one seed"),
        ({"stop_by": "ms"}, "stop_by is 'ms'; allowed: null, perplexity, edge_mb"),
    ],
)
def test_spaces_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        space(**changes)


def test_a_point_is_found_again_in_its_row_and_in_no_other() -> None:
    here = space()
    point = {"start_block": 1, "end_block": 3, "codec": "bfloat16"}
    trial = trial_at(here, point)
    assert trial.variant == "start_block=1, end_block=3, codec=bfloat16"
    assert Trial.read(trial.plain()) == trial
    recipe = row(trial).recipe
    assert point_of(here, recipe) == point
    for other in (
        {"codec": "int8"},
        {"start_block": 4},
        {"tokens": 64},
        {"start_block": 3},
        {"colour": "red"},
        {"job": "distill"},
    ):
        assert point_of(here, {**recipe, **other}) is None
    assert point_of(here, recipe, ["tokens=64"]) is None


def test_the_example_is_valid_or_says_why_there_is_none() -> None:
    assert example_trial(space(sample={"start_block": Range(low=0, high=5), "end_block": Range(low=1, high=3)})).variant
    with pytest.raises(RecipeError, match="start_block=5 and end_block=1; allowed: start_block < end_block"):
        example_trial(space(sample={"start_block": Range(low=5, high=9), "end_block": Range(low=1, high=3)}))


@pytest.mark.parametrize("metrics", [METRICS, METRICS[:1]])
def test_every_valid_point_is_proposed_once_and_known_ones_never(metrics: list[Metric]) -> None:
    here = space(metrics=metrics)
    known = {"start_block": 1, "end_block": 3, "codec": "bfloat16"}
    begun = {"start_block": 0, "end_block": 4, "codec": "float32"}
    done = trial_at(here, known)
    source = OptunaProposals(here, (), [(known, row(done))], [begun])  # type: ignore[list-item]
    names = list[str]()
    while (config := source.suggest(f"t{len(names)}")) != Searcher.FINISHED:
        trial = Trial.read(config["trial"])  # type: ignore[index]
        ended = row(trial, None) if len(names) == 1 else row(trial, 9.0 - len(names))
        source.on_trial_complete(f"t{len(names)}", {"row": ended.model_dump_json()}, error=len(names) == 2)
        names.append(trial.variant)
    assert names[0] == trial_at(here, begun).variant
    cuts = [(a, b) for a in range(4) for b in range(a + 1, 5)]
    valid = {f"start_block={a}, end_block={b}, codec={codec}" for a, b in cuts for codec in ("float32", "bfloat16")}
    assert len(names) == len(set(names)) and set(names) == valid - {done.variant}


def test_an_optimiser_learns_from_rows_that_are_there() -> None:
    """The optimiser draws the best value by far more often than chance would."""
    wide = {
        "start_block": Range(low=0, high=9),
        "tokens": Range(low=64, high=4000),
        "end_block": Range(low=10, high=12),
    }
    here = space(sample=wide, metrics=METRICS[:1])
    points = [{"start_block": n % 10, "end_block": 10 + n % 3, "tokens": 64 + n} for n in range(40)]
    known = [(point, row(trial_at(here, point), abs(point["start_block"] - 3) + 1.0)) for point in points]
    source = OptunaProposals(here, (), known, ())  # type: ignore[arg-type]
    drawn = [Trial.read(source.suggest(f"t{n}")["trial"]).recipe.model_dump()["start_block"] for n in range(20)]  # type: ignore[index]
    assert sum(abs(first - 3) <= 1 for first in drawn) > 10


@pytest.mark.usefixtures("local_ray")
def test_a_whole_search_and_one_that_goes_on(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of the six cuts do not exist in the model: their trials fail, and the search continues."""
    cuts = {"start_block": Range(low=0, high=1), "end_block": Range(low=3, high=5)}
    here = space({"model": str(tiny_llama)}, sample=cuts, trials=3)
    output = tmp_path / "search"
    first = search.run(here, output=output).summary
    assert (first["trials"], first["ran"]) == (3, 3)
    more = search.run(here.model_copy(update={"trials": 6}), output=output).summary
    said = capsys.readouterr().out
    assert (
        "6 trials, " in said
        and "failed: start_block=0, end_block=5 (seed 10): cut 5 is beyond the model's 4 blocks" in said
    )
    good = [variant for variant in more["variants"] if variant["seeds"]]
    assert (more["trials"], more["failed"], len(good)) == (6, 2, 4)
    rows = [json.loads(line) for line in (output / "rows.jsonl").read_text().splitlines()]
    well = [one["variant"] for one in rows if one["error"] is None]
    assert len(well) == len(set(well)) == 4
    assert more["pareto"] and set(more["pareto"]) <= {variant["name"] for variant in good}
    # Fewer blocks at the edge is what edge_mb asks for.
    assert any(name.startswith("start_block=0") for name in more["pareto"])
    names = {path.name for path in output.iterdir()}
    assert names == {
        "trials", "rows.jsonl", "comparison.png", "pareto.png", "comparison.html", "summary.json", "inputs.json",
        "origin.json",
    }  # fmt: skip
    folders = [path for path in (output / "trials").iterdir() if (path / "summary.json").is_file()]
    assert len(folders) == 4
    process = [json.loads((path / "summary.json").read_text())["unsplit_ms_per_token"] for path in folders]
    assert len(set(process)) <= 2  # measured once in the process of each search

    # Elsewhere with the rows and nothing else there is nothing left but the failures.
    shutil.rmtree(output / "trials")
    again = search.run(here.model_copy(update={"trials": 4}), output=tmp_path / "new", rows=output / "rows.jsonl")
    assert again.summary["ran"] == 0 and again.summary["pareto"] == more["pareto"]


@pytest.mark.usefixtures("local_ray")
def test_trials_that_do_poorly_are_stopped_at_their_rungs(tiny_llama: Path, tmp_path: Path) -> None:
    here = space(
        {"model": str(tiny_llama), "calibration": str(tmp_path / "kept")},
        sample={},
        grid={"codec": ["float32", "int4", "int8"], "start_block": [0, 1], "end_block": [3]},
        metrics=METRICS[:1],
        stop_by="perplexity",
    )
    output = tmp_path / "search"
    summary = search.run(here, output=output).summary
    rows = [TrialRow.model_validate_json(line) for line in (output / "rows.jsonl").read_text().splitlines()]
    stopped = [row for row in rows if row.stopped is not None]
    assert rows[0].stopped is None and 0 < len(stopped) < 6 and summary["failed"] == 0
    assert {row.stopped for row in stopped} <= {16, 32, 64}
    for row in stopped:
        # Its directory says what it was stopped for, and holds the recipe to run again.
        folder = output / "trials" / Trial.read(row.model_dump_json(include={"variant", "seed", "recipe"})).folder
        said = [json.loads(line)["perplexity"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert said[-1] == row.metrics["perplexity"] and (folder / "recipe.yaml").is_file()
        assert not (folder / "summary.json").exists()
    whole = {row.variant for row in rows} - {row.variant for row in stopped}
    assert summary["best"] in whole
    assert "Trials stopped early" in (output / "comparison.html").read_text()
    # A stopped trial is done: it is not run again.
    assert search.run(here, output=output).summary["ran"] == 0


def test_searches_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="concurrent is 2; allowed: 1, as these trials measure times"):
        search.run(space(), output=tmp_path, concurrent=2)
    no_rungs = Space(
        base={"job": "distill"},
        sample={"objective.ce_weight": Range(low=0.1, high=1.0)},
        metrics=METRICS,
        stop_by="perplexity",
    )
    with pytest.raises(RecipeError, match="stop_by is 'perplexity'; allowed: null, as these trials have no rungs"):
        search.run(no_rungs, output=tmp_path)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_a_search_killed_half_way_goes_on_and_repeats_no_trial(tiny_llama: Path, tmp_path: Path) -> None:
    """Run the command in a process of its own with its own Ray; after SIGKILL nothing cleans up."""
    (tmp_path / "space.py").write_text(
        "from raycloud.search.domain import Choice, Range\n"
        "from raycloud.search.space import Metric, Space\n"
        f"BASE = {{**{BASE!r}, 'model': {str(tiny_llama)!r}, 'calibration': 'kept'}}\n"
        "METRICS = [Metric(name=n, direction='min') for n in ('perplexity', 'bytes_per_token', 'ms_per_token')]\n"
        "CUTS = {'start_block': Range(low=0, high=1), 'end_block': Range(low=2, high=4)}\n"
        "SAMPLE = {**CUTS, 'codec': Choice(values=['bfloat16', 'int8'])}\n"
        "SPACE = Space(base=BASE, sample=SAMPLE, trials=8, metrics=METRICS)\n"
    )
    command = [sys.executable, "-m", "raycloud", "search", "--space", "space.py", "--out", "out", "--json"]
    paths = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    options: dict[str, Any] = {"cwd": tmp_path, "env": {**os.environ, **paths}, "text": True}
    with subprocess.Popen(command, **options, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        said = ""
        while said.count("done: ") < 3:
            line = process.stdout.readline()
            assert line, said
            said += line
        os.killpg(process.pid, signal.SIGKILL)
    before = (tmp_path / "out" / "rows.jsonl").read_text().splitlines()
    assert 3 <= len(before) < 8
    done = subprocess.run(command, capture_output=True, timeout=600, **options)
    assert done.returncode == 0, done.stderr
    summary = report_of(done.stdout, done.stderr)
    assert summary is not None
    assert (summary["trials"], summary["ran"], summary["failed"]) == (8, 8 - len(before), 0)
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert [json.dumps(row) for row in rows[: len(before)]] == [json.dumps(json.loads(line)) for line in before]
    assert len({row["variant"] for row in rows}) == len(rows) == 8
    assert summary["pareto"]
