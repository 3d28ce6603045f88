"""Report page of a result directory, written again from its files."""

from __future__ import annotations

from pathlib import Path

from raycloud.errors import ResultError
from raycloud.report.runs import NO_REPORT, PRIVACY, ROWS, Reports, run_at
from raycloud.results import RECIPE, SUMMARY


def render(folder: Path, reports: Reports) -> Path:
    """Write the page of a result directory again and return its path.

    Args:
        folder: result directory of a finished run.
        reports: reports by job.

    Raises:
        ResultError: the folder is no result directory, the run has not ended, or runs of its kind have no page.
    """
    if not folder.is_dir():
        raise ResultError(f"no folder '{folder}'")
    run = run_at(folder, [file.name for file in folder.iterdir()], reports)
    if run is None:
        raise ResultError(f"'{folder}' is not a result directory: it has no {RECIPE}, {ROWS} or {PRIVACY}")
    if run.state != "complete":
        raise ResultError(f"'{folder}' has no {SUMMARY} to report yet: the run is {run.state}")
    page = reports.get(run.job, NO_REPORT).render
    if page is None:
        allowed = ", ".join(job for job, report in reports.items() if report.render is not None)
        raise ResultError(f"'{folder}' is of the job '{run.job}', which has no page; allowed: {allowed}")
    return page(folder)
