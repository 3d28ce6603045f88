"""Report of a search: its variants in a table, a plot and a page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raycloud.durable import write_atomically
from raycloud.errors import ResultError
from raycloud.origin import Origin
from raycloud.recipe import read_yaml
from raycloud.report.console import console
from raycloud.report.page import Page
from raycloud.report.plots import pareto_plot, points
from raycloud.report.run_files import read_summary
from raycloud.report.runs import ROWS
from raycloud.report.table import print_table
from raycloud.results import RECIPE, SUMMARY, plain_json, read_records
from raycloud.yaml12 import dump

Summary = Mapping[str, Any]


def _spread(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return ""
    return f"{one['mean']:.4g}" + ("" if one["deviation"] is None else f" ± {one['deviation']:.2g}")


def _sorted(summary: Summary) -> list[Mapping[str, Any]]:
    """Sort variants by the first metric, best first; variants without it for every seed come last."""
    first = summary["metrics"][0]
    sign = 1 if first["direction"] == "min" else -1

    def key(variant: Mapping[str, Any]) -> tuple[bool, float]:
        found = variant["metrics"][first["name"]]
        return found is None or bool(variant.get("diverged")), sign * found["mean"] if found else 0.0

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


def _pareto_front(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Table of the variants on the Pareto front, numbered, the best by the first metric first."""
    names = [metric["name"] for metric in summary["metrics"]]
    chosen = [variant for variant in _sorted(summary) if variant["name"] in summary.get("pareto", ())]
    rows = [
        [f"{number}: {variant['name']}", *(_spread(variant["metrics"][name]) for name in names)]
        for number, variant in enumerate(chosen, 1)
    ]
    return ["Pareto front", *names], rows


def _pareto_plot(summary: Summary) -> bytes:
    names = [metric["name"] for metric in summary["metrics"]]
    shown = [
        variant
        for variant in _sorted(summary)
        if not variant["reference"] and all(variant["metrics"][name] for name in names)
    ]
    values = {name: [variant["metrics"][name]["mean"] for variant in shown] for name in names}
    chosen = [index for index, variant in enumerate(shown) if variant["name"] in summary.get("pareto", ())]
    return pareto_plot([variant["name"] for variant in shown], values, chosen)


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


def _verdict(summary: Summary) -> str:
    """State in one sentence which variant is best by the first metric."""
    if summary["best"] is None:
        return "No variant is best: none has the first metric for every seed."
    first = summary["metrics"][0]["name"]
    best = next(variant for variant in summary["variants"] if variant["name"] == summary["best"])
    return f"Best {first}: {best['name']} with {_spread(best['metrics'][first])}."


def print_search(summary: Summary) -> None:
    """Print the tables, the stopped trials and the failed trials."""
    for header, rows in (_means(summary), _pareto_front(summary), _paired(summary)):
        if rows:
            print_table(header, rows)
    for name, seed, step, *_ in _stopped(summary):
        console.print(f"stopped at {step}: {name} (seed {seed})")
    for name, seed, error in _failures(summary):
        console.print(f"failed: {name} (seed {seed}): {error}")
    if summary["best"] is not None:
        console.print(f"best {summary['metrics'][0]['name']}: {summary['best']}")


def write_search(folder: Path, summary: Summary, recipe: str) -> None:
    """Write ``comparison.png``, ``pareto.png`` if there is a front, ``comparison.html`` and, last, ``summary.json``.

    Args:
        folder: directory of the search.
        summary: comparison of the variants.
        recipe: recipe of one trial, as YAML.
    """
    page = Page("Comparison", _verdict(summary), Origin.read(folder))
    page.text(f"{folder.name}: {summary['trials']} trials, {summary['failed']} of them failed")
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
        page.heading("Paired comparison by text")
        page.table(header, rows)
        page.text(
            "Differences of each variant, averaged over its seeds, from the baseline on the same held-out texts: "
            "bootstrap interval of the mean, Wilcoxon's signed-rank test of each comparison by itself."
        )
    if summary.get("pareto", ()):
        page.heading("Pareto front")
        plot = _pareto_plot(summary)
        write_atomically(folder / "pareto.png", plot)
        page.picture(plot, f"{names[0]} against the other metrics")
        page.table(*_pareto_front(summary))
        page.text("For these variants, no other is at least as good in all metrics and better in one.")
    stopped = _stopped(summary)
    if stopped:
        page.heading("Trials stopped early")
        page.table(["variant", "seed", "step", *names], stopped)
        page.text("Values at the step of the stop, which cannot be compared with those of complete trials.")
    failures = _failures(summary)
    if failures:
        page.heading("Failed trials")
        page.table(["variant", "seed", "error"], failures, prose=True)
    page.save(folder / "comparison.html", recipe, "Recipe of the first trial")
    write_atomically(folder / "summary.json", plain_json(summary, indent=2) + "\n")


def render(folder: Path) -> Path:
    """Write the page of a finished search again; return its path.

    Raises:
        ResultError: no row and no trial is left to take the recipe from.
    """
    summary = read_summary(folder / SUMMARY)
    write_search(folder, summary, _first_recipe(folder, summary))
    return folder / "comparison.html"


def _first_recipe(folder: Path, summary: Summary) -> str:
    """Read the recipe of one trial as YAML, from the table of trials, which may be elsewhere, or from its folder."""
    for rows in (Path(summary.get("rows", "")), folder / ROWS):
        if rows.is_file() and (records := read_records(rows)):
            return dump(records[0]["recipe"])
    for trial in sorted(folder.glob(f"trials/*/{RECIPE}")):
        return dump(read_yaml(trial))
    raise ResultError(f"'{folder}' has no table of trials and no folder of a trial, so there is no recipe to show")
