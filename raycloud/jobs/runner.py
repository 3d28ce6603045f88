"""Functions that every job on the cluster shares: result directory, Ray connection, log and calls of actors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from raycloud.cluster.capacity import total_resources
from raycloud.cluster.run_log import RunLog, collect_logs
from raycloud.cluster.runtime import ray_connection, sigterm_as_interrupt
from raycloud.data.fingerprint import data_sources, fingerprints
from raycloud.data.sources import HasSource
from raycloud.errors import ClusterError, RaycloudError
from raycloud.recipe import Bundle, Placement, Recipe
from raycloud.report.console import console
from raycloud.results import Mode, ResultDir, check_inputs, resumable, summary_of

Summary = dict[str, Any]
"""Headline numbers of a run, as in ``summary.json``."""

_ANSWER_S = 3600.0
"""Timeout in seconds of one call of a cloud actor: loading its model, making a student, an evaluation."""


def actor_options(placement: Placement, tier: str) -> dict[str, Any]:
    """Return the Ray options of an actor in the tier ``cloud`` or ``edge``."""
    return {"num_cpus": placement.num_cpus, "num_gpus": placement.num_gpus, "resources": {tier: 1}}


def get_result(refs: Any, who: str) -> Any:
    """Return the result of a call of a cloud actor, without which the job cannot run.

    Raises:
        RayTaskError: the call failed.
        ClusterError: the actor does not answer.
    """
    try:
        return ray.get(refs, timeout=_ANSWER_S)
    except RayTaskError:
        raise
    except RayError as error:
        raise ClusterError(f"the {who} does not answer: {str(error).splitlines()[0]}") from error


@contextmanager
def cluster_run(
    recipe: Recipe, output: str, mode: Mode, actors: Sequence[Bundle]
) -> Iterator[tuple[ResultDir, RunLog]]:
    """Open the result directory of a run, connect to a cluster that can hold its actors, and collect their log.

    Args:
        recipe: recipe of the run.
        output: its result directory.
        mode: ``new``, ``resume`` or ``overwrite``.
        actors: resources of each actor.

    Raises:
        ClusterError: there is no such cluster.
        ResultError: the mode does not match what is on disk.
        RaycloudError: an actor's own error, without the trace that Ray wraps around it.
        Interrupted: Ctrl-C or ``ray job stop``; the directory can be resumed.
    """
    needs = total_resources(actors)
    shares = {name: needs.pop(name, 0.0) for name in ("CPU", "GPU")}
    try:
        with (
            resumable(output),
            ray_connection(needs, shares, actors),
            sigterm_as_interrupt(),
            ResultDir.open(output, recipe, mode) as results,
            collect_logs(results.log_file) as log,
        ):
            yield results, log
    except RayTaskError as error:
        if isinstance(error.cause, RaycloudError):
            raise error.cause from None
        raise


def check_same_inputs(data: HasSource, output: str, mode: Mode) -> dict[str, str]:
    """Return the fingerprints of a run's data files, which must not change before a resume; needs no cluster.

    Raises:
        DataError: a file is missing.
        ResultError: the data have changed.
    """
    found = fingerprints(data_sources(data))
    if mode == "resume":
        check_inputs(Path(output).expanduser().absolute(), found)
    return found


def finished_summary(recipe: Recipe, output: str, mode: Mode) -> Summary | None:
    """Return the summary of a run that is already complete; None if there is work to do. Needs no cluster.

    Raises:
        ResultError: the mode does not match what is on disk.
    """
    where = ResultDir.check(output, recipe, mode)
    if mode != "resume" or (summary := summary_of(where)) is None:
        return None
    console.print(f"'{where}' is complete")
    return summary
