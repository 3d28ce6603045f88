"""The report of an evaluation: one table, a row for every set and model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from raycloud.report.console import console

_HEADER = ["set", "model", "ROUGE-L", "exact, %", "perplexity", "agree, %", "rows"]


def _spread(score: Mapping[str, float | None]) -> str:
    sd = score["sd"]
    return f"{score['mean']:.2f}" + ("" if sd is None else f" ± {sd:.2f}")


def _rows(summary: Mapping[str, Any]) -> list[list[str]]:
    rows = [
        [
            name,
            model,
            _spread(one["rougeL"]),
            _spread(one["exact"]),
            f"{one['perplexity']:.2f}",
            "" if one["agreement"] is None else f"{one['agreement']:.1f}",
            str(summary["questions"][name]),
        ]
        for name, models in summary["sets"].items()
        for model, one in models.items()
    ]
    if len(summary["sets"]) > 1:
        rows += [["(mean of sets)", model, f"{mean:.2f}", "", "", "", ""] for model, mean in summary["average"].items()]
    return rows


def print_evaluation(summary: Mapping[str, Any]) -> None:
    """The table: means ± standard deviations over the seeds."""
    seeds = len(summary["recipe"]["seeds"])
    table = Table(
        *_HEADER,
        title=f"{seeds} seed{'s' if seeds > 1 else ''}, {summary['recipe']['format']} prompts",
        padding=(0, 0, 0, 1),
    )
    for column in table.columns[:2]:
        column.overflow = "fold"
    for column in table.columns[2:]:
        column.justify, column.no_wrap = "right", True
    for row in _rows(summary):
        table.add_row(*row)
    console.print(table)
