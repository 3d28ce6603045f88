"""The report of a search: its variants in a table, a plot and a page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from raycloud.report.console import console
from raycloud.report.page import Page
from raycloud.report.plots import fronts, points
from raycloud.results import write_atomically

Summary = Mapping[str, Any]


def _spread(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return ""
    return f"{one['mean']:.4g}" + ("" if one["deviation"] is None else f" ± {one['deviation']:.2g}")


def _sorted(summary: Summary) -> list[Mapping[str, Any]]:
    """The best one by the first metric first, those without it last."""
    first = summary["metrics"][0]
    sign = 1 if first["direction"] == "min" else -1

    def key(variant: Mapping[str, Any]) -> tuple[bool, float]:
        found = variant["metrics"][first["name"]]
        return found is None, sign * found["mean"] if found else 0.0

    return sorted(summary["variants"], key=key)


def _means(summary: Summary) -> tuple[list[str], list[list[str]]]:
    names = [metric["name"] for metric in summary["metrics"]]
    rows = []
    for variant in _sorted(summary):
        seconds = variant.get("seconds")
        rows.append(
            [
                variant["name"],
                *(_spread(variant["metrics"][name]) for name in names),
                "" if variant["reference"] else str(len(variant["seeds"])),
                "" if seconds is None else f"{seconds:.0f}",
            ]
        )
    return ["", *names, "seeds", "s"], rows


def _paired(summary: Summary) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            variant["name"],
            score,
            f"{one['difference']:+.4f}",
            f"{one['low']:+.4f} to {one['high']:+.4f}",
            f"{one['p']:.2g}",
            str(one["texts"]),
        ]
        for variant in _sorted(summary)
        for score, one in variant.get("paired", {}).items()
    ]
    return [f"minus {summary['baseline']}", "per token", "mean", "95 % interval", "p", "texts"], rows


def _front(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """The variants on the front, numbered, the best one by the first metric first."""
    names = [metric["name"] for metric in summary["metrics"]]
    chosen = [variant for variant in _sorted(summary) if variant["name"] in summary.get("front", ())]
    rows = [
        [f"{number}: {variant['name']}", *(_spread(variant["metrics"][name]) for name in names)]
        for number, variant in enumerate(chosen, 1)
    ]
    return ["Pareto front", *names], rows


def _front_plot(summary: Summary) -> bytes:
    names = [metric["name"] for metric in summary["metrics"]]
    shown = [
        variant
        for variant in _sorted(summary)
        if not variant["reference"] and all(variant["metrics"][name] for name in names)
    ]
    values = {name: [variant["metrics"][name]["mean"] for variant in shown] for name in names}
    chosen = [place for place, variant in enumerate(shown) if variant["name"] in summary.get("front", ())]
    return fronts([variant["name"] for variant in shown], values, chosen)


def _stopped(summary: Summary) -> list[list[str]]:
    names = [metric["name"] for metric in summary["metrics"]]
    return [
        [variant["name"], str(one["seed"]), str(one["step"]), *(_number(one["metrics"].get(name)) for name in names)]
        for variant in summary["variants"]
        for one in variant.get("stopped", ())
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _failures(summary: Summary) -> list[list[str]]:
    return [
        [variant["name"], str(one["seed"]), one["error"]]
        for variant in summary["variants"]
        for one in variant.get("failed", ())
    ]


def print_comparison(summary: Summary) -> None:
    """The tables, and the trials that failed."""
    for header, rows in (_means(summary), _front(summary), _paired(summary)):
        if rows:
            table = Table(*header, padding=(0, 0, 0, 1))
            table.columns[0].overflow = "fold"
            for column in table.columns[1:]:
                column.justify = "right"
            for row in rows:
                table.add_row(*row)
            console.print(table)
    for name, seed, step, *_ in _stopped(summary):
        console.print(f"stopped at {step}: {name} (seed {seed})")
    for name, seed, error in _failures(summary):
        console.print(f"failed: {name} (seed {seed}): {error}")
    if summary["best"] is not None:
        console.print(f"best {summary['metrics'][0]['name']}: {summary['best']}")


def write_comparison(folder: Path, summary: Summary, recipe: str) -> None:
    """Write ``comparison.png``, ``front.png`` where there is a front, ``comparison.html`` and, last, ``summary.json``.

    Args:
        folder: the directory of the search.
        summary: the comparison.
        recipe: of one of the trials, as YAML.
    """
    page = Page("Comparison", f"{folder.name}: {summary['trials']} trials, {summary['failed']} of them failed")
    ranked, names = _sorted(summary), [metric["name"] for metric in summary["metrics"]]
    panels = {
        metric["name"]: [
            (found["mean"], found["deviation"] or 0.0) if (found := variant["metrics"][metric["name"]]) else None
            for variant in ranked
        ]
        for metric in summary["metrics"]
    }
    panels = {name: values for name, values in panels.items() if any(values)}
    if panels:
        plot = points([variant["name"] for variant in ranked], panels)
        write_atomically(folder / "comparison.png", plot)
        page.picture(plot, "means by variant")
    page.table(*_means(summary))
    page.text("Means ± standard deviations over the seeds.")
    header, rows = _paired(summary)
    if rows:
        page.heading("Text by text")
        page.table(header, rows)
        page.text(
            "Differences of each variant, averaged over its seeds, from the baseline on the same held-out texts: "
            "bootstrap interval of the mean, Wilcoxon's signed-rank test of each comparison by itself."
        )
    if summary.get("front", ()):
        page.heading("Pareto front")
        plot = _front_plot(summary)
        write_atomically(folder / "front.png", plot)
        page.picture(plot, f"{names[0]} against the other metrics")
        page.table(*_front(summary))
        page.text("No other variant is at least as good in all of these and better in one.")
    stopped = _stopped(summary)
    if stopped:
        page.heading("Stopped at a rung")
        page.table(["variant", "seed", "step", *names], stopped)
        page.text("Numbers of the rung, which do not compare with those of whole trials.")
    failures = _failures(summary)
    if failures:
        page.heading("Failed trials")
        page.table(["variant", "seed", "why"], failures, prose=True)
    page.heading("Recipe of the first trial")
    page.preformatted(recipe)
    write_atomically(folder / "comparison.html", page.html())
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
