"""Versions of finished runs: the histories in a result directory, and the way back to a version."""

from __future__ import annotations

from pathlib import Path

from raycloud.errors import ResultError
from raycloud.jobs.registry import job_named
from raycloud.recipe import read_yaml
from raycloud.results import RECIPE, SUMMARY, locked
from raycloud.rounds.versions import VersionRecord, VersionStore, histories


def histories_in(folder: Path) -> dict[str, VersionStore]:
    """Return the histories of a result directory by cohort; the name is empty if there is only one.

    Raises:
        ResultError: it is no result directory, or has no versions.
    """
    if not (folder / RECIPE).is_file():
        raise ResultError(f"'{folder}' is no result directory (it holds no {RECIPE})")
    if not (found := histories(folder)):
        raise ResultError(f"'{folder}' has no versions; jobs whose edges go through rounds keep them")
    return found


def history_of(folder: Path, cohort: str | None = None) -> tuple[str, VersionStore]:
    """Return the name and the history of a cohort.

    Args:
        folder: result directory.
        cohort: name of the cohort; None if the run has only one history.

    Raises:
        ResultError: see :func:`histories_in`; or there is no such cohort, or several and none is named.
    """
    found = histories_in(folder)
    if cohort is None and len(found) > 1:
        raise ResultError(f"'{folder}' has a history for each cohort; give --cohort, one of: {', '.join(found)}")
    name = next(iter(found)) if cohort is None else cohort
    if name not in found:
        allowed = ", ".join(one for one in found if one) or "none, it has one history"
        raise ResultError(f"no cohort '{name}' in '{folder}'; allowed: {allowed}")
    return name, found[name]


def rollback(folder: Path, version: int, cohort: str | None = None) -> VersionRecord:
    """Write the trained model of a finished run as it was at a version, and add that to the history.

    Args:
        folder: result directory.
        version: number of the version.
        cohort: see :func:`history_of`.

    Returns:
        Record of the version that was added.

    Raises:
        ResultError: see :func:`history_of`; or there is no such version, or the run is not complete.
        ChecksumError: a file of the history is damaged.
        RaycloudError: the model cannot be written; the history then stays as it is.
    """
    folder = folder.expanduser().absolute()
    history_of(folder, cohort)
    with locked(folder):
        name, history = history_of(folder, cohort)
        if not (folder / SUMMARY).is_file():
            raise ResultError(f"the run in '{folder}' is not complete; continue it with --resume first")
        job = job_named(read_yaml(folder / RECIPE).get("job"))
        if job.restore is None:
            raise ResultError(f"'{folder}' is of the job '{job.name}', whose versions cannot be restored")
        # The model first: where the history says that it was restored, it was.
        job.restore(folder, name, history.weights(version))
        return history.rollback(version)
