"""A run's log: one JSON object a line, each with the run's id, from every process that works for it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

LOGGER = logging.getLogger("raycloud")
"""Above all loggers of this package; what other libraries log is left to them."""


class JsonLines(logging.Formatter):
    """``time`` in UTC, ``level``, ``run``, ``source``, ``logger``, ``message``, and ``exception`` where there is one.

    Args:
        run: the run's id.
        source: the process, such as ``driver``; a record that has one of its own keeps it.
    """

    def __init__(self, run: str, source: str = "driver") -> None:
        super().__init__()
        self._run, self._source = run, source

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
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


@contextmanager
def log_into(path: Path, run: str) -> Iterator[logging.Handler]:
    """Append what this package logs in this process, from INFO on, to a file; what comes from elsewhere may join it.

    The console says what a user has to know. Whatever handlers other libraries gave the root logger would say it twice.
    """
    file = logging.FileHandler(path, encoding="utf-8")
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
