"""The report of split fine-tuning: the headline numbers on the console, and the page of the result directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raycloud.report.page import Page
from raycloud.report.plots import curves
from raycloud.report.teacher import print_table
from raycloud.results import write_atomically

Summary = dict[str, Any]

_BEFORE = "_before"
_NAMED = {
    "first_cut_bytes_per_step": "kB of a step at the first cut",
    "second_cut_bytes_per_step": "kB of a step at the second cut",
    "bytes_per_step": "kB of a step in all",
    "bytes_up_per_step": "of these to the cloud",
    "bytes_down_per_step": "of these to the edge",
    "seconds_per_step": "seconds of a step",
    "edge_seconds_per_step": "of these the edge computed",
    "cloud_seconds_per_step": "seconds that the cloud computed",
    "link_seconds_per_step": "seconds that the busier direction of the link was",
    "waiting_seconds_per_step": "seconds that the edge waited for cloud and link",
}


def _headlines(summary: Summary) -> tuple[list[str], list[list[str]]]:
    metrics = [name.removesuffix(_BEFORE) for name in summary if name.endswith(_BEFORE)]
    rows = [[f"held-out {name}", f"{summary[name + _BEFORE]:.4g}", f"{summary[name]:.4g}"] for name in metrics]
    rows += [[name.replace("_", " "), "", str(summary[name])] for name in ("steps", "train_texts", "held_out_texts")]
    for name, told in _NAMED.items():
        if name not in summary:
            continue
        shown = f"{summary[name] / 1e3:,.1f}" if "bytes" in name else f"{summary[name]:,.3f}"
        rows.append([told, "", shown])
    return ["", "before", "after"], rows


def print_summary(summary: Summary) -> None:
    """The headline numbers."""
    print_table(*_headlines(summary))


def write_page(folder: Path, summary: Summary, records: Sequence[dict[str, Any]], recipe: str) -> None:
    """Write ``report.html``.

    Args:
        folder: the result directory.
        summary: its headline numbers.
        records: of ``metrics.jsonl``.
        recipe: as YAML.
    """
    page = Page("Fine-tuned across a cut", folder.name)
    page.table(*_headlines(summary))
    steps = [record for record in records if "loss" in record]
    skipped = [record["step"] for record in steps if record["skipped"]]
    loss = [(record["step"], record["loss"]) for record in steps if not record["skipped"]]
    page.picture(curves({"training": loss}, "step", "loss per label", skipped), "loss by step")
    if skipped:
        page.text("Dotted: steps that both sides skipped, as gradients were not finite.")
    page.heading("Recipe")
    page.preformatted(recipe)
    write_atomically(folder / "report.html", page.html())
