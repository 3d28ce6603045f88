"""``raycloud validate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raycloud.cli.recipes import recipe_class
from raycloud.errors import RecipeError
from raycloud.recipe import read_yaml


def validate(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides, such as rounds.count=2.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Print it with every default written out.")] = False,
) -> None:
    """Check a recipe without running it."""
    values = read_yaml(recipe)
    if "job" not in values:
        raise RecipeError(f"{recipe}: missing key 'job'")
    checked = recipe_class(values["job"]).load(recipe, overrides or ())
    typer.echo(checked.dump() if show else f"{recipe}: a valid {values['job']} recipe")
