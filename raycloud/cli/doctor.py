"""``raycloud doctor``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from raycloud.cli.options import AsJson, print_json, requires_ray
from raycloud.jobs.registry import job_named, load_recipe
from raycloud.recipe import Bundle


def doctor(
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides of the recipe.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="Also check that the cluster has resources for this job.")] = None,
    address: Annotated[
        str | None, typer.Option(help="HOST:PORT of the cluster; default: RAY_ADDRESS, or the one started here.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check what a job needs of the cluster: versions, token, ports, resources, shared folders, capacity.

    Exits with status 2 if a job would fail or wait forever.
    """
    from raycloud.report.doctor import print_doctor

    output, actors = None, list[Bundle]()
    if recipe is not None:
        checked: Any = load_recipe(recipe, overrides or ())
        output, actors = checked.output, job_named(checked.job).bundles(checked)
    with requires_ray("doctor"):
        from raycloud.cluster.doctor import run_checks
    found = [asdict(finding) for finding in run_checks(address, output, actors)]
    healthy = not any(finding["level"] == "error" for finding in found)
    print_doctor(found)
    print_json(as_json, {"healthy": healthy, "findings": found})
    if not healthy:
        raise typer.Exit(2)
