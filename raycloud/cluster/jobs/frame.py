"""What every job on the cluster does around its own work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from raycloud.cluster.bundles import bundles_of
from raycloud.cluster.capacity import summed
from raycloud.cluster.run_log import RunLog, gathered
from raycloud.cluster.runtime import joined, stoppable
from raycloud.cluster.teacher.recipe import TuneTeacherRecipe
from raycloud.distill.recipe import DistillRecipe
from raycloud.errors import ClusterError, RaycloudError
from raycloud.recipe import Placement
from raycloud.report.console import console
from raycloud.results import Mode, ResultDir, resumable
from raycloud.split.finetune.recipe import SplitTuneRecipe

_ANSWER_S = 3600.0
"""The longest one answer of a cloud actor may take: loading its model, cutting a student, an examination."""


def placed(placement: Placement, tier: str) -> dict[str, Any]:
    """The options of an actor in the tier ``cloud`` or ``edge``."""
    return {"num_cpus": placement.num_cpus, "num_gpus": placement.num_gpus, "resources": {tier: 1}}


def answered(refs: Any, who: str) -> Any:
    """What an actor in the cloud, which a job cannot do without, answers.

    Raises:
        RayTaskError: it failed at what it was asked.
        ClusterError: it does not answer.
    """
    try:
        return ray.get(refs, timeout=_ANSWER_S)
    except RayTaskError:
        raise
    except RayError as error:
        raise ClusterError(f"the {who} does not answer: {str(error).splitlines()[0]}") from error


@dataclass(frozen=True)
class Result:
    """Where a run left what it made, and its headline numbers."""

    path: Path
    summary: dict[str, Any]


@contextmanager
def on_cluster(
    recipe: DistillRecipe | TuneTeacherRecipe | SplitTuneRecipe, mode: Mode
) -> Iterator[tuple[ResultDir, RunLog]]:
    """The result directory of a run, open for as long as a cluster that can hold its actors is joined, and their log.

    Raises:
        ClusterError: there is no such cluster.
        ResultError: the mode and what is on disk do not agree.
        RaycloudError: an actor's own error, without the trace that Ray wraps around it.
        Interrupted: Ctrl-C or ``ray job stop``; the directory can be resumed.
    """
    actors = bundles_of(recipe)
    needs = summed(actors)
    shares = {name: needs.pop(name, 0.0) for name in ("CPU", "GPU")}
    try:
        with (
            resumable(recipe.output),
            joined(needs, shares, actors),
            stoppable(),
            ResultDir.open(recipe.output, recipe, mode) as results,
            gathered(results.log_file) as log,
        ):
            yield results, log
    except RayTaskError as error:
        if isinstance(error.cause, RaycloudError):
            raise error.cause from None
        raise


def finished(results: ResultDir) -> Result | None:
    """What a run that came to its end earlier left; None if there is work to do."""
    summary = results.summary()
    if summary is None:
        return None
    console.print(f"'{results.path}' is complete")
    return Result(results.path, summary)
