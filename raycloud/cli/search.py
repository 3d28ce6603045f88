"""``raycloud search``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from raycloud.cli.options import AsJson, needing_ray


def search(
    space: Annotated[Path, typer.Option(help="The space, a Python file that defines SPACE.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides of the base recipe.")] = None,
    rows: Annotated[
        Path | None, typer.Option(help="The table of trials; those that succeeded in it are not run again.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The directory of the search, instead of the space's.")] = None,
    concurrent: Annotated[int | None, typer.Option(min=1, help="Trials at a time, instead of the space's.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run a job over a space of recipes with Ray Tune and compare the variants.

    A search that was stopped goes on when it is started again: trials with a row are done, those begun are resumed.
    """
    from raycloud.search.space import load_space

    loaded = load_space(space)
    with needing_ray("search"):
        from raycloud.search.run import run
    result = run(loaded, output=output, rows=rows, concurrent=concurrent, overrides=overrides or ())
    if as_json:
        typer.echo(json.dumps(result.summary))
    if result.summary["failed"] == result.summary["trials"]:
        raise typer.Exit(1)
