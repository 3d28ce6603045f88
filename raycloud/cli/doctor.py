"""``raycloud doctor``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from raycloud.cli.options import AsJson, needing_ray
from raycloud.cli.recipes import load_recipe


def doctor(
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides of the recipe.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="Look for room for this job as well.")] = None,
    address: Annotated[
        str | None, typer.Option(help="HOST:PORT of the cluster, instead of RAY_ADDRESS or the one started here.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look for what would keep a job from running: versions, token, ports, resources, shared folders, room.

    Ends with 2 where a job would fail or wait for ever.
    """
    from raycloud.report.findings import print_findings

    checked = load_recipe(recipe, overrides or ()) if recipe is not None else None
    with needing_ray("doctor"):
        from raycloud.cluster.doctor import examine
    found = [asdict(finding) for finding in examine(address, checked)]
    healthy = not any(finding["level"] == "error" for finding in found)
    print_findings(found)
    if as_json:
        typer.echo(json.dumps({"healthy": healthy, "findings": found}))
    if not healthy:
        raise typer.Exit(2)
