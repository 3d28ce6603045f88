"""Running a search: every trial of a space is a Ray Tune trial that drives one run of the job."""

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

from raycloud.cluster.runtime import joined, stoppable
from raycloud.errors import Interrupted, RaycloudError, RecipeError
from raycloud.report.comparison import print_comparison, write_comparison
from raycloud.report.console import Bars, bars, console
from raycloud.results import RECIPE
from raycloud.search.compare import best, compare, means_of
from raycloud.search.jobs import Report, Summary
from raycloud.search.rows import Row, RowFile, numbers_of, texts_of
from raycloud.search.space import Metric, Space, Trial
from raycloud.search.work import Work, work_of

_STEP = "step"

_QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0, no tables
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # A trial that failed has a row and no metric for ASHA; that must not end the search.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # Ctrl-C ends the search at once; Tune's own handler would wait for its trials.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}


@dataclass(frozen=True)
class Result:
    """Where a search left what it found, and the comparison."""

    path: Path
    summary: dict[str, Any]


def run(
    space: Space,
    *,
    output: str | Path | None = None,
    rows: str | Path | None = None,
    concurrent: int | None = None,
    overrides: Sequence[str] = (),
) -> Result:
    """Run the trials of a space that have no row yet, and compare them all.

    Args:
        space: what :func:`~raycloud.search.space.load_space` returned.
        output: the directory of the search, instead of the space's.
        rows: the table, instead of ``rows.jsonl`` in there. Trials that succeeded in it are not run again.
        concurrent: trials at a time, instead of the space's number.
        overrides: of the base recipe.

    Raises:
        RaycloudError: whatever the user can mend.
        Interrupted: Ctrl-C or ``ray job stop``; the same search again goes on from there.
    """
    path = Path(output or space.output).expanduser().absolute()
    table = Path(rows).expanduser().absolute() if rows else path / "rows.jsonl"
    with RowFile.open(table) as file:
        work = work_of(space, overrides, file.rows, path / "trials")
        at_once, rungs = _at_once(space, work, concurrent), _rungs(space, work)
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
    write_comparison(path, summary, work.like[0].recipe.dump())
    print_comparison(summary)
    console.print(f"results: {path}")
    return Result(path, summary)


def _at_once(space: Space, work: Work, concurrent: int | None) -> int:
    wanted = concurrent or space.concurrent
    if wanted > 1 and work.like[0].job.timed:
        raise RecipeError(f"concurrent is {wanted}; allowed: 1, as these trials take the time of what they run")
    return wanted


def _rungs(space: Space, work: Work) -> Sequence[int]:
    """The rungs at which trials may be stopped; none where the space stops none."""
    if space.stop_by is None:
        return ()
    one = work.like[0]
    rungs = one.job.rungs(one.recipe)
    if not rungs:
        raise RecipeError(f"stop_by is '{space.stop_by}'; allowed: null, as these trials have no rungs")
    return rungs


def _run(space: Space, work: Work, folder: Path, file: RowFile, concurrent: int, rungs: Sequence[int]) -> None:
    every = [trial.job.bundles(trial.recipe) for trial in work.like]
    most = {
        name: concurrent * max(sum(bundle.get(name, 0) for bundle in bundles) for bundles in every)
        for name in sorted({name for bundles in every for bundle in bundles for name in bundle})
    }
    shares = {name: most.pop(name, 0.0) for name in ("CPU", "GPU")}
    try:
        with (
            joined(most, shares, [bundle for bundles in every for bundle in bundles]),
            stoppable(),
            TemporaryDirectory(prefix="raycloud-search-") as scratch,
            _environment(_QUIET),
            bars(work.left) as progress,
        ):
            # Trials write their result directories here, so they are driven here, wherever their actors are.
            here = {f"node:{ray.util.get_node_ip_address()}": 0.001}

            def place(config: dict[str, str]) -> tune.PlacementGroupFactory:
                trial = Trial.read(config["trial"])
                own, *rest = trial.job.bundles(trial.recipe)
                return tune.PlacementGroupFactory([{**own, **here}, *rest])

            params, tuning = work.tuning()
            tune.Tuner(
                tune.with_resources(_trainable(folder, bool(rungs)), place),
                param_space=params,
                tune_config=tune.TuneConfig(
                    max_concurrent_trials=concurrent,
                    trial_dirname_creator=lambda trial: trial.trial_id,
                    # One process after another would load the same model each time.
                    reuse_actors=work.like[0].job.timed,
                    scheduler=_halving(space, rungs) if rungs else None,
                    **tuning,
                ),
                run_config=tune.RunConfig(
                    name="search",
                    storage_path=scratch,
                    verbose=0,
                    callbacks=[_Rows(file, space.metrics[0], work, progress)],
                ),
            ).fit()
    except KeyboardInterrupt:
        raise Interrupted("stopped; the same search again goes on from here") from None


def _halving(space: Space, rungs: Sequence[int]) -> ASHAScheduler:
    """Stops, at each rung, the trials that are in the worse half of those that came there so far."""
    mode = next(metric.direction for metric in space.metrics if metric.name == space.stop_by)
    return ASHAScheduler(
        time_attr=_STEP,
        metric=space.stop_by,
        mode=mode,
        grace_period=rungs[0],
        max_t=2 * rungs[-1],
        reduction_factor=2,
    )


def _trainable(folder: Path, stoppable: bool) -> Callable[[dict[str, str]], None]:
    """What Tune runs for every trial: it reports the row, and before that one for each rung if it may be stopped."""
    where = Path.cwd()

    def trainable(config: dict[str, str]) -> None:
        trial, begun = Trial.read(config["trial"]), time.monotonic()

        def at_rung(step: int, summary: Summary) -> None:
            if stoppable:
                numbers, seconds = numbers_of(summary), time.monotonic() - begun
                row = Row(**_known(trial), metrics=numbers, seconds=seconds, stopped=step)
                finite = {name: value for name, value in numbers.items() if value is not None}
                tune.report({**finite, _STEP: step, "row": row.model_dump_json()})

        with contextlib.chdir(where):
            row = run_trial(trial, folder, at_rung)
        tune.report({"row": row.model_dump_json()})

    return trainable


def _known(trial: Trial) -> dict[str, Any]:
    return {"variant": trial.variant, "seed": trial.seed, "recipe": trial.recipe.model_dump(mode="json")}


def run_trial(trial: Trial, folder: Path, report: Report = lambda step, summary: None) -> Row:
    """One run of the job in a directory of its own under ``folder``; one begun before goes on. A failure is a row."""
    path = folder / trial.folder
    recipe = trial.recipe.model_copy(update={"output": str(path)})
    begun = time.monotonic()
    try:
        summary = trial.job.run(recipe, "resume" if (path / RECIPE).is_file() else "new", report)
        seconds = float(summary.get("seconds", time.monotonic() - begun))
        return Row(**_known(trial), metrics=numbers_of(summary), texts=texts_of(path), seconds=seconds)
    except Exception as error:
        traceback.print_exc()  # in Ray's log of the process
        return Row(**_known(trial), seconds=time.monotonic() - begun, error=_line(error))


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


class _Rows(tune.Callback):
    """Writes a row when a trial ends, and says how the search goes."""

    def __init__(self, file: RowFile, metric: Metric, work: Work, progress: Bars) -> None:
        self._file, self._metric, self._progress = file, metric, progress
        self._ended = work.ended()
        self._running: list[str] = []
        self._done = 0

    def __reduce__(self) -> tuple[type[tune.Callback], tuple[()]]:
        # Tune keeps a copy of everything for restoring a run; a search goes on from its rows instead.
        return tune.Callback, ()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = self._of(trial).name
        console.print(f"runs: {name}")
        self._running.append(name)
        self._show()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(self._of(trial), Row.model_validate_json(trial.last_result["row"]))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        mine = self._of(trial)
        error = _line(trial.get_error() or RuntimeError("its process died"))
        self._end(mine, Row(**_known(mine), error=error))

    def _of(self, trial: Any) -> Trial:
        return Trial.read(trial.config["trial"])

    def _end(self, trial: Trial, row: Row) -> None:
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
