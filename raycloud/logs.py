"""Log of a run: one JSON object per line with the run's id, from every process of the run."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from raycloud.durable import no_follow

LOGGER = logging.getLogger("raycloud")
"""Parent of all loggers of this package. Loggers of other libraries are not changed."""


class JsonLines(logging.Formatter):
    """Formatter that writes each log record as one JSON object.

    Keys: ``time`` in UTC, ``level``, ``run``, ``source``, ``logger``, ``message``, and ``exception`` if there is one.

    Args:
        run: id of the run.
        source: process that logs, such as ``driver``; a record with a ``source`` of its own keeps it.
    """

    def __init__(self, run: str, source: str = "driver") -> None:
        super().__init__()
        self._run, self._source = run, source

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as one line."""
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "run": self._run,
            "source": getattr(record, "source", self._source),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


class LogFile(logging.FileHandler):
    """Handler that appends to a file, which must not be a symbolic link; a failure to write is printed once."""

    _failed = False

    def _open(self) -> io.TextIOWrapper:
        return open(self.baseFilename, "a", encoding=self.encoding, opener=no_follow)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # the base class's name
        """Print one line at the first failure; the base class would print a traceback for every record."""
        if not self._failed:
            self._failed = True
            print(f"warning: cannot write '{self.baseFilename}': {sys.exc_info()[1]}", file=sys.stderr)


@contextmanager
def log_into(path: Path, run: str) -> Iterator[logging.Handler]:
    """Append the log of this package in this process, from level INFO, to a file.

    While it is active, records do not reach the root logger: other libraries add handlers there, which would print on
    the console what the package prints itself.

    Args:
        path: file to append to.
        run: id of the run.

    Yields:
        The handler, which may also be given records of other processes.
    """
    file = LogFile(path, encoding="utf-8")
    file.setFormatter(JsonLines(run))
    level, propagate = LOGGER.level, LOGGER.propagate
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    LOGGER.addHandler(file)
    try:
        yield file
    finally:
        LOGGER.removeHandler(file)
        LOGGER.setLevel(level)
        LOGGER.propagate = propagate
        file.close()
