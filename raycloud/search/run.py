"""Running a search: every trial of a space is a Ray Tune trial that drives one run of the job."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray import tune

from raycloud.cluster.bundles import Bundle
from raycloud.cluster.runtime import joined, stoppable
from raycloud.errors import Interrupted, RaycloudError
from raycloud.report.comparison import print_comparison, write_comparison
from raycloud.report.console import Bars, bars, console
from raycloud.results import RECIPE
from raycloud.search.compare import best, compare, means_of
from raycloud.search.rows import Row, RowFile, latest, numbers_of, texts_of
from raycloud.search.space import Metric, Space, Trial, trials

_DRIVER: Bundle = {"CPU": 0.1}
"""What the process that drives a trial takes: it waits, and puts a model together at the end."""

_QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0, no tables
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
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
    wanted = trials(space, overrides)
    table = Path(rows).expanduser().absolute() if rows else path / "rows.jsonl"
    with RowFile.open(table) as file:
        there = latest(file.rows, wanted)
        todo = [
            trial for trial in wanted if trial.fingerprint not in there or there[trial.fingerprint].error is not None
        ]
        console.print(f"{len(wanted)} trials, {len(wanted) - len(todo)} of them done before")
        if todo:
            _run(todo, path / "trials", file, concurrent or space.concurrent, space.metrics[0], list(there.values()))
        ended = latest(file.rows, wanted)
    # In the space's order, whatever the order they ended in.
    found = [ended[trial.fingerprint] for trial in wanted if trial.fingerprint in ended]
    failed = sum(row.error is not None for row in found)
    counts = {"trials": len(wanted), "ran": len(todo), "failed": failed}
    summary = {**counts, **compare(space, found), "rows": str(table)}
    write_comparison(path, summary, wanted[0].recipe.dump())
    print_comparison(summary)
    console.print(f"results: {path}")
    return Result(path, summary)


def _run(todo: list[Trial], folder: Path, file: RowFile, concurrent: int, metric: Metric, before: list[Row]) -> None:
    concurrent = min(concurrent, len(todo))
    every = [[_DRIVER, *trial.job.bundles(trial.recipe)] for trial in todo]
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
            bars(len(todo)) as progress,
        ):
            # Trials write their result directories here, so they are driven here, wherever their actors are.
            here = {f"node:{ray.util.get_node_ip_address()}": 0.001}
            placed = [tune.PlacementGroupFactory([{**own, **here}, *rest]) for own, *rest in every]
            where = Path.cwd()

            def trainable(config: dict[str, int]) -> None:
                with contextlib.chdir(where):
                    row = run_trial(todo[config["trial"]], folder)
                tune.report({"row": row.model_dump(mode="json")})

            tune.Tuner(
                tune.with_resources(trainable, lambda config: placed[config["trial"]]),
                param_space={"trial": tune.grid_search(list(range(len(todo))))},
                tune_config=tune.TuneConfig(
                    max_concurrent_trials=concurrent, trial_dirname_creator=lambda trial: trial.trial_id
                ),
                run_config=tune.RunConfig(
                    name="search",
                    storage_path=scratch,
                    verbose=0,
                    callbacks=[_Rows(todo, file, metric, before, progress)],
                ),
            ).fit()
    except KeyboardInterrupt:
        raise Interrupted("stopped; the same search again goes on from here") from None


def run_trial(trial: Trial, folder: Path) -> Row:
    """One run of the job in a directory of its own under ``folder``; one begun before goes on. A failure is a row."""
    path = folder / trial.folder
    known = {"variant": trial.variant, "seed": trial.seed, "recipe": trial.recipe.model_dump(mode="json")}
    recipe = trial.recipe.model_copy(update={"output": str(path)})
    begun = time.monotonic()
    try:
        summary = trial.job.run(recipe, "resume" if (path / RECIPE).is_file() else "new")
        seconds = float(summary.get("seconds", time.monotonic() - begun))
        return Row(**known, metrics=numbers_of(summary), texts=texts_of(path), seconds=seconds)
    except Exception as error:
        traceback.print_exc()  # in Ray's log of the process
        return Row(**known, seconds=time.monotonic() - begun, error=_line(error))


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

    def __init__(self, todo: list[Trial], file: RowFile, metric: Metric, before: list[Row], progress: Bars) -> None:
        self._todo, self._file, self._metric, self._progress = todo, file, metric, progress
        self._ended = before
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
        self._end(self._of(trial), Row.model_validate(trial.last_result["row"]))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        mine = self._of(trial)
        error = _line(trial.get_error() or RuntimeError("its process died"))
        self._end(
            mine, Row(variant=mine.variant, seed=mine.seed, recipe=mine.recipe.model_dump(mode="json"), error=error)
        )

    def _of(self, trial: Any) -> Trial:
        return self._todo[trial.config["trial"]]

    def _end(self, trial: Trial, row: Row) -> None:
        self._file.append(row)
        self._ended.append(row)
        self._done += 1
        self._running.remove(trial.name)
        value = row.metrics.get(self._metric.name)
        said = row.error or f"{self._metric.name} " + ("unknown" if value is None else f"{value:.4g}")
        console.print(f"{'failed' if row.error else 'done'}: {trial.name}: {said}, {row.seconds:.0f} s")
        self._show()

    def _show(self) -> None:
        means = means_of(self._metric, self._ended)
        leader = best(self._metric, means)
        notes = [f"runs: {', '.join(self._running)}"] if self._running else []
        if leader is not None:
            notes.append(f"best so far: {leader} ({self._metric.name} {means[leader]:.4g})")
        self._progress.move("trials", self._done, "; ".join(notes))
