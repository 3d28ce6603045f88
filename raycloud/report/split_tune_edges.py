"""Report of split fine-tuning by several edges: metrics before, alone and together, and the rounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from raycloud.origin import Origin
from raycloud.report.bos import bos_lines, print_bos
from raycloud.report.numbers import kilobytes, plotted, shown
from raycloud.report.page import Page
from raycloud.report.plots import curves
from raycloud.report.table import print_table

Summary = dict[str, Any]
_WHEN = ("before", "alone", "together")
_NO_METRICS = ("kind", "edge", "what", "bos", "rows", "train_texts", "held_out_texts", "bytes_per_step")
"""Keys of an evaluation's record that are not metrics."""


def summarise(run_id: str, names: Sequence[str], records: Sequence[dict[str, Any]]) -> Summary:
    """Compute the headline numbers of a run.

    Args:
        run_id: id of the run.
        names: names of the edges, in the order of the table.
        records: records of ``metrics.jsonl``.

    Returns:
        ``run``: the id. ``edges``: for each edge by name, its numbers of texts, its metrics ``before``, ``alone`` and
        ``together`` (null if not evaluated), the bytes of a step, and the bytes of its own weights in a round, both
        ways. ``rounds``: for each round, which edges were averaged, and which were missed and why. ``metrics``: names
        of the metrics. Means over the evaluated edges are at the top level, such as ``accuracy_before`` and
        ``accuracy``. ``bos``: whether texts begin with BOS, if an edge reported it.
    """
    edges: dict[str, Any] = {name: dict.fromkeys(_WHEN) for name in names}
    for record in records:
        edge = edges[record["edge"]]
        if record["kind"] == "evaluation":
            edge[record["what"]] = {name: value for name, value in record.items() if name not in _NO_METRICS}
            edge |= {name: record[name] for name in _NO_METRICS[4:] if name in record}
        elif record["kind"] == "round" and record["round"]:
            edge["bytes_per_round"] = max(record["sent"] + record["received"], edge.get("bytes_per_round", 0))
    metrics = next((list(edge["before"]) for edge in edges.values() if edge["before"]), [])
    means = {
        metric + ("" if when == "together" else f"_{when}"): fmean(plotted(edge[when][metric]) for edge in evaluated)
        for metric in metrics
        for when in _WHEN
        if (evaluated := [edge for edge in edges.values() if edge[when]])
    }
    whole = {"run": run_id, "metrics": metrics, **means, "edges": edges, "rounds": collect_rounds(records)}
    bos = next((record["bos"] for record in records if "bos" in record), None)  # the same for all: they share one model
    return whole if bos is None else {**whole, "bos": bos}


def collect_rounds(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Collect each round once, from the record of any member; an edge that died is reported as died, not as absent."""
    rounds: dict[int, dict[str, Any]] = {}
    died: set[str] = set()
    for record in records:
        if record["kind"] == "died":
            died.add(record["edge"])
        elif record["kind"] == "round":
            if record["round"] not in rounds:
                missed = {name: "died" if name in died else why for name, why in record["missed"].items()}
                rounds[record["round"]] = {"round": record["round"], "members": record["members"], "missed": missed}
            died.discard(record["edge"])  # the edge has reconnected
    return [rounds[number] for number in sorted(rounds) if number]


def _accuracies(summary: Summary) -> tuple[list[str], list[list[str]]]:
    alone = any(edge["alone"] for edge in summary["edges"].values())
    when = [one for one in _WHEN if one != "alone" or alone]
    rows = [
        [f"{name}: held-out {metric}", *(shown(edge[one][metric], ".4g") if edge[one] else "-" for one in when)]
        for metric in summary["metrics"]
        for name, edge in summary["edges"].items()
    ]
    if len(summary["edges"]) > 1:
        for metric in summary["metrics"]:
            keys = [metric + ("" if one == "together" else f"_{one}") for one in when]
            means = [shown(summary[key], ".4g") if key in summary else "-" for key in keys]
            rows.append([f"mean of the edges: {metric}", *means])
    return ["", *when], rows


def _sizes(summary: Summary) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name, edge in summary["edges"].items():
        texts = [str(edge.get(key, "-")) for key in ("train_texts", "held_out_texts")]
        sizes = [edge.get("bytes_per_step"), edge.get("bytes_per_round")]
        rows.append([name, *texts, *("-" if size is None else kilobytes(size) for size in sizes)])
    return ["edge", "training texts", "held-out texts", "kB per step", "kB of weights per round"], rows


def _rounds(summary: Summary) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            str(one["round"]),
            ", ".join(one["members"]),
            ", ".join(f"{name} ({why})" for name, why in one["missed"].items()) or "none",
        ]
        for one in summary["rounds"]
    ]
    return ["round", "averaged", "missed"], rows


def _verdict(summary: Summary) -> str:
    """State in one sentence what training together changed, as means over the edges."""
    changes = [
        f"{metric} from {shown(summary[f'{metric}_before'], '.4g')} to {shown(summary[metric], '.4g')}"
        for metric in summary["metrics"]
        if metric in summary and f"{metric}_before" in summary
    ]
    missed = sum(bool(one["missed"]) for one in summary["rounds"])
    means = f"Mean over the edges, held-out {', '.join(changes)}; " if changes else ""
    return f"{means}{len(summary['rounds'])} rounds, {missed} of them without all edges."


def print_summary(summary: Summary) -> None:
    """Print the headline numbers."""
    for header, rows in (_accuracies(summary), _rounds(summary)):
        print_table(header, rows)
    print_bos(summary)


def write_page(folder: Path, summary: Summary, records: Sequence[dict[str, Any]], recipe: str) -> None:
    """Write ``report.html``.

    Args:
        folder: result directory.
        summary: headline numbers of the run.
        records: records of ``metrics.jsonl``.
        recipe: recipe as YAML.
    """
    page = Page("Split fine-tuning by several edges", _verdict(summary), Origin.read(folder))
    page.table(*_accuracies(summary))
    page.text(*bos_lines(summary))
    page.heading("Rounds")
    page.table(*_rounds(summary), prose=True)
    page.text("Late: no weights within the deadline. Absent: no session with the cloud. Died: the process ended.")
    page.table(*_sizes(summary))
    steps = [record for record in records if record["kind"] == "step" and not record["skipped"]]
    for what in _WHEN[1:]:
        series: dict[str, list[tuple[int, float]]] = {}
        for record in steps:
            if record["what"] == what:
                series.setdefault(record["edge"], []).append((record["step"], record["loss"]))
        if series:
            page.picture(curves(series, "step", f"loss per label, {what}"), f"loss by step, {what}")
    page.save(folder / "report.html", recipe)
