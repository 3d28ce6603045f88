"""Result directories at a glance: what each of them is, how far it got, and its headline numbers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.table import Table

from raycloud.errors import RaycloudError, ResultError
from raycloud.recipe import read_yaml
from raycloud.report.console import console
from raycloud.results import LOCK, RECIPE, RUN_ID, SUMMARY, in_use, read_records

State = Literal["complete", "running", "interrupted"]
Numbers = dict[str, float | str]

ROWS = "rows.jsonl"
PRIVACY = "privacy.json"

_HEADLINES = (
    "accuracy",
    "perplexity",
    "bytes_per_step",
    "ppl_before",
    "ppl_after",
    "tokens_per_s",
    "student_ppl_before",
    "student_ppl_after",
    "gap_closed",
    "agreement_after",
)
_FEW = 4


@dataclass(frozen=True)
class Run:
    """One result directory.

    Args:
        path: where.
        job: what kind of run it was.
        state: whether it came to its end, is at it, or was broken off and can go on.
        when: it was last written to, in seconds since 1970.
        numbers: the few that say most, by name.
        id: the run's, which its log and metrics carry; empty where it has none.
    """

    path: Path
    job: str
    state: State
    when: float
    numbers: Numbers
    id: str = ""


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """The result directories in and below some folders, the newest last; trials of a search count as one run.

    Raises:
        ResultError: one of the folders is not there.
    """
    found = []
    for folder in folders:
        if not folder.is_dir():
            raise ResultError(f"no folder '{folder}'")
        for at, below, files in os.walk(folder):
            below[:] = [name for name in below if not name.startswith(".")]
            run = run_at(Path(at), files)
            if run is not None:
                below.clear()
                found.append(run)
    return sorted(found, key=lambda run: run.when)


def run_at(path: Path, files: Sequence[str]) -> Run | None:
    """The run whose result directory has these files; None if it is none."""
    if RECIPE in files:
        return _of_recipe(path)
    if ROWS in files or "comparison.html" in files:
        return _search(path)
    if PRIVACY in files:
        return Run(path, "privacy", "complete", _written(path), headlines(_read(path / PRIVACY)))
    return None


def _of_recipe(path: Path) -> Run:
    try:
        recipe = read_yaml(path / RECIPE)
    except RaycloudError:
        recipe = {}
    job = str(recipe.get("job", "unknown"))
    run_id = (path / RUN_ID).read_text(encoding="utf-8").strip() if (path / RUN_ID).is_file() else ""
    if (path / SUMMARY).is_file():
        return Run(path, job, "complete", _written(path), headlines(_read(path / SUMMARY)), run_id)
    state: State = "running" if in_use(path / LOCK) else "interrupted"
    return Run(path, job, state, _written(path), _progress(path, recipe), run_id)


def _search(path: Path) -> Run:
    rows = path / ROWS
    if rows.is_file() and in_use(rows):
        return Run(path, "search", "running", _written(path), {"rows": float(len(read_records(rows)))})
    if (path / SUMMARY).is_file():
        return Run(path, "search", "complete", _written(path), headlines(_read(path / SUMMARY)))
    return Run(path, "search", "interrupted", _written(path), {"rows": float(len(read_records(rows)))})


def headlines(summary: Mapping[str, Any]) -> Numbers:
    """Of a finished run: a distillation's and a search's own, the best mean of an evaluation, else the first few."""
    if "average" in summary:
        return {f"ROUGE-L {model}": float(mean) for model, mean in summary["average"].items()}
    if "variants" in summary:
        counts: Numbers = {name: float(summary[name]) for name in ("trials", "failed")}
        best = {} if summary["best"] is None else {"best": str(summary["best"])}
        return counts | best
    known = [name for name in _HEADLINES if name in summary]
    found = {name: summary[name] for name in known or summary if _is_number(summary[name])}
    return dict(list(found.items())[:_FEW])


def _progress(path: Path, recipe: Mapping[str, Any]) -> Numbers:
    """Of an unfinished run: where it was, and its loss there."""
    records = [record for record in read_records(path / "metrics.jsonl") if "loss" in record]
    if not records:
        return {}
    last = records[-1]
    unit = "round" if "round" in last else "step"
    rounds = recipe.get("rounds") or {}
    done = f"{last[unit] + 1}" + (f"/{rounds['count']}" if unit == "round" and "count" in rounds else "")
    return {unit: done, **({"loss": last["loss"]} if _is_number(last["loss"]) else {})}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def _written(path: Path) -> float:
    """The last change of one of the files that tell of progress."""
    names = (SUMMARY, "metrics.jsonl", ROWS, PRIVACY, RECIPE)
    return max((path / name).stat().st_mtime for name in names if (path / name).is_file())


def print_runs(runs: Sequence[Run]) -> None:
    """One row a run."""
    table = Table("run", "id", "job", "state", "when", "numbers", box=box.SIMPLE)
    for column in table.columns:
        column.no_wrap, column.overflow = column.header in ("id", "job", "state", "when"), "fold"
    for run in runs:
        when = datetime.fromtimestamp(run.when).isoformat(" ", "minutes")
        table.add_row(str(run.path), run.id, run.job, run.state, when, ", ".join(_spelled(run.numbers)))
    console.print(table)


def _spelled(numbers: Numbers) -> Iterator[str]:
    for name, value in numbers.items():
        yield f"{name} {value}" if isinstance(value, str) else f"{name} {value:.4g}"
