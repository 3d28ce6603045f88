"""Search run: every trial of a space is a Ray Tune trial that drives one run of the job."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from raycloud.cluster.runtime import ray_connection, sigterm_as_interrupt
from raycloud.data.fingerprint import data_sources, fingerprints
from raycloud.errors import Interrupted, RaycloudError, RecipeError, ResultError
from raycloud.origin import Origin
from raycloud.report.console import ProgressBars, console, progress_bars, timed
from raycloud.report.search import print_search, write_search
from raycloud.results import RECIPE, record_inputs
from raycloud.search.compare import best, compare, means_of
from raycloud.search.rows import RowFile, TrialRow, check_recipes, diverged, numbers_of, texts_of
from raycloud.search.space import Metric, Space, Trial
from raycloud.search.trials import TrialSource, trial_source

Summary = dict[str, Any]
OnRung = Callable[[int, Summary], None]
"""Callback with the step of a rung and the summary there; it may end the run by raising."""

_STEP = "step"

_QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0, no tables
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # A failed trial has a row but no metric for ASHA; that must not end the search.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # Ctrl-C ends the search at once; Tune's own handler would wait for its trials.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}


@dataclass(frozen=True)
class SearchResult:
    """Directory of a search, and its comparison."""

    path: Path
    summary: dict[str, Any]


def run(
    space: Space,
    *,
    output: str | Path | None = None,
    rows: str | Path | None = None,
    concurrent: int | None = None,
    overrides: Sequence[str] = (),
) -> SearchResult:
    """Run the trials of a space that have no row yet, and compare all trials.

    Args:
        space: space that :func:`~raycloud.search.space.load_space` returned.
        output: directory of the search, instead of the space's.
        rows: file of rows, instead of ``rows.jsonl`` in that directory. Trials that succeeded in it are not run again.
        concurrent: number of trials at a time, instead of the space's.
        overrides: overrides of the base recipe.

    Raises:
        RaycloudError: an error that the user can fix.
        Interrupted: Ctrl-C or ``ray job stop``; running the same search again continues it.
    """
    path = Path(output or space.output).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise ResultError(f"output: '{path}' is a file; give a directory")
    table = Path(rows).expanduser().absolute() if rows else path / "rows.jsonl"
    with RowFile.open(table) as file:
        work = trial_source(space, overrides, file.rows, path / "trials")
        check_recipes(file.rows, type(work.like[0].recipe), table)
        at_once, rungs = _at_once(space, work, concurrent), _rungs(space, work)
        if work.left:
            with timed("recipes checked"):
                work.check()
        record_inputs(path, fingerprints(_sources(work)))
        Origin.now().record(path)
        console.print(f"{work.total} trials, {work.total - work.left} of them done before")
        before = len(file.rows)
        if work.left:
            _run(space, work, path / "trials", file, min(at_once, work.left), rungs)
        found, ran = work.ended(), len(file.rows) - before
    if ran < work.left:
        console.print(f"{work.left - ran} trials fewer than wanted: there is nothing new left to try")
    failed = sum(row.error is not None for row in found)
    counts = {"trials": len(found), "ran": ran, "failed": failed}
    summary = {**counts, **compare(space, found), "rows": str(table)}
    write_search(path, summary, work.like[0].recipe.dump())
    print_search(summary)
    console.print(f"results: {path}")
    return SearchResult(path, summary)


def _sources(work: TrialSource) -> dict[str, None]:
    """Return the data sources of all trials that are known in advance."""
    kinds: list[Any] = [trial.recipe for trial in work.like]
    return {source: None for recipe in kinds for source in data_sources(recipe.data)}


def _at_once(space: Space, work: TrialSource, concurrent: int | None) -> int:
    wanted = concurrent or space.concurrent
    if wanted > 1 and work.like[0].support.timed:
        raise RecipeError(f"concurrent is {wanted}; allowed: 1, as these trials measure times")
    return wanted


def _rungs(space: Space, work: TrialSource) -> Sequence[int]:
    """Return the rungs at which trials may be stopped; empty if the space has no ``stop_by``."""
    if space.stop_by is None:
        return ()
    one = work.like[0]
    rungs: Sequence[int] = getattr(one.recipe, "rungs") if one.support.rungs else ()  # noqa: B009
    if not rungs:
        raise RecipeError(f"stop_by is '{space.stop_by}'; allowed: null, as these trials have no rungs")
    return rungs


def _run(space: Space, work: TrialSource, folder: Path, file: RowFile, concurrent: int, rungs: Sequence[int]) -> None:
    every = [trial.bundles for trial in work.like]
    most = {
        name: concurrent * max(sum(bundle.get(name, 0) for bundle in bundles) for bundles in every)
        for name in sorted({name for bundles in every for bundle in bundles for name in bundle})
    }
    shares = {name: most.pop(name, 0.0) for name in ("CPU", "GPU")}
    try:
        with (
            ray_connection(most, shares, [bundle for bundles in every for bundle in bundles]),
            sigterm_as_interrupt(),
            TemporaryDirectory(prefix="raycloud-search-") as scratch,
            _environment(_QUIET),
            progress_bars(work.left) as progress,
        ):
            # Trials write their result directories on this node, so their drivers run here, wherever their actors are.
            here = {f"node:{ray.util.get_node_ip_address()}": 0.001}

            def place(config: dict[str, str]) -> tune.PlacementGroupFactory:
                trial = Trial.read(config["trial"])
                own, *rest = trial.bundles
                return tune.PlacementGroupFactory([{**own, **here}, *rest])

            params, tuning = work.tuning()
            tune.Tuner(
                tune.with_resources(_trainable(folder, bool(rungs), [metric.name for metric in space.metrics]), place),
                param_space=params,
                tune_config=tune.TuneConfig(
                    max_concurrent_trials=concurrent,
                    trial_dirname_creator=lambda trial: trial.trial_id,
                    # A new process for each trial would load the same model again.
                    reuse_actors=work.like[0].support.timed,
                    scheduler=_asha(space, rungs) if rungs else None,
                    **tuning,
                ),
                run_config=tune.RunConfig(
                    name="search",
                    storage_path=scratch,
                    verbose=0,
                    callbacks=[_RowWriter(file, space.metrics[0], work, progress)],
                ),
            ).fit()
    except KeyboardInterrupt:
        raise Interrupted("stopped; run the same search again to continue") from None


def _asha(space: Space, rungs: Sequence[int]) -> ASHAScheduler:
    """Return the scheduler that stops, at each rung, trials in the worse half of those that have reached it so far."""
    mode = next(metric.direction for metric in space.metrics if metric.name == space.stop_by)
    return ASHAScheduler(
        time_attr=_STEP,
        metric=space.stop_by,
        mode=mode,
        grace_period=rungs[0],
        max_t=2 * rungs[-1],
        reduction_factor=2,
    )


def _trainable(folder: Path, stoppable: bool, metrics: Sequence[str]) -> Callable[[dict[str, str]], None]:
    """Return the function that Tune runs for a trial: it reports a row, and one per rung if trials may be stopped."""
    where = Path.cwd()

    def trainable(config: dict[str, str]) -> None:
        trial, begun = Trial.read(config["trial"]), time.monotonic()

        def at_rung(step: int, summary: Summary) -> None:
            if stoppable:
                numbers, seconds = numbers_of(summary), time.monotonic() - begun
                row = TrialRow(**_known(trial), metrics=numbers, seconds=seconds, stopped=step)
                finite = {name: value for name, value in numbers.items() if value is not None}
                tune.report({**finite, _STEP: step, "row": row.model_dump_json()})

        with contextlib.chdir(where):
            row = run_trial(trial, folder, at_rung, metrics)
        tune.report({"row": row.model_dump_json()})

    return trainable


def _known(trial: Trial) -> dict[str, Any]:
    return {"variant": trial.variant, "seed": trial.seed, "recipe": trial.recipe.model_dump(mode="json")}


def run_trial(
    trial: Trial, folder: Path, report: OnRung = lambda step, summary: None, metrics: Sequence[str] = ()
) -> TrialRow:
    """Run the job in its own directory under ``folder``, or resume it there; an error becomes a row with ``error``.

    A run whose summary has no finite number for one of ``metrics`` counts as diverged and failed.
    """
    path = folder / trial.folder
    recipe = trial.recipe.model_copy(update={"output": str(path)})
    begun = time.monotonic()
    try:
        options = {"report": report} if trial.support.rungs else {}
        summary = trial.job.run(recipe, "resume" if (path / RECIPE).is_file() else "new", **options).summary
        seconds = float(summary.get("seconds", time.monotonic() - begun))
        numbers = {**{name: None for name in metrics if name in summary}, **numbers_of(summary)}
        row = TrialRow(**_known(trial), metrics=numbers, texts=texts_of(path), seconds=seconds)
        if lost := diverged(row, metrics):
            return row.model_copy(update={"error": f"{', '.join(lost)}: no finite number, the run has diverged"})
        return row
    except Exception as error:
        traceback.print_exc()  # into Ray's log of this process
        return TrialRow(**_known(trial), seconds=time.monotonic() - begun, error=_line(error))


def _line(error: BaseException) -> str:
    if isinstance(error, RaycloudError):
        return str(error)
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _RowWriter(tune.Callback):
    """Callback that writes a row when a trial ends, and shows the progress of the search."""

    def __init__(self, file: RowFile, metric: Metric, work: TrialSource, progress: ProgressBars) -> None:
        self._file, self._metric, self._progress = file, metric, progress
        self._ended = work.ended()
        self._running: list[str] = []
        self._done = 0

    def __reduce__(self) -> tuple[type[tune.Callback], tuple[()]]:
        # Tune pickles its callbacks to restore a run; a search resumes from its rows instead.
        return tune.Callback, ()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = self._of(trial).name
        console.print(f"runs: {name}")
        self._running.append(name)
        self._show()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(self._of(trial), TrialRow.model_validate_json(trial.last_result["row"]))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        mine = self._of(trial)
        error = _line(trial.get_error() or RuntimeError("its process died"))
        self._end(mine, TrialRow(**_known(mine), error=error))

    def _of(self, trial: Any) -> Trial:
        return Trial.read(trial.config["trial"])

    def _end(self, trial: Trial, row: TrialRow) -> None:
        self._file.append(row)
        self._ended.append(row)
        self._done += 1
        self._running.remove(trial.name)
        value = row.metrics.get(self._metric.name)
        said = row.error or f"{self._metric.name} " + ("unknown" if value is None else f"{value:.4g}")
        how = "failed" if row.error else "done" if row.stopped is None else f"stopped at {row.stopped}"
        console.print(f"{how}: {trial.name}: {said}, {row.seconds:.0f} s")
        self._show()

    def _show(self) -> None:
        means = means_of(self._metric, self._ended)
        leader = best(self._metric, means)
        notes = [f"runs: {', '.join(self._running)}"] if self._running else []
        if leader is not None:
            notes.append(f"best so far: {leader} ({self._metric.name} {means[leader]:.4g})")
        self._progress.move("trials", self._done, "; ".join(notes))
