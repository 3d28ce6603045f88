"""Every report of a training run says whether texts begin with BOS, as that of an evaluation does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from raycloud.report import distill as distillation
from raycloud.report import split_tune
from raycloud.report import split_tune_edges as split_edges
from raycloud.report import tune_teacher as teacher
from raycloud.report.bos import bos_lines, format_bos
from raycloud.report.console import console
from tests.report import test_distill, test_split_tune_edges

WHY = "yes (the tokenizer's own post-processor)"


def tuned() -> dict[str, Any]:
    return {"perplexity_before": 9.0, "perplexity": 3.0, "steps": 1, "train_texts": 8, "held_out_texts": 2}


def taught() -> dict[str, Any]:
    numbers = ("held_out_loss_before", "held_out_loss_after", "ppl_before", "ppl_after", "tokens_per_s", "seconds")
    counts = ("trained_tokens", "trained_params", "params", "workers", "stage", "restarts")
    return dict.fromkeys((*numbers, *counts), 1)


def together() -> dict[str, Any]:
    return split_edges.summarise("run", ["a", "b"], test_split_tune_edges.RECORDS)


RUNS: dict[str, tuple[ModuleType, Callable[[], dict[str, Any]], list[dict[str, Any]]]] = {
    "distill": (distillation, test_distill.summary, test_distill.records()),
    "split-tune": (split_tune, tuned, [{"step": 0, "loss": 1.0, "skipped": False}]),
    "split-tune, edges": (split_edges, together, []),
    "tune-teacher": (teacher, taught, [{"kind": "step", "step": 0, "loss": 1.0}]),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("given", [True, False])
def test_pages_and_consoles_say_it_once_and_runs_of_before_did_not_tell(
    name: str, given: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "width", 120)
    report, make, records = RUNS[name]
    summary = {**make(), **({"bos": WHY} if given else {})}
    report.write_page(tmp_path, summary, records, "job: any")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    with console.capture() as printed:
        report.print_summary(summary)
    assert html.count("BOS added") == printed.get().count("BOS added") == given
    assert ("BOS added: yes (the tokenizer&#x27;s own post-processor)" in html) is given
    assert (f"BOS added: {WHY}\n" in printed.get()) is given


def test_models_that_differ_are_named() -> None:
    assert format_bos({"a": WHY, "b": WHY}) == format_bos(WHY) == f"BOS added: {WHY}"
    assert bos_lines({"bos": {"a": WHY, "b": "no (asked for)"}}) == [f"BOS added: a: {WHY}; b: no (asked for)"]


def test_what_an_edge_tells_is_in_the_summary_of_all_and_no_metric() -> None:
    first, *rest = test_split_tune_edges.RECORDS
    summary = split_edges.summarise("run", ["a", "b"], [{**first, "bos": WHY}, *rest])
    assert summary["bos"] == WHY and summary["metrics"] == ["accuracy"]
