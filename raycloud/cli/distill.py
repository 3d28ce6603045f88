"""``raycloud distill``."""

from __future__ import annotations

from typing import Annotated

import typer

from raycloud.cli.options import Overwrite, RecipeFile, mode_of, needing_ray


def distill(
    recipe: RecipeFile,
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides, such as rounds.count=2.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last complete round.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Distil students at the edges from a teacher in the cloud."""
    from raycloud.distill.recipe import DistillRecipe

    mode = mode_of(resume, overwrite)
    checked = DistillRecipe.load(recipe, overrides or ())
    with needing_ray("distill"):
        from raycloud.cluster.jobs.distill import run
    run(checked, mode)
