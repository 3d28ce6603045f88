"""The recipes by the job they are for."""

from __future__ import annotations

from raycloud.errors import RecipeError
from raycloud.recipe import Recipe


def recipe_class(job: object) -> type[Recipe]:
    """The recipe of a job.

    Raises:
        RecipeError: there is no such job.
    """
    from raycloud.cluster.teacher.recipe import TuneTeacherRecipe
    from raycloud.distill.recipe import DistillRecipe
    from raycloud.evaluation.recipe import EvaluateRecipe

    known: dict[str, type[Recipe]] = {
        "tune_teacher": TuneTeacherRecipe,
        "distill": DistillRecipe,
        "evaluate": EvaluateRecipe,
    }
    if not isinstance(job, str) or job not in known:
        raise RecipeError(f"no job {job!r}; allowed: {', '.join(known)}")
    return known[job]
