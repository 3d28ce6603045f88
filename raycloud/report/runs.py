"""Overview of result directories: job, state, progress and headline numbers of each."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from raycloud.errors import RaycloudError, ResultError
from raycloud.recipe import read_yaml
from raycloud.report.console import console
from raycloud.results import LOCK, RECIPE, RUN_ID, SUMMARY, in_use, read_records

State = Literal["complete", "running", "interrupted"]
Numbers = dict[str, float | str]

ROWS = "rows.jsonl"
PRIVACY = "privacy.json"

_FEW = 4


@dataclass(frozen=True)
class RunReport:
    """Report of one kind of run, as the registry of jobs describes it.

    Args:
        headlines: keys of the summary that :func:`find_runs` shows, ``key`` or ``key:label``. A key whose value is a
            mapping gives one number per entry, named ``label entry``. A summary without any of them shows its first
            few numbers.
        render: function that writes the page of a finished run's result directory again and returns its path; None for
            a kind without a page.
    """

    headlines: tuple[str, ...] = ()
    render: Callable[[Path], Path] | None = None


NO_REPORT = RunReport()
"""Report of a kind of run that has no page and names no headlines."""

Reports = Mapping[str, RunReport]
"""Reports by job."""


@dataclass(frozen=True)
class Run:
    """One result directory.

    Args:
        path: path of the directory.
        job: job that made it.
        state: ``complete``, ``running``, or ``interrupted`` if the run can be resumed.
        when: time of the last write, in seconds since 1970.
        numbers: headline numbers by name.
        id: id of the run in its log and metrics; empty if it has none.
    """

    path: Path
    job: str
    state: State
    when: float
    numbers: Numbers
    id: str = ""


def find_runs(folders: Sequence[Path], reports: Reports) -> list[Run]:
    """Find the result directories in and below folders, the newest last; a search with its trials is one run.

    Raises:
        ResultError: one of the folders does not exist.
    """
    found = []
    for folder in folders:
        if not folder.is_dir():
            raise ResultError(f"no folder '{folder}'")
        for at, below, files in os.walk(folder):
            below[:] = [name for name in below if not name.startswith(".")]
            run = run_at(Path(at), files, reports)
            if run is not None:
                below.clear()
                found.append(run)
    return sorted(found, key=lambda run: run.when)


def run_at(path: Path, files: Sequence[str], reports: Reports) -> Run | None:
    """Read the run of a folder with these files; None if it is no result directory."""
    if RECIPE in files:
        return _of_recipe(path, reports)
    if ROWS in files or "comparison.html" in files:
        return _search(path, reports)
    if PRIVACY in files:
        return _finished(path, "privacy", PRIVACY, reports)
    return None


def _of_recipe(path: Path, reports: Reports) -> Run:
    try:
        recipe = read_yaml(path / RECIPE)
    except RaycloudError:
        recipe = {}
    job = str(recipe.get("job", "unknown"))
    run_id = (path / RUN_ID).read_text(encoding="utf-8").strip() if (path / RUN_ID).is_file() else ""
    if (path / SUMMARY).is_file():
        return _finished(path, job, SUMMARY, reports, run_id)
    state: State = "running" if in_use(path / LOCK) else "interrupted"
    return Run(path, job, state, _modified(path), _progress(path, recipe), run_id)


def _search(path: Path, reports: Reports) -> Run:
    rows = path / ROWS
    if rows.is_file() and in_use(rows):
        return Run(path, "search", "running", _modified(path), {"rows": float(len(read_records(rows)))})
    if (path / SUMMARY).is_file():
        return _finished(path, "search", SUMMARY, reports)
    return Run(path, "search", "interrupted", _modified(path), {"rows": float(len(read_records(rows)))})


def _finished(path: Path, job: str, file: str, reports: Reports, run_id: str = "") -> Run:
    numbers = headlines(_read(path / file), reports.get(job, NO_REPORT))
    return Run(path, job, "complete", _modified(path), numbers, run_id)


def headlines(summary: Mapping[str, Any], report: RunReport) -> Numbers:
    """Return the headline numbers of a finished run; see :class:`RunReport`."""
    found: Numbers = {}
    known = [key for key in report.headlines if key.partition(":")[0] in summary]
    for key in known or summary:
        name, _, label = key.partition(":")
        value = summary[name]
        if isinstance(value, Mapping) and known:
            found |= {f"{label or name} {entry}": one for entry, one in value.items() if _is_number(one)}
        elif _is_number(value) or (known and isinstance(value, str)):
            found[label or name] = value
    return found if known else dict(list(found.items())[:_FEW])


def _progress(path: Path, recipe: Mapping[str, Any]) -> Numbers:
    """Progress of an unfinished run: its last round or step, and the loss there."""
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


def _modified(path: Path) -> float:
    """Latest modification time of the files that show progress, in seconds since 1970."""
    names = (SUMMARY, "metrics.jsonl", ROWS, PRIVACY, RECIPE)
    return max((path / name).stat().st_mtime for name in names if (path / name).is_file())


def print_runs(runs: Sequence[Run]) -> None:
    """Print a few lines per run that fit a narrow terminal: the path, never truncated, and below it the rest."""
    jobs = max((len(run.job) for run in runs), default=0)
    states = max((len(run.state) for run in runs), default=0)
    for run in runs:
        when = datetime.fromtimestamp(run.when).isoformat(" ", "minutes")
        console.print(str(run.path), style="bold")
        console.print(f"  {run.id:8}  {run.job:{jobs}}  {run.state:{states}}  {when}")
        for line in textwrap.wrap(", ".join(_format_numbers(run.numbers)), console.width - 2, break_long_words=False):
            console.print(f"  {line}")


def _format_numbers(numbers: Numbers) -> Iterator[str]:
    for name, value in numbers.items():
        yield f"{name} {value}" if isinstance(value, str) else f"{name} {value:.4g}"
