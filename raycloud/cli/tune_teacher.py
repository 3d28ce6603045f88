"""``raycloud tune-teacher``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raycloud.errors import MissingExtra, RecipeError


def tune_teacher(
    recipe: Annotated[Path, typer.Option(help="The recipe, a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides, such as deepspeed.stage=3.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing result directory.")] = False,
) -> None:
    """Fine-tune a cloud teacher with Ray Train and DeepSpeed."""
    from raycloud.cluster.teacher.recipe import TuneTeacherRecipe

    if resume and overwrite:
        raise RecipeError("--resume and --overwrite exclude each other")
    checked = TuneTeacherRecipe.load(recipe, overrides or ())
    try:
        from raycloud.cluster.jobs.tune_teacher import run
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise MissingExtra("'raycloud tune-teacher'", "cluster") from None
    run(checked, "resume" if resume else "overwrite" if overwrite else "new")
