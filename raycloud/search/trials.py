"""Trials of a search: those that have rows, and those that are still to be run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from ray import tune

from raycloud.errors import RaycloudError, RecipeError
from raycloud.recipe import read_yaml
from raycloud.results import RECIPE
from raycloud.search.domain import Point
from raycloud.search.rows import TrialRow, latest
from raycloud.search.space import Space, Trial, example_trial, examples, point_of, trial_at, trials


class TrialSource(Protocol):
    """Source of the trials of one search."""

    like: Sequence[Trial]
    """Example trials, at least one, that show which resources and data the trials need."""
    total: int
    """Total number of trials."""
    left: int
    """Number of trials that are still to be run."""

    def tuning(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return Ray Tune's ``param_space`` and arguments of its ``TuneConfig``; a trial's config is its ``plain``."""
        ...

    def check(self) -> None:
        """Check the recipes that are to be run, as far as they are known, before any run.

        Raises:
            RaycloudError: see :meth:`raycloud.search.space.Trial.check`.
        """
        ...

    def ended(self) -> list[TrialRow]:
        """Return the latest row of every trial that ended."""
        ...


class ListedTrials:
    """Trials of an enumerated space; failed trials are run again."""

    def __init__(self, space: Space, overrides: Sequence[str], rows: list[TrialRow]) -> None:
        self.like: Sequence[Trial] = trials(space, overrides)
        self._rows = rows
        good = {name for name, row in latest(rows, self.like).items() if row.error is None}
        self._todo = [trial for trial in self.like if trial.fingerprint not in good]
        self.total, self.left = len(self.like), len(self._todo)

    def tuning(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return a grid search over the remaining trials."""
        return {"trial": tune.grid_search([trial.plain() for trial in self._todo])}, {}

    def check(self) -> None:
        """Check each variant once: its seeds make no difference before a run."""
        for trial in {trial.variant: trial for trial in self._todo}.values():
            trial.check()

    def ended(self) -> list[TrialRow]:
        """Return the rows in the order of the space."""
        found = latest(self._rows, self.like)
        return [found[trial.fingerprint] for trial in self.like if trial.fingerprint in found]


class SampledTrials:
    """Trials of a sampled space: the rows of its points, and the proposals of an optimizer.

    Unfinished and failed trials are proposed first.

    Args:
        space: loaded space.
        overrides: overrides of its base recipe.
        rows: rows of the file, which may grow; rows of other spaces are ignored.
        folder: folder of the trials' result directories.
    """

    def __init__(self, space: Space, overrides: Sequence[str], rows: list[TrialRow], folder: Path) -> None:
        self._space, self._overrides, self._rows, self._folder = space, overrides, rows, folder
        self.like: Sequence[Trial] = [example_trial(space, overrides)]
        self._good = [(point, row) for point, row in self._found() if row.error is None]
        self.left = max(0, space.trials - len(self._good))
        self.total = self.left + len(self._good)

    def tuning(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return an optimizer that knows the rows."""
        from raycloud.search.sampling import OptunaProposals

        again = [point for point, row in self._found() if row.error is not None]
        first = again + [point for point in self._begun() if point not in again]
        proposals = OptunaProposals(self._space, self._overrides, self._good, first)
        return {}, {"search_alg": proposals, "num_samples": self.left}

    def check(self) -> None:
        """Check the points at the ends of the domains until one is valid: a model may allow only part of the space."""
        first: RaycloudError | None = None
        for trial in examples(self._space, self._overrides):
            try:
                return trial.check()
            except RecipeError as error:
                first = first or error
        if first is not None:
            raise first

    def ended(self) -> list[TrialRow]:
        """Return the rows in the order in which their trials first ended."""
        return [row for _, row in self._found()]

    def _found(self) -> list[tuple[Point, TrialRow]]:
        mine = [
            (point, trial_at(self._space, point, self._overrides))
            for row in self._rows
            if (point := point_of(self._space, row.recipe, self._overrides)) is not None
        ]
        points = {trial.fingerprint: point for point, trial in mine}
        found = latest(self._rows, [trial for _, trial in mine])
        return [(point, found[name]) for name, point in points.items()]

    def _begun(self) -> Iterator[Point]:
        """Yield the points of result directories without a row."""
        known = [point for point, _ in self._found()]
        for path in sorted(self._folder.glob(f"*/{RECIPE}")):
            try:
                point = point_of(self._space, read_yaml(path), self._overrides)
            except RecipeError:
                continue
            if point is not None and point not in known:
                yield point


def trial_source(space: Space, overrides: Sequence[str], rows: list[TrialRow], folder: Path) -> TrialSource:
    """Return the trials of a loaded space.

    Raises:
        RecipeError: one of its recipes is invalid.
    """
    return SampledTrials(space, overrides, rows, folder) if space.sample else ListedTrials(space, overrides, rows)
