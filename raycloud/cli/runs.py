"""``raycloud runs``."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from raycloud.cli.options import AsJson


def runs(
    folders: Annotated[list[Path] | None, typer.Argument(help="Where to look; else in 'results'.")] = None,
    as_json: AsJson = False,
) -> None:
    """List result directories: the run's id, job, state (complete, running, interrupted), when, headline numbers."""
    from raycloud.report.runs import find_runs, print_runs

    found = find_runs(folders or [Path("results")])
    print_runs(found)
    if as_json:
        plain = [
            {**asdict(run), "path": str(run.path), "when": datetime.fromtimestamp(run.when).astimezone().isoformat()}
            for run in found
        ]
        typer.echo(json.dumps({"runs": plain}))
