"""Report of split fine-tuning: headline numbers on the console, and the page of the result directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raycloud.origin import Origin
from raycloud.report import split_tune_edges
from raycloud.report.bos import bos_lines, print_bos
from raycloud.report.numbers import kilobytes, shown
from raycloud.report.page import Page
from raycloud.report.plots import curves
from raycloud.report.run_files import run_files
from raycloud.report.table import print_table

Summary = dict[str, Any]

_BEFORE = "_before"
_NAMED = {
    "first_cut_bytes_per_step": "kB per step at the first cut",
    "second_cut_bytes_per_step": "kB per step at the second cut",
    "bytes_per_step": "kB per step in total",
    "bytes_up_per_step": "kB per step to the cloud",
    "bytes_down_per_step": "kB per step to the edge",
    "seconds_per_step": "seconds per step",
    "edge_seconds_per_step": "seconds per step of computing at the edge",
    "cloud_seconds_per_step": "seconds per step of computing in the cloud",
    "link_seconds_per_step": "seconds per step of the link's busier direction",
    "waiting_seconds_per_step": "seconds per step of waiting for cloud and link",
}


def _headlines(summary: Summary) -> tuple[list[str], list[list[str]]]:
    metrics = [name.removesuffix(_BEFORE) for name in summary if name.endswith(_BEFORE)]
    rows = [
        [f"held-out {name}", shown(summary[name + _BEFORE], ".4g"), shown(summary[name], ".4g")] for name in metrics
    ]
    rows += [[name.replace("_", " "), "", str(summary[name])] for name in ("steps", "train_texts", "held_out_texts")]
    for name, label in _NAMED.items():
        if name not in summary:
            continue
        number = kilobytes(summary[name]) if "bytes" in name else f"{summary[name]:,.3f}"
        rows.append([label, "", number])
    return ["", "before", "after"], rows


def _verdict(summary: Summary) -> str:
    """State in one sentence what training changed, and what a step sent over the link."""
    changes = [
        f"held-out {name} from {shown(summary[name + _BEFORE], '.4g')} to {shown(summary[name], '.4g')}"
        for name in (key.removesuffix(_BEFORE) for key in summary if key.endswith(_BEFORE))
    ]
    sent = summary.get("bytes_per_step")
    label = ", ".join(changes) + f" in {summary['steps']} steps" + ("" if sent is None else f" of {kilobytes(sent)} kB")
    return f"{label[:1].upper()}{label[1:]}."


def print_summary(summary: Summary) -> None:
    """Print the headline numbers."""
    print_table(*_headlines(summary))
    print_bos(summary)


def write_page(folder: Path, summary: Summary, records: Sequence[dict[str, Any]], recipe: str) -> None:
    """Write ``report.html``.

    Args:
        folder: result directory.
        summary: headline numbers of the run.
        records: records of ``metrics.jsonl``.
        recipe: recipe as YAML.
    """
    page = Page("Split fine-tuning", _verdict(summary), Origin.read(folder))
    page.table(*_headlines(summary))
    page.text(*bos_lines(summary))
    steps = [record for record in records if "loss" in record]
    skipped = [record["step"] for record in steps if record["skipped"]]
    loss = [(record["step"], record["loss"]) for record in steps if not record["skipped"]]
    page.picture(curves({"training": loss}, "step", "loss per label", skipped), "loss by step")
    if skipped:
        page.text("Dotted lines: steps that edge and cloud skipped because gradients were not finite.")
    page.save(folder / "report.html", recipe)


def render(folder: Path) -> Path:
    """Write the page of a finished run again, of one edge or of several; return its path."""
    summary, records, recipe = run_files(folder)
    write = split_tune_edges.write_page if "edges" in summary else write_page
    write(folder, summary, records, recipe)
    return folder / "report.html"
