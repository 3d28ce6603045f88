"""Rows of a search as JSON lines, one row for every finished trial."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from raycloud.durable import no_follow, writing
from raycloud.errors import RecipeError, ResultError
from raycloud.recipe import Recipe
from raycloud.search.space import Trial, fingerprint

HELD_OUT = "held_out.jsonl"
_DIGITS = 6

Scores = dict[str, float]
"""Scores by text; the key is ``group/number`` of the held-out text."""


class TrialRow(Recipe):
    """Result of one trial."""

    variant: str
    seed: int
    recipe: dict[str, Any]
    """Recipe of the trial; it identifies a successful trial in any file of rows."""
    metrics: dict[str, float | None] = {}
    """Numbers of the run's summary; None for a number that is not finite."""
    texts: dict[str, Scores] = {}
    """Means over the tokens of each held-out text: ``nll``, and ``kl`` and ``agreement`` with the teacher over the
    tokens that can be compared."""
    seconds: float = 0.0
    error: str | None = None
    """Error message of a failed trial."""
    stopped: int | None = None
    """Rung, in the job's steps, at which the trial was stopped; its numbers are those at that rung."""


def diverged(row: TrialRow, metrics: Iterable[str]) -> list[str]:
    """Return the given metrics that have no finite number in a trial that ran to its end."""
    return [] if row.stopped is not None else [name for name in metrics if row.metrics.get(name, 0.0) is None]


def numbers_of(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the numbers at the top level of a run's summary; None for one that is not finite."""
    kinds = (int, float)
    return {
        name: float(value) if math.isfinite(value) else None
        for name, value in summary.items()
        if isinstance(value, kinds) and not isinstance(value, bool)
    }


def texts_of(directory: Path) -> dict[str, Scores]:
    """Return the scores of each held-out text that a run wrote; empty if it wrote none."""
    path = directory / HELD_OUT
    if not path.is_file():
        return {}
    scores: dict[str, Scores] = {"nll": {}, "kl": {}, "agreement": {}}
    for line in path.read_text(encoding="utf-8").splitlines():
        one = json.loads(line)
        for name, key, count in (
            ("nll", "nll", "tokens"),
            ("kl", "kl", "compared"),
            ("agreement", "agree", "compared"),
        ):
            if one[count] and one[key] is not None and math.isfinite(one[key]):
                scores[name][f"{one['group']}/{one['text']}"] = round(one[key] / one[count], _DIGITS)
    return {name: some for name, some in scores.items() if some}


class RowFile:
    """File of rows, locked by one search at a time. Open it with :meth:`open`."""

    def __init__(self, file: IO[bytes], rows: list[TrialRow]) -> None:
        self._file, self.rows = file, rows

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[RowFile]:
        """Create or open and lock the file; an incomplete last line, left by a crash, is removed.

        Raises:
            ResultError: another search has locked it, it is a symbolic link, or a line is not a valid row.
        """
        if path.is_symlink():
            raise ResultError(f"rows '{path}' is a symbolic link; give the file that it leads to")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b", opener=no_follow) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ResultError(f"rows '{path}' are in use by another search") from None
            file.seek(0)
            content = file.read()
            whole = content.rfind(b"\n") + 1
            rows = [_row(line, f"rows '{path}', line {n}") for n, line in enumerate(content[:whole].splitlines(), 1)]
            try:
                rows += [_row(line, "") for line in content[whole:].splitlines()]
                file.write(b"\n" if content[whole:] else b"")
            except ResultError:
                file.truncate(whole)
            yield cls(file, rows)

    def append(self, row: TrialRow) -> None:
        """Append a row; when this returns, the whole row is on the disk."""
        with writing(Path(self._file.name)):
            self._file.write(row.model_dump_json().encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        self.rows.append(row)


def _row(line: bytes, where: str) -> TrialRow:
    try:
        return TrialRow.model_validate_json(line)
    except ValidationError as error:
        raise ResultError(f"{where}: {error.errors(include_url=False)[0]['msg']}") from None


def check_recipes(rows: Sequence[TrialRow], kind: type[Recipe], path: Path) -> None:
    """Check the recipes in the rows of a job, so that no row is passed over because its keys have other names today.

    Args:
        rows: all rows of a file.
        kind: recipe class of the job; rows of other jobs are not checked.
        path: the file.

    Raises:
        ResultError: a recipe is invalid; the message names the line and the key.
    """
    for number, row in enumerate(rows, 1):
        if row.recipe.get("job") == kind.model_fields["job"].default:
            try:
                kind.parse(row.recipe, source=f"rows '{path}', line {number}")
            except RecipeError as error:
                raise ResultError(str(error)) from None


def latest(rows: Iterable[TrialRow], trials: Iterable[Trial]) -> dict[str, TrialRow]:
    """Return the latest row of each of these trials, by the trial's fingerprint.

    A row's recipe is validated with today's class, so fields added since have their defaults.
    """
    wanted = {trial.fingerprint: trial.job.recipe_class for trial in trials}
    found: dict[str, TrialRow] = {}
    for row in rows:
        for kind in set(wanted.values()):
            try:
                known = fingerprint(kind.model_validate(row.recipe))
            except ValidationError:
                continue
            if known in wanted:
                found[known] = row
    return found
