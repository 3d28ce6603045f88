"""``raycloud schema``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from raycloud.cli.recipes import recipe_class


def schema(job: Annotated[str, typer.Argument(help="The job whose recipe is described.")] = "distill") -> None:
    """Print a recipe's JSON Schema, for editors."""
    typer.echo(json.dumps(recipe_class(job).model_json_schema(), indent=2))
