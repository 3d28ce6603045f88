"""``raycloud distill``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raycloud.errors import MissingExtra, RecipeError


def distill(
    recipe: Annotated[Path, typer.Option(help="The recipe, a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides, such as rounds.count=2.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last complete round.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing result directory.")] = False,
) -> None:
    """Distil students at the edges from a teacher in the cloud."""
    from raycloud.distill.recipe import DistillRecipe

    if resume and overwrite:
        raise RecipeError("--resume and --overwrite exclude each other")
    checked = DistillRecipe.load(recipe, overrides or ())
    try:
        from raycloud.cluster.jobs.distill import run
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise MissingExtra("'raycloud distill'", "cluster") from None
    run(checked, "resume" if resume else "overwrite" if overwrite else "new")
