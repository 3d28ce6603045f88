"""The report of a privacy examination: the table on the console, and a folder with numbers, plot and page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from raycloud.report.console import console
from raycloud.report.page import Page
from raycloud.report.plots import grouped_bars
from raycloud.results import write_folder

Summary = Mapping[str, Any]

_ATTACKS = {
    "a0_embedding": "A0 embedding",
    "a1_plain_lens": "A1 plain lens",
    "a1_tuned_lens": "A1 tuned lens",
    "a2_ridge": "A2 linear",
    "a3_mlp": "A3 two-layer",
    "a5_matching": "A5 matching",
}
_SIDES = {"input": "prompt", "output": "answer"}
_HEADER = ["attack", "on the", "top 1", "top 5", "texts", "ROUGE-L", "secrets", "s"]


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _rows(summary: Summary) -> list[list[str]]:
    return [
        [
            label,
            of,
            *(_share(summary[side][name][key]) for key in ("top1", "top5", "exact")),
            f"{summary[side][name]['rouge_l']:.3f}",
            _share(summary[side][name]["secrets"]),
            f"{summary[side][name]['seconds']:.1f}",
        ]
        for side, of in _SIDES.items()
        for name, label in _ATTACKS.items()
        if name in summary[side]
    ]


def verdict(summary: Summary) -> str:
    """What the strongest attack means, in one sentence."""
    return (
        f"the cloud recovers {_share(summary['max_input'])} of the prompt's tokens "
        f"and {_share(summary['max_output'])} of the answer's"
    )


def print_privacy(summary: Summary) -> None:
    """The table of all attacks and the verdict."""
    title = f"blocks {summary['first']} to {summary['second']} in the cloud, {summary['codec']} wire"
    table = Table(*_HEADER, title=title, padding=(0, 0, 0, 1))
    for column in table.columns[2:]:
        column.justify = "right"
    for row in _rows(summary):
        table.add_row(*row)
    console.print(table)
    console.print(verdict(summary))


def write_privacy(folder: Path, summary: Summary) -> None:
    """Write ``privacy.json``, ``privacy.png`` and ``report.html`` into a new folder, all or nothing."""
    shares = {
        label: [100 * summary[side][name]["top1"] if name in summary[side] else math.nan for name in _ATTACKS]
        for side, label in _SIDES.items()
    }
    plot = grouped_bars(list(_ATTACKS.values()), shares, "tokens recovered, %")
    page = Page(
        "What the cloud can see",
        f"{summary['model']}, blocks {summary['first']} to {summary['second']} in the cloud, {summary['codec']} wire",
    )
    page.text(f"By the strongest attack, {verdict(summary)}.")
    page.picture(plot, "tokens recovered by attack")
    page.table(_HEADER, _rows(summary))

    def fill(scratch: Path) -> None:
        (scratch / "privacy.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        (scratch / "privacy.png").write_bytes(plot)
        (scratch / "report.html").write_text(page.html(), encoding="utf-8")

    write_folder(folder, fill)
