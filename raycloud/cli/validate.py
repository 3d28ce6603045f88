"""``raycloud validate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raycloud.cli.options import AsJson, print_json
from raycloud.errors import RecipeError
from raycloud.jobs.registry import load_recipe


def validate(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [OVERRIDES]...",
            help="The recipe, unless --recipe is given, and overrides, as rounds.count=2.",
        ),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="The recipe, a YAML file.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the recipe with all defaults.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a recipe without running it."""
    overrides = list(arguments or ())
    if recipe is None:
        if not overrides:
            raise RecipeError("no recipe is named: give --recipe FILE")
        recipe = Path(overrides.pop(0))
    checked = load_recipe(recipe, overrides)
    job = getattr(checked, "job")  # noqa: B009
    typer.echo(checked.dump() if show else f"{recipe}: a valid {job} recipe")
    print_json(as_json, {"job": job, "recipe": checked.model_dump(mode="json")})
