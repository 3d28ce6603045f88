"""The report of a teacher's fine-tuning: tables on the console and the page of the result directory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from raycloud.report.console import console
from raycloud.report.page import Page
from raycloud.report.plots import curves
from raycloud.results import write_atomically

Summary = dict[str, Any]
_GIB = 1 << 30


def memory_rows(rows: Iterable[tuple[str, int, int]]) -> tuple[list[str], list[list[str]]]:
    """What, on the device, on the host, in bytes, as a table in GiB."""
    return ["of each worker, GiB", "device", "host"], [
        [what, f"{device / _GIB:.2f}", f"{host / _GIB:.2f}" if host else ""] for what, device, host in rows
    ]


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table whose first column names the rows."""
    table = Table(*header, padding=(0, 0, 0, 1))
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _headlines(summary: Summary) -> tuple[list[str], list[list[str]]]:
    before, after = summary["held_out_loss_before"], summary["held_out_loss_after"]
    rows = [
        ["held-out loss, nats per response token", f"{before:.3f}", f"{after:.3f}"],
        ["held-out perplexity", f"{summary['ppl_before']:.2f}", f"{summary['ppl_after']:.2f}"],
        ["response tokens trained", "", str(summary["trained_tokens"])],
        ["tokens/s, prompts and responses", "", f"{summary['tokens_per_s']:.0f}"],
        ["minutes in all", "", f"{summary['seconds'] / 60:.1f}"],
        ["parameters, trained / all", "", f"{summary['trained_params'] / 1e6:.1f} M / {summary['params'] / 1e6:.1f} M"],
        ["workers, ZeRO stage", "", f"{summary['workers']}, {summary['stage']}"],
        ["started again", "", str(summary["restarts"])],
    ]
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
    page = Page("Teacher, fine-tuned", folder.name)
    page.table(*_headlines(summary))
    steps = [record for record in records if record["kind"] == "step"]
    series = {
        "training": [(record["step"], record["loss"]) for record in steps],
        "held out": [(record["step"], record["held_out_loss"]) for record in records if record["kind"] == "held_out"],
    }
    starts = [record["step"] for record in records if record["kind"] == "start" and record["step"]]
    plot = curves({name: some for name, some in series.items() if some}, "step", "nats per response token", starts)
    page.picture(plot, "loss by step")
    if starts:
        page.text("Dotted: steps at which the run was taken up again.")
    page.heading("Recipe")
    page.preformatted(recipe)
    write_atomically(folder / "report.html", page.html())
