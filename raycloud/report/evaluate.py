"""Report of an evaluation: one table with a row per set and model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raycloud.report.bos import format_bos
from raycloud.report.numbers import shown
from raycloud.report.table import print_table

_HEADER = ["set", "model", "ROUGE-L", "exact, %", "perplexity", "agree, %", "samples"]


def _spread(score: Mapping[str, float | None] | None) -> str:
    if score is None:  # plain texts contain no questions
        return ""
    sd = score["sd"]
    return f"{score['mean']:.2f}" + ("" if sd is None else f" ± {sd:.2f}")


def _rows(summary: Mapping[str, Any]) -> list[list[str]]:
    rows = [
        [
            name,
            model,
            _spread(one["rougeL"]),
            _spread(one["exact"]),
            shown(one["perplexity"], ".2f"),
            "" if one["agreement"] is None else f"{one['agreement']:.1f}",
            str(summary["questions"][name]),
        ]
        for name, models in summary["sets"].items()
        for model, one in models.items()
    ]
    if len(summary["sets"]) > 1:
        rows += [
            ["(mean of sets)", model, f"{mean:.2f}", "", "", "", ""]
            for model, mean in summary["average"].items()
            if mean is not None
        ]
    return rows


def print_evaluation(summary: Mapping[str, Any]) -> None:
    """Print the table of means ± standard deviations over the seeds."""
    seeds = len(summary["recipe"]["seeds"])
    title = f"{seeds} seed{'s' if seeds > 1 else ''}, {summary['recipe']['format']} prompts"
    print_table(_HEADER, _rows(summary), title=title, caption=format_bos(summary["bos"]), texts=2, whole=True)
