"""``raycloud report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(folder: Annotated[Path, typer.Argument(help="The result directory.")]) -> None:
    """Render the page of a finished run again, and print where it is."""
    from raycloud.report.render import render

    typer.echo(render(folder))
