"""The jobs that a search can run: their recipes, what their actors ask of the cluster, how to run one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raycloud.cluster.bundles import Bundle, distill_bundles
from raycloud.distill.recipe import DistillRecipe
from raycloud.errors import RecipeError
from raycloud.recipe import Recipe
from raycloud.results import Mode

Summary = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One kind of job, its name in recipes being the key of :data:`JOBS`.

    Args:
        recipe: the class of its recipes; they have ``output`` and ``seed``.
        bundles: what each actor of a run takes, beside the process that drives it.
        run: runs a recipe in its result directory, as ``mode`` says, and returns the summary.
    """

    recipe: type[Recipe]
    bundles: Callable[[Any], list[Bundle]]
    run: Callable[[Any, Mode], Summary]


def _distill(recipe: DistillRecipe, mode: Mode) -> Summary:
    from raycloud.cluster.jobs.distill import run

    return run(recipe, mode).summary


JOBS = {"distill": Job(DistillRecipe, distill_bundles, _distill)}


def job_of(recipe: dict[str, Any], source: str | Path) -> Job:
    """The job that a recipe's plain values name.

    Raises:
        RecipeError: there is none that can be searched.
    """
    name = recipe.get("job")
    if name not in JOBS:
        raise RecipeError(f"{source}: job is {name!r}; allowed: {', '.join(JOBS)}")
    return JOBS[name]
