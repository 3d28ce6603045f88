"""Result directories: the recipe as run, metrics, log, summary, and the state that resuming a killed run needs."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

from raycloud.durable import check_folder, no_follow, remove_scratch, write_atomically, writing
from raycloud.errors import Interrupted, RaycloudError, ResultError
from raycloud.logs import log_into
from raycloud.origin import ORIGIN, Origin
from raycloud.recipe import Recipe

Mode = Literal["new", "resume", "overwrite"]

RECIPE = "recipe.yaml"
SUMMARY = "summary.json"
LOG = "log.jsonl"
RUN_ID = "run_id"
LOCK = ".lock"
INPUTS = "inputs.json"

_LOG = logging.getLogger(__name__)


def cached_path(folder: Path, about: Any, suffix: str) -> Path:
    """Path in a cache folder for a value that depends only on ``about``, which must be plain JSON."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]
    return folder / f"{digest}.{suffix}"


def cached_json(folder: Path, about: Any, compute: Callable[[], Any]) -> Any:
    """Return the result of ``compute`` as plain JSON, from a file in the cache folder if there is one.

    Args:
        folder: cache folder, with one file per value.
        about: everything the value depends on, as plain JSON.
        compute: called if the file is missing or cannot be read.
    """
    path = cached_path(folder, about, "json")
    with suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    found = compute()
    write_atomically(path, plain_json(found))
    return found


def plain_json(value: Any, *, indent: int | None = None) -> str:
    """Write standard JSON: numbers that are not finite, which JSON lacks, become null."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    match value:
        case dict():
            return {key: _finite(one) for key, one in value.items()}
        case list() | tuple():
            return [_finite(one) for one in value]
        case float() if not math.isfinite(value):
            return None
    return value


def in_use(path: Path) -> bool:
    """Tell whether a process holds the lock of this file, such as the :data:`LOCK` of a result directory."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: several processes may test at once
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


@contextmanager
def locked(where: Path) -> Iterator[IO[str]]:
    """Hold the lock of an existing result directory, so that no other process writes to it.

    What killed writers have left in it is removed.

    Raises:
        ResultError: another process holds it.
    """
    with open(where / LOCK, "w", opener=no_follow) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _used(where) from None
        for folder, _, _ in os.walk(where):
            remove_scratch(Path(folder))
        yield lock


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read the records of a file with one JSON object per line; stop at a line that a crash left incomplete."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def summary_of(where: Path) -> dict[str, Any] | None:
    """Read the summary of a result directory; None if its run has not finished."""
    path = where / SUMMARY
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def check_inputs(folder: Path, inputs: Mapping[str, str]) -> None:
    """Check that the data sets are those recorded in a folder; nothing is written.

    Args:
        folder: folder in which :func:`record_inputs` may have been called before.
        inputs: fingerprint of each data set by name. Only names that are both given and recorded are compared.

    Raises:
        ResultError: a data set has changed.
    """
    for name, known in _inputs(folder).items():
        if inputs.get(name, known) != known:
            raise ResultError(
                f"cannot continue in '{folder}': the data of '{name}' has changed; restore the former data, or start "
                "again (--overwrite, or another folder)"
            )


def record_inputs(folder: Path, inputs: Mapping[str, str]) -> None:
    """Record the fingerprints of data sets in a folder, so that resuming with other data is detected.

    Raises:
        ResultError: see :func:`check_inputs`.
    """
    check_inputs(folder, inputs)
    known = _inputs(folder)
    if inputs.keys() - known.keys():
        write_atomically(folder / INPUTS, plain_json({**known, **inputs}, indent=2) + "\n")


def _inputs(folder: Path) -> dict[str, str]:
    path = folder / INPUTS
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return {str(name): str(value) for name, value in found.items()}
    except (ValueError, AttributeError) as error:
        raise ResultError(f"cannot read '{path}': {error}") from None


@contextmanager
def resumable(path: str | Path | None) -> Iterator[None]:
    """Turn Ctrl-C inside into an error that says how to resume the run.

    Args:
        path: result directory; None if the run keeps nothing.

    Raises:
        Interrupted: instead of ``KeyboardInterrupt``.
    """
    try:
        yield
    except KeyboardInterrupt:
        if path is not None and (Path(path).expanduser() / RECIPE).is_file():
            raise Interrupted(f"stopped; continue with --resume (results so far: {path})") from None
        raise Interrupted("stopped before there were results to keep") from None


class ResultDir:
    """Directory that one run writes. Open it with :meth:`open`; only one process at a time can hold it.

    Args:
        path: path of the directory.
        lock: its lock file, locked.
        run_id: id of the run in logs and metrics; a resumed run keeps it.
        log_file: handler that writes the log of the run.
    """

    def __init__(self, path: Path, lock: IO[str], run_id: str, log_file: logging.Handler) -> None:
        self.path, self.run_id, self.log_file = path, run_id, log_file
        self._lock = lock
        self._followers: list[Callable[[dict[str, Any]], None]] = []

    @classmethod
    @contextmanager
    def open(cls, path: str | Path, recipe: Recipe, mode: Mode) -> Iterator[ResultDir]:
        """Create or reopen the directory and lock it; the log of the block is appended to ``log.jsonl``.

        Args:
            path: path of the directory.
            recipe: recipe, written as ``recipe.yaml``. A resumed run must have the same recipe, except for the fields
                in ``may_change`` of its class.
            mode: ``new`` refuses an existing directory, ``resume`` requires one, ``overwrite`` empties it. Symbolic
                links are not followed: the directory must not be one, and ``resume`` refuses one that contains any.

        Raises:
            ResultError: the mode does not fit what is on disk, or another process holds the directory.
        """
        where = cls.check(path, recipe, mode)
        with writing(where):
            where.mkdir(parents=True, exist_ok=True)
        with locked(where) as lock:
            if mode == "overwrite":
                _empty(where)
            write_atomically(where / RECIPE, recipe.dump())
            if not (where / RUN_ID).is_file():
                write_atomically(where / RUN_ID, uuid.uuid4().hex[:8] + "\n")
            run_id = (where / RUN_ID).read_text(encoding="utf-8").strip()
            Origin.now(run_id).record(where)
            try:
                with log_into(where / LOG, run_id) as log_file, _noted(mode):
                    yield cls(where, lock, run_id, log_file)
            except BaseException:
                if {child.name for child in where.iterdir()} <= {RECIPE, RUN_ID, ORIGIN, LOG, LOCK, INPUTS}:
                    shutil.rmtree(where)  # the run produced nothing: leave no incomplete directory behind
                raise

    @staticmethod
    def check(path: str | Path, recipe: Recipe, mode: Mode) -> Path:
        """Check that a directory can be opened in this mode, and return its absolute path; nothing is written.

        Raises:
            ResultError: see :meth:`open`.
        """
        where = Path(path).expanduser().absolute()
        _check(where, recipe, mode)
        if in_use(where / LOCK):
            raise _used(where)
        return where

    @property
    def metrics_path(self) -> Path:
        """Path of ``metrics.jsonl``, which has one JSON object per line."""
        return self.path / "metrics.jsonl"

    def log_metrics(self, record: dict[str, Any]) -> None:
        """Append one record to ``metrics.jsonl`` and pass it to all followers."""
        with writing(self.metrics_path), open(self.metrics_path, "a", encoding="utf-8", opener=no_follow) as file:
            file.write(plain_json(record) + "\n")
        for on_record in self._followers:
            on_record(record)

    def follow(self, on_record: Callable[[dict[str, Any]], None]) -> None:
        """Call a function with every record: first with those already written, then with each new one."""
        for record in self.metrics():
            on_record(record)
        self._followers.append(on_record)

    def metrics(self) -> list[dict[str, Any]]:
        """Read all records, up to a line that a crash left incomplete."""
        return read_records(self.metrics_path)

    def filter_metrics(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Keep only the records for which ``wanted`` is true; used to drop records of work that is done again."""
        kept = [plain_json(record) + "\n" for record in self.metrics() if wanted(record)]
        write_atomically(self.metrics_path, "".join(kept))

    def summary(self) -> dict[str, Any] | None:
        """Read ``summary.json``; None if the run has not finished."""
        return summary_of(self.path)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json``, the headline numbers of the run."""
        write_atomically(self.path / SUMMARY, plain_json(summary, indent=2) + "\n")


@contextmanager
def _noted(mode: Mode) -> Iterator[None]:
    """Log the start of a run, and its end or failure."""
    _LOG.info("run begins (%s)", mode)
    try:
        yield
    except KeyboardInterrupt:
        _LOG.warning("run stopped")
        raise
    except Exception as error:
        _LOG.error("run failed: %s", error, exc_info=not isinstance(error, RaycloudError))
        raise
    _LOG.info("run ends")


def _empty(where: Path) -> None:
    """Remove everything except the lock. The recipe goes last, because it marks the folder as a result directory."""
    for child in sorted(where.iterdir(), key=lambda child: child.name == RECIPE):
        if child.name == LOCK:
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def _used(where: Path) -> ResultError:
    return ResultError(f"result directory '{where}' is in use by another run")


def _check_links(where: Path, mode: Mode) -> None:
    """Refuse symbolic links, so that no file is written through one; ``overwrite`` removes those inside instead."""
    if where.is_symlink():
        raise ResultError(f"result directory '{where}' is a symbolic link; give the directory that it leads to")
    inside = [where / LOCK]
    if mode == "resume":
        inside += [Path(folder) / name for folder, folders, files in os.walk(where) for name in (*folders, *files)]
    for path in inside:
        if path.is_symlink():
            raise ResultError(f"result directory '{where}' holds the symbolic link '{path}'; remove the link")


def _check(where: Path, recipe: Recipe, mode: Mode) -> None:
    _check_links(where, mode)
    stored = where / RECIPE
    if where.exists() and not where.is_dir():
        raise ResultError(f"result directory '{where}' is a file")
    check_folder(where)
    occupied = where.is_dir() and any(child.name != LOCK for child in where.iterdir())
    if mode == "new" and occupied:
        raise ResultError(
            f"result directory '{where}' exists; pass --resume to continue it or --overwrite to replace it"
        )
    if mode == "overwrite" and occupied and not stored.is_file():
        raise ResultError(f"'{where}' is not a result directory (it holds no {RECIPE}); it is not overwritten")
    if mode == "resume":
        if not stored.is_file():
            raise ResultError(f"nothing to resume in '{where}': it holds no {RECIPE}")
        before, now = type(recipe).load(stored).model_dump(), recipe.model_dump()
        changed = [key for key in now if key not in type(recipe).may_change and before.get(key) != now[key]]
        if changed:
            raise ResultError(f"cannot resume '{where}' with another recipe; changed: {', '.join(changed)}")
