"""Diagnostics in the report of a distillation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from raycloud.data.batches import RowCounts
from raycloud.distill.diagnostics import DataDiagnostics, StepDiagnostics, StudentDiagnostics
from raycloud.report.console import console
from raycloud.report.distill import print_summary, write_page

MIN_GRADIENT_SHARE = "objective 'forward_kl' contributes only 0.2 % of the gradient; raise objective.kd_weight"


def summary() -> dict[str, Any]:
    scores = {"teacher_ppl": 10.0, "student_ppl_before": 90.0, "student_ppl_after": 20.0, "gap_closed": 0.9}
    scores |= {"agreement_before": 0.1, "agreement_after": 0.5, "kl_before": 3.0, "kl_after": 1.0}
    data = DataDiagnostics.of(RowCounts(100, 2, 1, 4), range(49_152))  # type: ignore[arg-type]
    well = StudentDiagnostics(data, (StepDiagnostics(0, {"forward_kl": 0.625, "cross_entropy": 0.375}, 3.25),), {})
    ill = StudentDiagnostics(
        replace(data, eos_mapped=False, student_specials=("<s>", "</s>")), (), {"weak": MIN_GRADIENT_SHARE}
    )
    diagnostics = {name: one.after({}) for name, one in (("store", well), ("newsroom", ill))}
    student = {
        **scores,
        "rouge_l_after": None,
        "student_params": 2_000_000,
        "teacher_tok_s": 5.0,
        "student_tok_s": 9.0,
        "objective": {"ce_weight": 0.5, "kd_weight": 1.5, "kd": {"name": "dskd", "compat": "published"}},
        "groups": {"movie": {**scores, "single_ppl": {"store": 21.0}}},
        "completions": [{"prompt": "a", "teacher": "b", "student": "c"}],
    }
    return {
        **student,
        "students": {"store": student},
        "teacher_params": 4_000_000,
        "wire_bytes_per_token": 70.0,
        "wire_bytes": {"ids": 10},
        "trained_tokens": 100,
        "rounds": 1,
        "seconds": 3.0,
        "diagnostics": {name: {**one, "warnings": list(one["warnings"].values())} for name, one in diagnostics.items()},
    }


def records(*shares: dict[str, float]) -> list[dict[str, Any]]:
    whose = {"round": 0, "student": "store"}
    return [
        {"kind": "step", "step": 0, "loss": 1.0, **whose},
        {"kind": "diagnostics", "data": {}, **whose},
        *({"kind": "diagnostics", "step": step, "shares": one, **whose} for step, one in enumerate(shares)),
    ]


def test_the_page_shows_health_by_edge(tmp_path: Path) -> None:
    write_page(tmp_path, summary(), records({"forward_kl": 0.5, "cross_entropy": 0.5}, {}), "job: distill")
    html = (tmp_path / "report.html").read_text()
    for cell in (
        "<h2>Diagnostics</h2>",
        "97",
        "4.0 %",
        "3.25 nats",
        "gradient share, cross_entropy",
        "62.5 %",
        "&lt;/s&gt;",
    ):
        assert cell in html
    assert "contributes only 0.2 % of the gradient" in html
    assert html.count("data:image/png;base64,") == 3


def test_without_measurements_the_page_has_no_curve_of_them(tmp_path: Path) -> None:
    write_page(tmp_path, summary(), records(), "job: distill")
    assert (tmp_path / "report.html").read_text().count("data:image/png;base64,") == 2


def test_warnings_are_printed_with_the_summary() -> None:
    with console.capture() as printed:
        print_summary(summary())
    assert f"warning: newsroom: {MIN_GRADIENT_SHARE}" in printed.get()
    assert "warning: store" not in printed.get()


def test_page_and_console_say_which_compat_ran(tmp_path: Path) -> None:
    write_page(tmp_path, summary(), records({}), "job: distill")
    learned = "0.5 cross_entropy + 1.5 dskd (compat published)"
    assert learned in (tmp_path / "report.html").read_text()
    with console.capture() as shown:
        print_summary(summary())
    assert "published" in shown.get()  # in lines of its own where the console is narrow
