"""Verbs that run a recipe of a job without options of their own, made from its registration."""

from collections.abc import Callable
from typing import Annotated

import typer

from raycloud.cli.options import AsJson, Out, Overwrite, RecipeFile, Resume, mode_of, print_json, read_recipe
from raycloud.jobs.registry import Job


def command(job: Job) -> Callable[..., None]:
    """Return the function of a job's verb for typer."""

    def run(
        recipe: RecipeFile,
        overrides: Annotated[list[str] | None, typer.Argument(help=f"Overrides, such as {job.example}.")] = None,
        out: Out = None,
        resume: Resume = False,
        overwrite: Overwrite = False,
        as_json: AsJson = False,
    ) -> None:
        mode = mode_of(resume, overwrite)
        checked = read_recipe(job.recipe_class, recipe, overrides, out)
        print_json(as_json, job.run(checked, mode).summary)

    run.__doc__ = job.help
    return run
