"""``raycloud schema``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from raycloud.cli.recipes import recipe_class


def schema(
    job: Annotated[str, typer.Argument(help="tune_teacher, distill, evaluate, split_plan or split_tune.")] = "distill",
) -> None:
    """Print the JSON Schema of a job's recipe, for editors."""
    typer.echo(json.dumps(recipe_class(job.replace("-", "_")).model_json_schema(), indent=2))
