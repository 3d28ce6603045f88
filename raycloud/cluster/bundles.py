"""What the actors of a recipe's job ask of their nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from raycloud.cluster.teacher.recipe import TuneTeacherRecipe
from raycloud.distill.recipe import DistillRecipe
from raycloud.recipe import Placement, Recipe
from raycloud.split.finetune.recipe import SplitTuneRecipe

Bundle = dict[str, float]
"""Amounts by resource, all on one node."""


def bundle(placement: Placement, tier: str) -> Bundle:
    """Of one actor in the tier ``cloud`` or ``edge``."""
    wanted = {"CPU": placement.num_cpus, "GPU": placement.num_gpus, tier: 1.0}
    return {name: amount for name, amount in wanted.items() if amount}


def distill_bundles(recipe: DistillRecipe) -> list[Bundle]:
    """The teacher's replicas, then a student for every edge."""
    teachers = [bundle(recipe.teacher.placement, "cloud")] * recipe.teacher.replicas
    return teachers + [bundle(recipe.cohort_of(edge).student.placement, "edge") for edge in recipe.edges]


def tune_teacher_bundles(recipe: TuneTeacherRecipe) -> list[Bundle]:
    """The workers."""
    return [bundle(recipe.workers.placement, "cloud")] * recipe.workers.count


def split_tune_bundles(recipe: SplitTuneRecipe) -> list[Bundle]:
    """The cloud's part, then every edge; none where one edge trains beside the cloud's part or over a link."""
    edges = [bundle(recipe.edge_placement, "edge")] * len(recipe.edges)
    return [bundle(recipe.cloud_placement, "cloud"), *edges] if edges else []


BUNDLES: dict[str, Callable[[Any], list[Bundle]]] = {
    "distill": distill_bundles,
    "tune_teacher": tune_teacher_bundles,
    "split_tune": split_tune_bundles,
}
"""By the recipe's ``job``; a job that is not here needs no cluster."""


def bundles_of(recipe: Recipe) -> list[Bundle]:
    """What each actor of a run takes, beside the process that drives it; nothing for a job without a cluster."""
    known = BUNDLES.get(getattr(recipe, "job", ""))
    return known(recipe) if known else []
