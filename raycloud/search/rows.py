"""The table of a search as JSON lines: a row for every trial that ended."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from raycloud.errors import ResultError
from raycloud.recipe import Recipe
from raycloud.search.space import Trial, fingerprint

HELD_OUT = "held_out.jsonl"
_DIGITS = 6

Scores = dict[str, float]
"""A number for every held-out text, by ``group/number``."""


class Row(Recipe):
    """How one trial ended."""

    variant: str
    seed: int
    recipe: dict[str, Any]
    """What was run: a trial that succeeded once is known by it wherever the row is found."""
    metrics: dict[str, float | None] = {}
    """The numbers of the run's summary; None for one that is not finite."""
    texts: dict[str, Scores] = {}
    """Means over the tokens of each held-out text: ``nll``, and ``kl`` and ``agreement`` with the teacher over those
    that can be compared."""
    seconds: float = 0.0
    error: str | None = None
    """Why it failed."""
    stopped: int | None = None
    """The rung, in the job's steps, at which it was stopped; its numbers are those of that rung."""


def numbers_of(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers at the top of a run's summary."""
    kinds = (int, float)
    return {
        name: float(value) if math.isfinite(value) else None
        for name, value in summary.items()
        if isinstance(value, kinds) and not isinstance(value, bool)
    }


def texts_of(directory: Path) -> dict[str, Scores]:
    """What a run left about each held-out text; empty where it left nothing."""
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
            if one[count] and math.isfinite(one[key]):
                scores[name][f"{one['group']}/{one['text']}"] = round(one[key] / one[count], _DIGITS)
    return {name: some for name, some in scores.items() if some}


class RowFile:
    """The file, held by one search at a time. Open it with :meth:`open`."""

    def __init__(self, file: IO[bytes], rows: list[Row]) -> None:
        self._file, self.rows = file, rows

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[RowFile]:
        """Make or take over the file; a last line that a crash cut short is dropped.

        Raises:
            ResultError: another search holds it, or a line is no row.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
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

    def append(self, row: Row) -> None:
        """Add a row; it is on the disk, as a whole, when this returns."""
        self._file.write(row.model_dump_json().encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows.append(row)


def _row(line: bytes, where: str) -> Row:
    try:
        return Row.model_validate_json(line)
    except ValidationError as error:
        raise ResultError(f"{where}: {error.errors(include_url=False)[0]['msg']}") from None


def latest(rows: Iterable[Row], trials: Iterable[Trial]) -> dict[str, Row]:
    """The last row of each of these trials, by the trial's fingerprint.

    A row's recipe is read as one of today, so that fields that came since have their defaults.
    """
    wanted = {trial.fingerprint: trial.job.recipe for trial in trials}
    found: dict[str, Row] = {}
    for row in rows:
        for kind in set(wanted.values()):
            try:
                known = fingerprint(kind.model_validate(row.recipe))
            except ValidationError:
                continue
            if known in wanted:
                found[known] = row
    return found
