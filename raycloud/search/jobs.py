"""The jobs that a search can run.

A capability becomes searchable by one :class:`Job` in :data:`JOBS`: the class of its recipes, what its processes take,
and a function that runs a recipe in its result directory. Spaces, optimisers, rows and reports know nothing else of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raycloud.cluster.bundles import Bundle, distill_bundles
from raycloud.cluster.runtime import computing_with, cores
from raycloud.distill.recipe import DistillRecipe
from raycloud.errors import RecipeError
from raycloud.recipe import Recipe
from raycloud.results import Mode
from raycloud.split.recipe import SplitPlanRecipe

Summary = dict[str, Any]
Report = Callable[[int, Summary], None]
"""Told the step of a rung and the numbers there; it may end the run by raising."""


@dataclass(frozen=True)
class Job:
    """One kind of job, its name in recipes being the key of :data:`JOBS`.

    Args:
        recipe: the class of its recipes; they have ``output`` and ``seed``.
        bundles: what each process of a run takes: first the one that drives it, then its actors.
        run: runs a recipe in its result directory, as ``mode`` says, and returns the summary. Where it has rungs it
            reports at each.
        timed: whether its numbers hold times. Its trials run one at a time, one after the other in one process, which
            may keep what it loaded.
        rungs: steps before the end at which a trial of a recipe reports, each twice the one before; none if it cannot
            be judged before its end.
    """

    recipe: type[Recipe]
    bundles: Callable[[Any], list[Bundle]]
    run: Callable[[Any, Mode, Report], Summary]
    timed: bool = False
    rungs: Callable[[Any], Sequence[int]] = lambda recipe: ()


_DRIVER: Bundle = {"CPU": 0.1}
"""What a process takes that waits for its actors, and puts a model together at the end."""


def _distill_bundles(recipe: DistillRecipe) -> list[Bundle]:
    return [_DRIVER, *distill_bundles(recipe)]


def _distill(recipe: DistillRecipe, mode: Mode, report: Report) -> Summary:
    from raycloud.cluster.jobs.distill import run

    return run(recipe, mode).summary


def _split_plan(recipe: SplitPlanRecipe, mode: Mode, report: Report) -> Summary:
    from raycloud.split.examination import run

    with computing_with(recipe.threads or cores()):
        return run(recipe, mode, report)


JOBS = {
    "distill": Job(DistillRecipe, _distill_bundles, _distill),
    "split_plan": Job(
        SplitPlanRecipe, lambda recipe: [{"CPU": 1.0}], _split_plan, timed=True, rungs=lambda recipe: recipe.rungs
    ),
}


def job_of(recipe: dict[str, Any], source: str | Path) -> Job:
    """The job that a recipe's plain values name.

    Raises:
        RecipeError: there is none that can be searched.
    """
    name = recipe.get("job")
    if name not in JOBS:
        raise RecipeError(f"{source}: job is {name!r}; allowed: {', '.join(JOBS)}")
    return JOBS[name]
