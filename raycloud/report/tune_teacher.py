"""Report of a teacher's fine-tuning: tables on the console and the page of the result directory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from raycloud.origin import Origin
from raycloud.report.bos import bos_lines, print_bos
from raycloud.report.numbers import shown
from raycloud.report.page import Page
from raycloud.report.plots import curves
from raycloud.report.run_files import run_files
from raycloud.report.table import print_table

Summary = dict[str, Any]
_GIB = 1 << 30


def memory_rows(rows: Iterable[tuple[str, int, int]]) -> tuple[list[str], list[list[str]]]:
    """Table in GiB from rows of (name, bytes on the device, bytes on the host)."""
    return ["GiB per worker", "device", "host"], [
        [what, f"{device / _GIB:.2f}", f"{host / _GIB:.2f}" if host else ""] for what, device, host in rows
    ]


def _headlines(summary: Summary) -> tuple[list[str], list[list[str]]]:
    before, after = summary["held_out_loss_before"], summary["held_out_loss_after"]
    rows = [
        ["held-out loss, nats per response token", shown(before, ".3f"), shown(after, ".3f")],
        ["held-out perplexity", shown(summary["ppl_before"], ".2f"), shown(summary["ppl_after"], ".2f")],
        ["response tokens trained", "", str(summary["trained_tokens"])],
        ["tokens/s, prompts and responses", "", f"{summary['tokens_per_s']:.0f}"],
        ["minutes in total", "", f"{summary['seconds'] / 60:.1f}"],
        ["parameters, trained / all", "", f"{summary['trained_params'] / 1e6:.1f} M / {summary['params'] / 1e6:.1f} M"],
        ["workers, ZeRO stage", "", f"{summary['workers']}, {summary['stage']}"],
        ["restarts", "", str(summary["restarts"])],
    ]
    return ["", "before", "after"], rows


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
    before, after = (shown(summary[f"held_out_loss_{when}"], ".3f") for when in ("before", "after"))
    verdict = (
        f"Held-out loss from {before} to {after} nats per response token, "
        f"with {summary['trained_tokens']} response tokens in {summary['seconds'] / 60:.1f} minutes."
    )
    page = Page("Fine-tuning of the teacher", verdict, Origin.read(folder))
    page.table(*_headlines(summary))
    page.text(*bos_lines(summary))
    steps = [record for record in records if record["kind"] == "step"]
    series = {
        "training": [(record["step"], record["loss"]) for record in steps],
        "held out": [(record["step"], record["held_out_loss"]) for record in records if record["kind"] == "held_out"],
    }
    starts = [record["step"] for record in records if record["kind"] == "start" and record["step"]]
    plot = curves({name: some for name, some in series.items() if some}, "step", "nats per response token", starts)
    page.picture(plot, "loss by step")
    if starts:
        page.text("Dotted lines: steps at which the run was resumed.")
    page.save(folder / "report.html", recipe)


def render(folder: Path) -> Path:
    """Write the page of a finished run again; return its path."""
    write_page(folder, *run_files(folder))
    return folder / "report.html"
