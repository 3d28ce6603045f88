"""Result directories: the recipe as run, metrics, log, a summary, and what a killed run needs to go on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

from raycloud.errors import Interrupted, RaycloudError, ResultError
from raycloud.logs import log_into
from raycloud.recipe import Recipe

Mode = Literal["new", "resume", "overwrite"]

RECIPE = "recipe.yaml"
SUMMARY = "summary.json"
LOG = "log.jsonl"
RUN_ID = "run_id"
LOCK = ".lock"

_LOG = logging.getLogger(__name__)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file as a whole: readers see the old content or the new one, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        try:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Replace a folder as a whole: ``fill`` writes a scratch folder beside it, which then takes its place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        fill(scratch)
        # Whoever may read the folder may read it all; some libraries write files for their owner alone.
        scratch.chmod(0o755)
        for path in scratch.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        # The old one stays whole until the new one is.
        aside = scratch.with_name(scratch.name + "-old")
        if target.exists():
            target.rename(aside)
        scratch.rename(target)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def kept_at(folder: Path, about: Any, suffix: str) -> Path:
    """Where a folder has what is a function of ``about``, plain JSON, and of nothing else."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]
    return folder / f"{digest}.{suffix}"


def kept_json(folder: Path, about: Any, compute: Callable[[], Any]) -> Any:
    """What ``compute`` returns, as plain JSON; what a folder has of it from an earlier time is not computed again.

    Args:
        folder: for one file for each thing.
        about: all that it depends on, as plain JSON.
        compute: called where there is no file yet, or none that can be read.
    """
    path = kept_at(folder, about, "json")
    with suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    found = compute()
    write_atomically(path, json.dumps(found))
    return found


def in_use(path: Path) -> bool:
    """Whether a process holds this file, such as the :data:`LOCK` of a result directory."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: many may ask at once
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file that has one JSON object a line; a last line that a crash cut short is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


@contextmanager
def resumable(path: str | Path | None) -> Iterator[None]:
    """Tell whoever stops a run how to go on with it.

    Args:
        path: the result directory; None where nothing is kept.

    Raises:
        Interrupted: instead of ``KeyboardInterrupt``.
    """
    try:
        yield
    except KeyboardInterrupt:
        if path is not None and (Path(path).expanduser() / RECIPE).is_file():
            raise Interrupted(f"stopped; go on with: --resume (results so far: {path})") from None
        raise Interrupted("stopped before there was anything to keep") from None


class ResultDir:
    """The directory one run writes. Open it with :meth:`open`; one process at a time may hold it.

    Args:
        path: where it is.
        lock: its lock, held.
        run_id: tells the run from all others in logs and metrics; a resumed run keeps it.
        log_file: writes the run's log.
    """

    def __init__(self, path: Path, lock: IO[str], run_id: str, log_file: logging.Handler) -> None:
        self.path, self.run_id, self.log_file = path, run_id, log_file
        self._lock = lock
        self._followers: list[Callable[[dict[str, Any]], None]] = []

    @classmethod
    @contextmanager
    def open(cls, path: str | Path, recipe: Recipe, mode: Mode) -> Iterator[ResultDir]:
        """Make or take over the directory, write the recipe into it, and into ``log.jsonl`` what is logged meanwhile.

        Args:
            path: the directory.
            recipe: written as ``recipe.yaml``; a resumed run must have the same one, but for ``output``.
            mode: ``new`` refuses an existing directory, ``resume`` wants one, ``overwrite`` empties it.

        Raises:
            ResultError: the mode and what is on disk do not agree, or another process holds the directory.
        """
        where = cls.check(path, recipe, mode)
        where.mkdir(parents=True, exist_ok=True)
        with open(where / LOCK, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ResultError(f"result directory '{where}' is in use by another run") from None
            if mode == "overwrite":
                _empty(where)
            if mode != "resume":
                write_atomically(where / RECIPE, recipe.dump())
            if not (where / RUN_ID).is_file():
                write_atomically(where / RUN_ID, uuid.uuid4().hex[:8] + "\n")
            run_id = (where / RUN_ID).read_text(encoding="utf-8").strip()
            try:
                with log_into(where / LOG, run_id) as log_file, _noted(mode):
                    yield cls(where, lock, run_id, log_file)
            except BaseException:
                if {child.name for child in where.iterdir()} <= {RECIPE, RUN_ID, LOG, LOCK}:
                    shutil.rmtree(where)  # nothing was done in it: leave nothing half-written
                raise

    @staticmethod
    def check(path: str | Path, recipe: Recipe, mode: Mode) -> Path:
        """The absolute path of a directory that may be opened in this mode; changes nothing.

        Raises:
            ResultError: see :meth:`open`.
        """
        where = Path(path).expanduser().absolute()
        _check(where, recipe, mode)
        return where

    @property
    def metrics_path(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    def log(self, record: dict[str, Any]) -> None:
        """Append one record to ``metrics.jsonl``."""
        with open(self.metrics_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        for told in self._followers:
            told(record)

    def follow(self, told: Callable[[dict[str, Any]], None]) -> None:
        """Have a function told every record, those that are there and those to come."""
        for record in self.metrics():
            told(record)
        self._followers.append(told)

    def metrics(self) -> list[dict[str, Any]]:
        """All records; a last line that a crash cut short is left out."""
        return read_records(self.metrics_path)

    def keep_metrics(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the records of work that will be done again."""
        kept = [json.dumps(record) + "\n" for record in self.metrics() if wanted(record)]
        write_atomically(self.metrics_path, "".join(kept))

    def summary(self) -> dict[str, Any] | None:
        """The headline numbers of a run that came to its end; None before that."""
        path = self.path / SUMMARY
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json``, the run's headline numbers."""
        write_atomically(self.path / SUMMARY, json.dumps(summary, indent=2) + "\n")


@contextmanager
def _noted(mode: Mode) -> Iterator[None]:
    """Log how a run begins and how it ends."""
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
    """Remove everything but the lock, the recipe last: it is what tells a result directory."""
    for child in sorted(where.iterdir(), key=lambda child: child.name == RECIPE):
        if child.name == LOCK:
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def _check(where: Path, recipe: Recipe, mode: Mode) -> None:
    stored = where / RECIPE
    if where.exists() and not where.is_dir():
        raise ResultError(f"result directory '{where}' is a file")
    occupied = where.is_dir() and any(child.name != LOCK for child in where.iterdir())
    if mode == "new" and occupied:
        raise ResultError(
            f"result directory '{where}' exists; pass --resume to go on with it or --overwrite to replace it"
        )
    if mode == "overwrite" and occupied and not stored.is_file():
        raise ResultError(f"'{where}' is not a result directory (it holds no {RECIPE}); it is not overwritten")
    if mode == "resume":
        if not stored.is_file():
            raise ResultError(f"nothing to resume in '{where}': it holds no {RECIPE}")
        before, now = type(recipe).load(stored).model_dump(), recipe.model_dump()
        changed = [key for key in now if key != "output" and before.get(key) != now[key]]
        if changed:
            raise ResultError(f"cannot resume '{where}' with another recipe; changed: {', '.join(changed)}")
