"""The report of edges that fine-tuned together: what each can do before, alone and together, and how rounds went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from raycloud.report.page import Page
from raycloud.report.plots import curves
from raycloud.report.teacher import print_table
from raycloud.results import write_atomically

Summary = dict[str, Any]
_WHEN = ("before", "alone", "together")
_ABOUT = ("kind", "edge", "what", "train_texts", "held_out_texts", "bytes_per_step")
"""Of the record of an examination, what is no metric."""


def summarise(run_id: str, names: Sequence[str], records: Sequence[dict[str, Any]]) -> Summary:
    """The headline numbers of a run.

    Args:
        run_id: the run's.
        names: of the edges, in the order of the table.
        records: of its ``metrics.jsonl``.

    Returns:
        ``edges``: by name its texts, its metrics ``before``, ``alone`` and ``together`` (null where it was not
        examined), bytes of a step, and of its own weights in a round both ways. ``rounds``: for each who was averaged
        and who was missed, and why. ``metrics``: their names; means over the edges that were examined stand at the top,
        such as ``accuracy_before`` and ``accuracy``.
    """
    edges: dict[str, Any] = {name: dict.fromkeys(_WHEN) for name in names}
    for record in records:
        edge = edges[record["edge"]]
        if record["kind"] == "judged":
            edge[record["what"]] = {name: value for name, value in record.items() if name not in _ABOUT}
            edge |= {name: record[name] for name in _ABOUT[3:] if name in record}
        elif record["kind"] == "meeting" and record["round"]:
            edge["bytes_per_round"] = max(record["sent"] + record["received"], edge.get("bytes_per_round", 0))
    metrics = next((list(edge["before"]) for edge in edges.values() if edge["before"]), [])
    means = {
        metric + ("" if when == "together" else f"_{when}"): fmean(edge[when][metric] for edge in examined)
        for metric in metrics
        for when in _WHEN
        if (examined := [edge for edge in edges.values() if edge[when]])
    }
    return {"run": run_id, "metrics": metrics, **means, "edges": edges, "rounds": rounds_of(records)}


def rounds_of(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each round once, as whoever took part in it told; an edge that is known to have died did not just stay away."""
    rounds: dict[int, dict[str, Any]] = {}
    died: set[str] = set()
    for record in records:
        if record["kind"] == "died":
            died.add(record["edge"])
        elif record["kind"] == "meeting":
            if record["round"] not in rounds:
                missed = {name: "died" if name in died else why for name, why in record["missed"].items()}
                rounds[record["round"]] = {"round": record["round"], "members": record["members"], "missed": missed}
            died.discard(record["edge"])  # it is back
    return [rounds[number] for number in sorted(rounds) if number]


def _accuracies(summary: Summary) -> tuple[list[str], list[list[str]]]:
    alone = any(edge["alone"] for edge in summary["edges"].values())
    when = [one for one in _WHEN if one != "alone" or alone]
    rows = [
        [f"{name}: held-out {metric}", *(f"{edge[one][metric]:.4g}" if edge[one] else "-" for one in when)]
        for metric in summary["metrics"]
        for name, edge in summary["edges"].items()
    ]
    if len(summary["edges"]) > 1:
        for metric in summary["metrics"]:
            means = [summary.get(metric + ("" if one == "together" else f"_{one}")) for one in when]
            rows.append([f"mean of the edges: {metric}", *("-" if one is None else f"{one:.4g}" for one in means)])
    return ["", *when], rows


def _sizes(summary: Summary) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name, edge in summary["edges"].items():
        texts = [str(edge.get(key, "-")) for key in ("train_texts", "held_out_texts")]
        sizes = [edge.get("bytes_per_step"), edge.get("bytes_per_round")]
        rows.append([name, *texts, *("-" if size is None else f"{size / 1e3:,.1f}" for size in sizes)])
    return ["edge", "texts", "held out", "kB of a step", "kB of its weights in a round"], rows


def _rounds(summary: Summary) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            str(one["round"]),
            ", ".join(one["members"]),
            ", ".join(f"{name} ({why})" for name, why in one["missed"].items()) or "nobody",
        ]
        for one in summary["rounds"]
    ]
    return ["round", "averaged", "missed"], rows


def print_summary(summary: Summary) -> None:
    """The headline numbers."""
    for header, rows in (_accuracies(summary), _rounds(summary)):
        print_table(header, rows)


def write_page(folder: Path, summary: Summary, records: Sequence[dict[str, Any]], recipe: str) -> None:
    """Write ``report.html``.

    Args:
        folder: the result directory.
        summary: its headline numbers.
        records: of ``metrics.jsonl``.
        recipe: as YAML.
    """
    page = Page("Fine-tuned across a cut, together", folder.name)
    page.table(*_accuracies(summary))
    page.heading("Rounds")
    page.table(*_rounds(summary), prose=True)
    page.text("Late: no work within the deadline. Absent: no session with the cloud. Died: its process did.")
    page.table(*_sizes(summary))
    steps = [record for record in records if record["kind"] == "step" and not record["skipped"]]
    for what in _WHEN[1:]:
        series: dict[str, list[tuple[int, float]]] = {}
        for record in steps:
            if record["what"] == what:
                series.setdefault(record["edge"], []).append((record["step"], record["loss"]))
        if series:
            page.picture(curves(series, "step", f"loss per label, {what}"), f"loss by step, {what}")
    page.heading("Recipe")
    page.preformatted(recipe)
    write_atomically(folder / "report.html", page.html())
