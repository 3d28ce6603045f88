"""Report of a device that took part in a job, on the console."""

from __future__ import annotations

from typing import Any

from raycloud.report.console import console
from raycloud.report.numbers import shown
from raycloud.report.table import print_table


def print_learnt(summary: dict[str, Any]) -> None:
    """Print the rounds of a device, what it sent and received, and where its model is."""
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
    title = f"'{summary['device']}' in job '{summary['job']}'"
    print_table(["round", "contribution", "tokens", "last loss", "seconds"], rows, title=title, texts=2)
    up, down = summary["bytes_up"] / 1e6, summary["bytes_down"] / 1e6
    console.print(f"{up:,.1f} MB sent, {down:,.1f} MB received in {summary['seconds']:.0f} s")
    if summary["student"] is not None:
        console.print(f"model: {summary['student']}")
