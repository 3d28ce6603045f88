"""``raycloud validate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raycloud.cli.recipes import load_recipe


def validate(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides, such as rounds.count=2.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Print it with every default written out.")] = False,
) -> None:
    """Check a recipe without running it."""
    checked = load_recipe(recipe, overrides or ())
    job = getattr(checked, "job")  # noqa: B009
    typer.echo(checked.dump() if show else f"{recipe}: a valid {job} recipe")
