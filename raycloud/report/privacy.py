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


_REPORT_HEADER = ["texts with the word", "word", "distances", "with means", "by chance"]


def _report_rows(summary: Summary) -> list[list[str]]:
    """Rows of an attack on reports of drift."""
    return [
        [f"{count} of {summary['window']}", word, *(f"{one[key]:.3f}" for key in ("distances", "means", "chance"))]
        for count, words in summary["areas"].items()
        for word, one in {**words, "mean": summary["mean_areas"][count]}.items()
    ]


def verdict(summary: Summary) -> str:
    """State the result of the strongest attack in one sentence."""
    if "areas" in summary:
        most = max(summary["mean_areas"], key=int)
        shown = [f"{summary['mean_areas'][most][key]:.2f}" for key in ("distances", "means", "chance")]
        return (
            f"a word in {most} of {summary['window']} texts is told with an area under the curve of {shown[0]} "
            f"from distances and {shown[1]} from means (by chance {shown[2]})"
        )
    return (
        f"the cloud recovers {_share(summary['max_input'])} of the prompt's tokens "
        f"and {_share(summary['max_output'])} of the answer's"
    )


def print_privacy(summary: Summary) -> None:
    """Print the table of all attacks and the verdict."""
    if "areas" in summary:
        print_table(_REPORT_HEADER, _report_rows(summary), title="reports of drift, area under the curve", texts=2)
        console.print(verdict(summary))
        return
    title = f"blocks {summary['start_block']} to {summary['end_block']} in the cloud, codec {summary['codec']}"
    print_table(_HEADER, _rows(summary), title=title, texts=2)
    console.print(verdict(summary))


def _split_page(summary: Summary, origin: Origin | None) -> tuple[bytes, Page]:
    """Plot and page of attacks on a split."""
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
    return plot, page


def _report_page(summary: Summary, origin: Origin | None) -> tuple[bytes, Page]:
    """Plot and page of attacks on reports of drift."""
    counts = list(summary["mean_areas"])
    labels = {"distances": "distances", "means": "with means", "chance": "by chance"}
    shares = {label: [summary["mean_areas"][count][key] for count in counts] for key, label in labels.items()}
    plot = grouped_bars([f"{count} of {summary['window']} texts" for count in counts], shares, "area under the curve")
    page = Page("Privacy of reports of drift", f"{verdict(summary).capitalize()}.", origin)
    page.text(f"{summary['model']}, words planted in texts of {summary['data']}; 0.5 is guessing")
    page.picture(plot, "area under the curve by number of texts with the word, mean over the words")
    page.table(_REPORT_HEADER, _report_rows(summary))
    return plot, page


def write_privacy(folder: Path, summary: Summary, origin: Origin | None = None) -> None:
    """Write ``privacy.json``, ``privacy.png``, ``origin.json`` and ``report.html`` as a new folder, atomically.

    Args:
        folder: folder to write or to replace.
        summary: numbers of the evaluation.
        origin: origin of the numbers; by default the one that the folder holds.
    """
    origin = origin or Origin.read(folder)
    plot, page = (_report_page if "areas" in summary else _split_page)(summary, origin)

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
