"""The recipes by the job they are for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from raycloud.errors import RecipeError
from raycloud.recipe import Recipe, read_yaml


def recipe_class(job: object) -> type[Recipe]:
    """The recipe of a job.

    Raises:
        RecipeError: there is no such job.
    """
    from raycloud.cluster.teacher.recipe import TuneTeacherRecipe
    from raycloud.distill.recipe import DistillRecipe
    from raycloud.evaluation.recipe import EvaluateRecipe
    from raycloud.split.finetune.recipe import SplitTuneRecipe
    from raycloud.split.recipe import SplitPlanRecipe

    known: dict[str, type[Recipe]] = {
        "tune_teacher": TuneTeacherRecipe,
        "distill": DistillRecipe,
        "evaluate": EvaluateRecipe,
        "split_plan": SplitPlanRecipe,
        "split_tune": SplitTuneRecipe,
    }
    if not isinstance(job, str) or job not in known:
        raise RecipeError(f"no job {job!r}; allowed: {', '.join(known)}")
    return known[job]


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, of whichever job it is.

    Raises:
        RecipeError: it names no job, or is not valid.
    """
    values = read_yaml(path)
    if "job" not in values:
        raise RecipeError(f"{path}: missing key 'job'")
    return recipe_class(values["job"]).load(path, overrides)
