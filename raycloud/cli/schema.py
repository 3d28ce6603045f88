"""``raycloud schema``."""

import json
from typing import Annotated

import typer

from raycloud.jobs.registry import JOBS, job_named


def schema(
    job: Annotated[str, typer.Argument(help=f"{', '.join(list(JOBS)[:-1])} or {list(JOBS)[-1]}.")] = "distill",
) -> None:
    """Print the JSON Schema of a recipe, for use in editors."""
    typer.echo(json.dumps(job_named(job.replace("-", "_")).recipe_class.model_json_schema(), indent=2))
