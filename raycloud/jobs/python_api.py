"""Python API of the jobs: run any of them, see :data:`raycloud.jobs.registry.JOBS`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raycloud.errors import RecipeError
from raycloud.jobs.registry import Result, job_named, load_recipe
from raycloud.recipe import Recipe
from raycloud.results import Mode
from raycloud.yaml12 import dump


def run(recipe: Recipe | str | Path, *, mode: Mode = "new", **overrides: Any) -> Result:
    """Run a job and return its result, as its verb on the command line does.

    Args:
        recipe: recipe of a job, or the path of its YAML file.
        mode: what becomes of an existing result directory: ``new`` refuses it, ``resume`` continues its run,
            ``overwrite`` replaces it.
        overrides: values of the recipe by key, such as ``output="results/first"``, ``rounds={"count": 2, "steps": 8}``
            or, for a key of a part, ``**{"rounds.count": 2}``.

    Raises:
        MissingExtra: the job needs Ray, and it is not installed.
        RaycloudError: another error that the user can fix.
    """
    changes = [f"{key}={dump(_plain(value), flow=True)}" for key, value in overrides.items()]
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, changes)
    job = job_named(getattr(recipe, "job", None))
    if not isinstance(recipe, job.recipe_class):
        raise RecipeError(
            f"recipe: a {type(recipe).__name__}; allowed: {job.recipe_class.__name__}, or its file's path"
        )
    return job.run(_changed(recipe, changes), mode)


def _changed(recipe: Recipe, changes: list[str]) -> Recipe:
    return type(recipe).parse(recipe.model_dump(mode="json"), changes) if changes else recipe


def _plain(value: Any) -> Any:
    if isinstance(value, Recipe):
        return value.model_dump(mode="json")
    return str(value) if isinstance(value, Path) else value
