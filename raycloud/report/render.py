"""The page of a result directory, rendered again from what is in there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from raycloud.errors import ResultError
from raycloud.recipe import read_yaml
from raycloud.report.comparison import write_comparison
from raycloud.report.distillation import write_page
from raycloud.report.privacy import write_privacy
from raycloud.report.runs import PRIVACY, ROWS, run_at
from raycloud.report.split_edges import write_page as write_split_edges
from raycloud.report.split_tune import write_page as write_split_tune
from raycloud.report.teacher import write_page as write_teacher
from raycloud.results import RECIPE, SUMMARY, read_records


def render(folder: Path) -> Path:
    """Write the page of a result directory anew; where it is.

    Raises:
        ResultError: it is no result directory, the run has not ended, or runs of its kind have no page.
    """
    if not folder.is_dir():
        raise ResultError(f"no folder '{folder}'")
    run = run_at(folder, [file.name for file in folder.iterdir()])
    if run is None:
        raise ResultError(f"'{folder}' is no result directory: it holds no {RECIPE}, {ROWS} or {PRIVACY}")
    if run.state != "complete":
        raise ResultError(f"'{folder}' has no {SUMMARY} to report yet: the run is {run.state}")
    match run.job:
        case "distill":
            recipe = (folder / RECIPE).read_text(encoding="utf-8")
            write_page(folder, _read(folder / SUMMARY), read_records(folder / "metrics.jsonl"), recipe)
            return folder / "report.html"
        case "tune_teacher":
            recipe = (folder / RECIPE).read_text(encoding="utf-8")
            write_teacher(folder, _read(folder / SUMMARY), read_records(folder / "metrics.jsonl"), recipe)
            return folder / "report.html"
        case "split_tune":
            recipe = (folder / RECIPE).read_text(encoding="utf-8")
            summary = _read(folder / SUMMARY)
            write = write_split_edges if "edges" in summary else write_split_tune
            write(folder, summary, read_records(folder / "metrics.jsonl"), recipe)
            return folder / "report.html"
        case "search":
            summary = _read(folder / SUMMARY)
            write_comparison(folder, summary, _first_recipe(folder, summary))
            return folder / "comparison.html"
        case "privacy":
            write_privacy(folder, _read(folder / PRIVACY))
            return folder / "report.html"
    allowed = "tune_teacher, distill, split_tune, search, privacy"
    raise ResultError(f"'{folder}' is of the job '{run.job}', which has no page; allowed: {allowed}")


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ResultError(f"cannot read '{path}': {error}") from None


def _first_recipe(folder: Path, summary: dict[str, Any]) -> str:
    """Of one of the trials, as YAML: from the table of rows, which may be elsewhere, or from a trial's directory."""
    for rows in (Path(summary.get("rows", "")), folder / ROWS):
        if rows.is_file() and (records := read_records(rows)):
            return yaml.safe_dump(records[0]["recipe"], sort_keys=False, allow_unicode=True)
    for trial in sorted(folder.glob(f"trials/*/{RECIPE}")):
        return yaml.safe_dump(read_yaml(trial), sort_keys=False, allow_unicode=True)
    raise ResultError(f"'{folder}' holds no rows and no trial any more: there is no recipe to report")
