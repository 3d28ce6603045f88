"""Report of a privacy evaluation: the table on the console, and a folder with numbers, plot and page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raycloud.durable import write_folder
from raycloud.origin import ORIGIN, Origin
from raycloud.report.console import console
from raycloud.report.page import Page
from raycloud.report.plots import grouped_bars
from raycloud.report.run_files import read_summary
from raycloud.report.table import print_table
from raycloud.results import plain_json

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
_HEADER = ["attack", "target", "top 1", "top 5", "whole texts", "ROUGE-L", "secrets", "s"]


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
    """State the result of the strongest attack in one sentence."""
    return (
        f"the cloud recovers {_share(summary['max_input'])} of the prompt's tokens "
        f"and {_share(summary['max_output'])} of the answer's"
    )


def print_privacy(summary: Summary) -> None:
    """Print the table of all attacks and the verdict."""
    title = f"blocks {summary['start_block']} to {summary['end_block']} in the cloud, codec {summary['codec']}"
    print_table(_HEADER, _rows(summary), title=title, texts=2)
    console.print(verdict(summary))


def write_privacy(folder: Path, summary: Summary, origin: Origin | None = None) -> None:
    """Write ``privacy.json``, ``privacy.png``, ``origin.json`` and ``report.html`` as a new folder, atomically.

    Args:
        folder: folder to write or to replace.
        summary: numbers of the evaluation.
        origin: origin of the numbers; by default the one that the folder holds.
    """
    origin = origin or Origin.read(folder)
    shares = {
        label: [100 * summary[side][name]["top1"] if name in summary[side] else math.nan for name in _ATTACKS]
        for side, label in _SIDES.items()
    }
    plot = grouped_bars(list(_ATTACKS.values()), shares, "tokens recovered, %")
    page = Page("Privacy of the hidden states", f"With the strongest attack, {verdict(summary)}.", origin)
    page.text(
        f"{summary['model']}, blocks {summary['start_block']} to {summary['end_block']} in the cloud, "
        f"codec {summary['codec']}"
    )
    page.picture(plot, "tokens recovered by attack")
    page.table(_HEADER, _rows(summary))

    def fill(scratch: Path) -> None:
        (scratch / "privacy.json").write_text(plain_json(summary, indent=2) + "\n", encoding="utf-8")
        (scratch / "privacy.png").write_bytes(plot)
        if origin is not None:
            (scratch / ORIGIN).write_text(origin.json(), encoding="utf-8")
        (scratch / "report.html").write_text(page.html(), encoding="utf-8")

    write_folder(folder, fill)


def render(folder: Path) -> Path:
    """Write the folder of a privacy evaluation again, from its numbers; return the path of its page."""
    write_privacy(folder, read_summary(folder / "privacy.json"))
    return folder / "report.html"
