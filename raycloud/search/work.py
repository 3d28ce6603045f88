"""What a search has to do: which of its trials have rows, and where the others come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from ray import tune

from raycloud.errors import RecipeError
from raycloud.recipe import read_yaml
from raycloud.results import RECIPE
from raycloud.search.domain import Point
from raycloud.search.rows import Row, latest
from raycloud.search.space import Space, Trial, example, point_of, trial_at, trials


class Work(Protocol):
    """The trials of one search."""

    like: Sequence[Trial]
    """At least one, by which to see what trials need."""
    total: int
    """How many trials there are to be in all."""
    left: int
    """How many of them are to be run."""

    def tuning(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Ray Tune's ``param_space`` and arguments of its ``TuneConfig``: every trial's config is its ``plain``."""
        ...

    def ended(self) -> list[Row]:
        """The latest row of every trial that ended."""
        ...


class Counted:
    """The trials of a space that counts them out; those that failed are run again."""

    def __init__(self, space: Space, overrides: Sequence[str], rows: list[Row]) -> None:
        self.like: Sequence[Trial] = trials(space, overrides)
        self._rows = rows
        good = {name for name, row in latest(rows, self.like).items() if row.error is None}
        self._todo = [trial for trial in self.like if trial.fingerprint not in good]
        self.total, self.left = len(self.like), len(self._todo)

    def tuning(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """A grid of one dimension."""
        return {"trial": tune.grid_search([trial.plain() for trial in self._todo])}, {}

    def ended(self) -> list[Row]:
        """In the space's order, whatever the order they ended in."""
        found = latest(self._rows, self.like)
        return [found[trial.fingerprint] for trial in self.like if trial.fingerprint in found]


class Sampled:
    """The trials of a space that samples: rows of its points, and what an optimiser proposes.

    Those begun before and those that failed are proposed first.

    Args:
        space: a loaded space.
        overrides: of its base recipe.
        rows: of the file; those of other spaces do not count. The list may grow.
        folder: of the trials' result directories.
    """

    def __init__(self, space: Space, overrides: Sequence[str], rows: list[Row], folder: Path) -> None:
        self._space, self._overrides, self._rows, self._folder = space, overrides, rows, folder
        self.like: Sequence[Trial] = [example(space, overrides)]
        self._good = [(point, row) for point, row in self._found() if row.error is None]
        self.left = max(0, space.trials - len(self._good))
        self.total = self.left + len(self._good)

    def tuning(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """An optimiser that knows the rows."""
        from raycloud.search.sampling import Proposals

        again = [point for point, row in self._found() if row.error is not None]
        first = again + [point for point in self._begun() if point not in again]
        proposals = Proposals(self._space, self._overrides, self._good, first)
        return {}, {"search_alg": proposals, "num_samples": self.left}

    def ended(self) -> list[Row]:
        """In the order in which the trials ended first."""
        return [row for _, row in self._found()]

    def _found(self) -> list[tuple[Point, Row]]:
        mine = [
            (point, trial_at(self._space, point, self._overrides))
            for row in self._rows
            if (point := point_of(self._space, row.recipe, self._overrides)) is not None
        ]
        points = {trial.fingerprint: point for point, trial in mine}
        found = latest(self._rows, [trial for _, trial in mine])
        return [(point, found[name]) for name, point in points.items()]

    def _begun(self) -> Iterator[Point]:
        """Points whose directories have no row."""
        known = [point for point, _ in self._found()]
        for path in sorted(self._folder.glob(f"*/{RECIPE}")):
            try:
                point = point_of(self._space, read_yaml(path), self._overrides)
            except RecipeError:
                continue
            if point is not None and point not in known:
                yield point


def work_of(space: Space, overrides: Sequence[str], rows: list[Row], folder: Path) -> Work:
    """The work of a loaded space.

    Raises:
        RecipeError: a recipe of it is not valid.
    """
    return Sampled(space, overrides, rows, folder) if space.sample else Counted(space, overrides, rows)
