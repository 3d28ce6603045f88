"""``raycloud tune-teacher``."""

from __future__ import annotations

from typing import Annotated

import typer

from raycloud.cli.options import Overwrite, RecipeFile, mode_of, needing_ray


def tune_teacher(
    recipe: RecipeFile,
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides, such as deepspeed.stage=3.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune a cloud teacher with Ray Train and DeepSpeed."""
    from raycloud.cluster.teacher.recipe import TuneTeacherRecipe

    mode = mode_of(resume, overwrite)
    checked = TuneTeacherRecipe.load(recipe, overrides or ())
    with needing_ray("tune-teacher"):
        from raycloud.cluster.jobs.tune_teacher import run
    run(checked, mode)
