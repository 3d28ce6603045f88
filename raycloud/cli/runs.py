"""``raycloud runs``."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from raycloud.cli.options import AsJson, print_json


def runs(
    folders: Annotated[list[Path] | None, typer.Argument(help="Folders to search; default: results.")] = None,
    as_json: AsJson = False,
) -> None:
    """List result directories with run id, job, state (complete, running, interrupted), time and headline numbers."""
    from raycloud.jobs.registry import REPORTS
    from raycloud.report.runs import find_runs, print_runs

    found = find_runs(folders or [Path("results")], REPORTS)
    print_runs(found)
    plain = [
        {**asdict(run), "path": str(run.path), "when": datetime.fromtimestamp(run.when).astimezone().isoformat()}
        for run in found
    ]
    print_json(as_json, {"runs": plain})
