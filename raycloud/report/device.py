"""Report of a device that took part in a job, on the console."""

from __future__ import annotations

from typing import Any

from raycloud.report.console import console
from raycloud.report.numbers import shown
from raycloud.report.table import print_table


def print_learnt(summary: dict[str, Any]) -> None:
    """Print what a device did in a job, what it sent and received, and where its model is."""
    if "phases" in summary:
        _print_phases(summary)
    elif "windows" in summary:
        _print_windows(summary)
    else:
        _print_rounds(summary)
    up, down = summary["bytes_up"] / 1e6, summary["bytes_down"] / 1e6
    console.print(f"{up:,.1f} MB sent, {down:,.1f} MB received in {summary['seconds']:.0f} s")
    if (model := summary.get("student") or summary.get("weights") or summary.get("model")) is not None:
        console.print(f"model: {model}")


def _title(summary: dict[str, Any]) -> str:
    return f"'{summary['device']}' in job '{summary['job']}'"


def _print_rounds(summary: dict[str, Any]) -> None:
    """Print the rounds of a distillation."""
    rows = [
        [
            str(one["round"] + 1),
            "accepted" if one["accepted"] else f"refused ({one['reason']})",
            str(one["tokens"]),
            shown(one["loss"], ".3f"),
            f"{one['seconds']:.1f}",
        ]
        for one in summary["rounds"]
    ]
    header = ["round", "contribution", "tokens", "last loss", "seconds"]
    print_table(header, rows, title=_title(summary), texts=2)


def _print_windows(summary: dict[str, Any]) -> None:
    """Print the windows of a block retraining."""
    rows = [
        [
            str(one["window"] + 1),
            one["domain"],
            f"{one['score']:.1f}",
            (one["cause"] or "").replace("_", " "),
            ", ".join(map(str, one.get("trained", []))),
            str(one.get("steps", "")),
            {True: "helped", False: "restored", None: ""}[one.get("helped")],
            shown(one["test_before"], ".3f"),
            shown(one["test_after"], ".3f"),
        ]
        for one in summary["windows"]
    ]
    header = ["window", "domain", "drift", "alarm", "blocks", "steps", "result", "test error before", "after"]
    print_table(header, rows, title=_title(summary), texts=2)


def _print_phases(summary: dict[str, Any]) -> None:
    """Print the metrics of a split fine-tuning's phases, and in how many rounds the device was counted."""
    names = list(dict.fromkeys(name for metrics in summary["phases"].values() for name in metrics))
    rows = [
        [what, *(shown(metrics[name], ".4g") if name in metrics else "-" for name in names)]
        for what, metrics in summary["phases"].items()
    ]
    print_table(["", *(name.replace("_", " ") for name in names)], rows, title=_title(summary))
    console.print(f"counted in {summary['counted']} of {len(summary['rounds'])} rounds")
