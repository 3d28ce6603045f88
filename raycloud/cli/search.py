"""``raycloud search``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raycloud.cli.options import AsJson, print_json, requires_ray


def search(
    space: Annotated[Path, typer.Option(help="The search space, a Python file that defines SPACE.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides of the base recipe.")] = None,
    rows: Annotated[
        Path | None, typer.Option(help="The table of trials, a JSONL file; trials that succeeded are not run again.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The directory of the search; default: that of the space.")] = None,
    concurrent: Annotated[int | None, typer.Option(min=1, help="Trials at a time; default: that of the space.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run a job over a space of recipes with Ray Tune and compare the variants.

    A stopped search continues when it is started again: trials in the table are skipped, unfinished trials are resumed.
    """
    from raycloud.search.space import load_space

    loaded = load_space(space)
    with requires_ray("search"):
        from raycloud.search.run import run
    result = run(loaded, output=out, rows=rows, concurrent=concurrent, overrides=overrides or ())
    print_json(as_json, result.summary)
    if result.summary["failed"] == result.summary["trials"]:
        raise typer.Exit(1)
