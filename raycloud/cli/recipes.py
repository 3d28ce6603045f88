"""The recipes by the job they are for."""

from __future__ import annotations

from raycloud.errors import RecipeError
from raycloud.recipe import Recipe


def recipe_class(job: object) -> type[Recipe]:
    """The recipe of a job.

    Raises:
        RecipeError: there is no such job.
    """
    from raycloud.distill.recipe import DistillRecipe
    from raycloud.evaluation.recipe import EvaluateRecipe
    from raycloud.split.recipe import SplitPlanRecipe

    known: dict[str, type[Recipe]] = {
        "distill": DistillRecipe,
        "evaluate": EvaluateRecipe,
        "split_plan": SplitPlanRecipe,
    }
    if not isinstance(job, str) or job not in known:
        raise RecipeError(f"no job {job!r}; allowed: {', '.join(known)}")
    return known[job]
