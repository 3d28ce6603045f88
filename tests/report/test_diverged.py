"""Reports of diverged runs: while they run, and from files, where numbers that are not finite are null."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from raycloud.jobs.registry import REPORTS
from raycloud.report import distill as distillation
from raycloud.report import split_tune
from raycloud.report import split_tune_edges as split_edges
from raycloud.report import tune_teacher as teacher
from raycloud.report.console import console
from raycloud.report.evaluate import print_evaluation
from raycloud.report.render import render
from raycloud.results import plain_json
from tests.report import test_bos, test_distill, test_split_tune_edges


def distilled() -> dict[str, Any]:
    whole = test_distill.summary()
    student = {**whole["students"]["store"], "student_tokens": 50}
    lost = {"student_ppl_before": math.inf, "student_ppl_after": math.nan, "kl_after": math.nan, "gap_closed": None}
    groups = {"movie": {**student["groups"]["movie"], **lost, "single_ppl": {"store": math.nan}}}
    other = {**student, "student_ppl_after": math.nan}
    return {**whole, **lost, "students": {"store": {**student, **lost, "groups": groups}, "newsroom": other}}


def tuned() -> dict[str, Any]:
    return {**test_bos.tuned(), "perplexity_before": math.inf, "perplexity": math.inf}


def taught() -> dict[str, Any]:
    lost = {"held_out_loss_before": math.nan, "ppl_before": math.nan, "ppl_after": math.inf}
    return {**test_bos.taught(), **lost}


def together() -> dict[str, Any]:
    first, *rest = test_split_tune_edges.RECORDS
    return split_edges.summarise("run", ["a", "b"], [{**first, "accuracy": None}, *rest])


STEP: dict[str, Any] = {"kind": "step", "step": 0, "round": 0, "student": "store", "edge": "a", "what": "together"}
RUNS: dict[str, tuple[ModuleType, Callable[[], dict[str, Any]]]] = {
    "distill": (distillation, distilled),
    "split_tune": (split_tune, tuned),
    "split_tune, edges": (split_edges, together),
    "tune_teacher": (teacher, taught),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_page_is_rendered_again_as_it_was(name: str, tmp_path: Path) -> None:
    """Regression: a perplexity of null ended ``raycloud report`` with a TypeError."""
    report, make = RUNS[name]
    summary, recipe = make(), f"job: {name.partition(',')[0]}\n"
    records = [{**STEP, "loss": 1.0, "skipped": False}, {**STEP, "step": 1, "loss": None, "skipped": False}]
    report.write_page(tmp_path, summary, records, recipe)
    page = (tmp_path / "report.html").read_bytes()
    assert b"not finite" in page and b">nan<" not in page and b">inf<" not in page
    (tmp_path / "recipe.yaml").write_text(recipe)
    (tmp_path / "summary.json").write_text(plain_json(summary))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert render(tmp_path, REPORTS).read_bytes() == page
    with console.capture() as printed:
        report.print_summary(json.loads(plain_json(summary)))
    assert "not" in printed.get()  # in lines of its own where the console is narrow


def test_a_gap_that_cannot_be_told_is_not_one_that_is_not_there() -> None:
    known = {"teacher_ppl": 3.0, "student_ppl_before": 3.0, "student_ppl_after": 3.0, "gap_closed": None}
    assert distillation._gap(known) == "no gap"
    assert distillation._gap({**known, "student_ppl_after": None}) == "not finite"
    assert distillation._gap({**known, "gap_closed": 0.5}) == "50.0 %"


def test_an_evaluation_that_is_resumed_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stored record of a finished set has null."""
    monkeypatch.setattr(console, "width", 120)
    one = {"rougeL": None, "exact": None, "perplexity": None, "agreement": None}
    summary = {
        "recipe": {"seeds": [1], "format": "plain"},
        **{"bos": {"m": "no (asked for)"}, "questions": {"texts": 3}, "sets": {"texts": {"m": one}}, "average": {}},
    }
    with console.capture() as printed:
        print_evaluation(summary)
    assert "not finite" in printed.get()
