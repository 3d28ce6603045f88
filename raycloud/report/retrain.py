"""Report of block retraining: tables on the console and the page of the result directory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raycloud.origin import Origin
from raycloud.report.numbers import kilobytes, plotted, shown
from raycloud.report.page import Page
from raycloud.report.plots import curves, grouped_bars, heat_map
from raycloud.report.run_files import run_files
from raycloud.report.table import print_table

Summary = dict[str, Any]
Record = dict[str, Any]
_RESOURCES = ("flops", "memory", "bytes")


def figure_of(error: float | None, metric: str) -> float | None:
    """Figure that people read for an error: accuracy of a share of wrong predictions, perplexity of nats per token."""
    if error is None:
        return None
    return 1 - error if metric == "accuracy" else math.exp(min(error, 700.0))


def summarise(run: str, metric: str, records: Sequence[Record]) -> Summary:
    """Return the headline numbers of a run.

    Args:
        run: id of the run.
        metric: ``accuracy`` or ``perplexity``.
        records: records of ``metrics.jsonl``.
    """
    windows = [record for record in records if record["kind"] == "window"]
    rounds = [record for record in records if record["kind"] == "round"]
    start = next(record for record in records if record["kind"] == "start")
    answered = [record for record in windows if record.get("steps")]
    edges = {name: [one for one in windows if one["edge"] == name] for name in sorted({one["edge"] for one in windows})}
    merged = {(name, one["window"]): found["test_error"] for one in rounds for name, found in one["adopted"].items()}

    def mean(found: Sequence[float | None]) -> float | None:
        figures = [figure_of(one, metric) for one in found]
        known = [one for one in figures if one is not None]
        return sum(known) / len(known) if known else None

    def described(some: Sequence[Record]) -> dict[str, Any]:
        return {
            f"{metric}_before": mean([one["test_before"] for one in some]),
            f"{metric}_after": mean([one["test_after"] for one in some]),
            f"{metric}_merged": mean([merged.get((one["edge"], one["window"])) for one in some]),
        }

    shares = {
        name: max((one["paid"][name] / one["budget"][name] for one in answered if _limited(one, name)), default=None)
        for name in _RESOURCES
    }
    misses = [
        abs(one["predicted_error"] - one["held_out_after"])
        for one in answered
        if one["predicted_error"] is not None and one.get("held_out_after") is not None
    ]
    return {
        "run": run,
        "metric": metric,
        **described(windows),
        "windows": len(windows),
        "alarms": sum(one["cause"] is not None for one in windows),
        "retrained": len(answered),
        "helped": sum(bool(one.get("helped")) for one in answered),
        "recalled": sum(bool(one.get("recalled")) for one in windows),
        "over_budget": sum(bool(one.get("over_budget")) for one in answered),
        "versions": sum(one["result"] == "new_version" for one in rounds),
        "missed": sum(len(one["missed"]) for one in rounds),
        f"source_{metric}_before": figure_of(start["source_error"], metric),
        f"source_{metric}_after": figure_of((rounds[-1] if rounds else start)["source_error"], metric),
        "prediction_miss": sum(misses) / len(misses) if misses else None,
        "bytes_up": sum(one["paid"]["bytes"] for one in answered if "paid" in one),
        "largest_share": shares,
        "edges": {name: described(some) for name, some in edges.items()},
    }


def line_of(record: Record, metric: str) -> str:
    """Line about a window, for the console."""
    head = f"window {record['window'] + 1}, {record['edge']}: {record['domain']}, drift {record['score']:.1f}"
    before = shown(figure_of(record["test_before"], metric), ".4g")
    if record["cause"] is None:
        return f"{head}, no alarm; {metric} {before}"
    told = f"{head} ({record['cause']}); "
    if not record["steps"]:
        return f"{told}nothing is worth it; {metric} {before}"
    told += f"blocks {_blocks(record)} for {record['steps']} steps"
    if "helped" not in record:
        error = shown(figure_of(record["predicted_error"], metric), ".4g")
        return f"{told} would give {metric} {error} on the window (now {_now(record, metric)}); {_costs(record)}"
    after = shown(figure_of(record["test_after"], metric), ".4g")
    recalled = ", on what fitted this domain before" if record["recalled"] else ""
    kept = "" if record["helped"] else ", which did not help and was restored"
    return f"{told}{recalled}{kept}: {metric} {before} to {after}"


def _now(record: Record, metric: str) -> str:
    return shown(figure_of(record["error"], metric), ".4g")


def _costs(record: Record) -> str:
    planned = record["planned"]
    return (
        f"{planned['flops'] / 1e9:.3g} GFLOP, {planned['memory'] / 1e6:.3g} MB of memory, "
        f"{kilobytes(planned['bytes'])} kB"
    )


def _limited(record: Record, name: str) -> bool:
    limit = record["budget"][name]
    return "paid" in record and limit is not None and math.isfinite(limit) and limit > 0


def _blocks(record: Record) -> str:
    return ", ".join(map(str, record["trained"])) or "none but the head"


def _headlines(summary: Summary) -> tuple[list[str], list[list[str]]]:
    metric = summary["metric"]
    header = ["edge", "before", "after its window", "with the merged model"]
    rows = [
        [name, *(shown(edge[f"{metric}_{when}"], ".4g") for when in ("before", "after", "merged"))]
        for name, edge in {**summary["edges"], "mean": summary}.items()
    ]
    return header, rows


def _facts(summary: Summary) -> tuple[list[str], list[list[str]]]:
    metric, shares = summary["metric"], summary["largest_share"]
    counts = [[name.replace("_", " "), str(summary[name])] for name in ("windows", "alarms", "retrained", "helped")]
    counts += [
        [name.replace("_", " "), str(summary[name])] for name in ("recalled", "versions", "missed", "over_budget")
    ]
    source = [shown(summary[f"source_{metric}_{when}"], ".4g") for when in ("before", "after")]
    counts.append([f"{metric} of the source", " to ".join(source)])
    counts.append(["kB sent by edges", kilobytes(summary["bytes_up"])])
    counts += [
        [f"largest share of the budget: {name}", "no limit" if shares[name] is None else f"{shares[name]:.2f}"]
        for name in _RESOURCES
    ]
    return ["", ""], counts


def _windows(records: Sequence[Record], metric: str) -> tuple[list[str], list[list[str]]]:
    header = [
        "window",
        "edge",
        "domain",
        "drift",
        "cause",
        "blocks",
        "steps",
        "before",
        "after",
        "predicted",
        "observed",
    ]
    rows = []
    for one in records:
        answered = one["cause"] is not None
        rows.append(
            [
                str(one["window"] + 1),
                one["edge"],
                one["domain"],
                f"{one['score']:.1f}",
                (one["cause"] or "").replace("_", " "),
                _blocks(one) if answered and one["steps"] else "",
                str(one["steps"]) if answered else "",
                shown(figure_of(one["test_before"], metric), ".4g"),
                shown(figure_of(one["test_after"], metric), ".4g"),
                *("" if one.get(key) is None else f"{one[key]:.3f}" for key in ("predicted_error", "held_out_after")),
            ]
        )
    return header, rows


def _versions(rounds: Sequence[Record], metric: str) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            str(one["window"] + 1),
            one["result"].replace("_", " "),
            ", ".join(one["members"]) or "none",
            ", ".join(f"{name} ({why})" for name, why in one["missed"].items()) or "none",
            shown(figure_of(one["source_error"], metric), ".4g"),
        ]
        for one in rounds
    ]
    return ["round", "result", "merged", "missed", f"{metric} of the source"], rows


def _verdict(summary: Summary) -> str:
    metric = summary["metric"]
    before, after = (shown(summary[f"{metric}_{when}"], ".4g") for when in ("before", "after"))
    return (
        f"Mean {metric} of the windows {before} before and {after} after retraining; {summary['alarms']} alarms in "
        f"{summary['windows']} windows, {summary['helped']} of {summary['retrained']} retrainings helped, "
        f"{summary['over_budget']} went over budget."
    )


def print_summary(summary: Summary) -> None:
    """Print the headline numbers."""
    print_table(*_headlines(summary), title=f"Test {summary['metric']}, mean over windows")
    print_table(*_facts(summary))


def write_page(folder: Path, summary: Summary, records: Sequence[Record], recipe: str) -> None:
    """Write ``report.html``.

    Args:
        folder: result directory.
        summary: headline numbers of the run.
        records: records of ``metrics.jsonl``.
        recipe: recipe as YAML.
    """
    metric = summary["metric"]
    windows = [record for record in records if record["kind"] == "window"]
    rounds = [record for record in records if record["kind"] == "round"]
    blocks = next(record["blocks"] for record in records if record["kind"] == "start")
    page = Page("Block retraining", _verdict(summary), Origin.read(folder))
    page.table(*_headlines(summary))
    page.table(*_facts(summary))
    page.heading("Windows")
    page.table(*_windows(windows, metric), prose=True)
    by_edge = {name: [one for one in windows if one["edge"] == name] for name in summary["edges"]}
    page.picture(
        curves(
            {name: [(one["window"] + 1, one["score"]) for one in some] for name, some in by_edge.items()},
            "window",
            "drift, deviations of clean windows",
        ),
        "drift by window",
    )
    page.heading("Accuracy" if metric == "accuracy" else "Perplexity")
    page.picture(_figures(by_edge, rounds, metric), f"test {metric} by window")
    answered = [one for one in windows if one.get("steps")]
    if answered:
        page.heading("Chosen blocks")
        names = [f"{one['edge']} {one['window'] + 1}" for one in answered]
        chosen = [[float(block in one["trained"]) for one in answered] for block in range(blocks)]
        page.picture(heat_map(list(map(str, range(blocks))), names, chosen, "block"), "chosen blocks by window")
        page.heading("Predicted and observed error")
        page.picture(_predictions(names, answered), "predicted and observed error of windows")
        page.heading("Budget used")
        page.picture(_used(names, answered), "share of the budget by window")
    page.heading("Versions")
    page.table(*_versions(rounds, metric), prose=True)
    page.save(folder / "report.html", recipe)


def _figures(by_edge: Mapping[str, Sequence[Record]], rounds: Sequence[Record], metric: str) -> bytes:
    merged = {(name, one["window"]): found["test_error"] for one in rounds for name, found in one["adopted"].items()}
    series: dict[str, list[tuple[float, float | None]]] = {}
    for name, some in by_edge.items():
        for key, label in (("test_before", "before"), ("test_after", "after its window")):
            series[f"{name}, {label}"] = [(one["window"] + 1, figure_of(one[key], metric)) for one in some]
        series[f"{name}, merged"] = [
            (one["window"] + 1, figure_of(merged.get((name, one["window"])), metric)) for one in some
        ]
    return curves(series, "window", f"test {metric}")


def _predictions(names: Sequence[str], answered: Sequence[Record]) -> bytes:
    keys = {"before": "error", "predicted": "predicted_error", "observed on held-out samples": "held_out_after"}
    return grouped_bars(
        names,
        {label: [plotted(one.get(key)) for one in answered] for label, key in keys.items()},
        "error",
        fmt="%.2f",
    )


def _used(names: Sequence[str], answered: Sequence[Record]) -> bytes:
    shares = {
        name: [100 * one["paid"][name] / one["budget"][name] if _limited(one, name) else math.nan for one in answered]
        for name in _RESOURCES
    }
    return grouped_bars(names, shares, "share of the budget, %")


def render(folder: Path) -> Path:
    """Write the page of a finished run again; return its path."""
    summary, records, recipe = run_files(folder)
    write_page(folder, summary, records, recipe)
    return folder / "report.html"
