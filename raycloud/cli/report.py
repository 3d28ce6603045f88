"""``raycloud report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(folder: Annotated[Path, typer.Argument(help="The result directory.")]) -> None:
    """Write the report page of a finished run again, and print its path."""
    from raycloud.jobs.registry import REPORTS
    from raycloud.report.render import render

    typer.echo(render(folder, REPORTS))
