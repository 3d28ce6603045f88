"""Required end of a command's output: its table, then its JSON object if requested."""

from __future__ import annotations

import json
import re
from typing import Any

_LOGGED = re.compile(r"^\(\S+ pid=\d+|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d|\b(INFO|WARNING|ERROR)\b|ray::|raylet|ray\.kill")
"""A line that Ray or Serve logs, whichever way it comes to the console."""
_OTHERS = re.compile(r"\bray\b|ray::|raylet|serve|pid=|Traceback", re.IGNORECASE)


def of_a_submitted_job(stdout: str) -> str:
    """Extract the output of a job's process from that of ``ray job submit``."""
    *told, above, verdict, below = stdout.rstrip().splitlines()
    assert "succeeded" in verdict and all("SUCC cli.py:" in line for line in (above, verdict, below)), stdout
    return "\n".join(told).rstrip()


def report_of(stdout: str, stderr: str = "") -> dict[str, Any] | None:
    """The object on the last line of a command that succeeded; None where it ends with its table.

    Behind the table's beginning there is nothing that Ray or Serve logs, and nothing of theirs among the errors.
    """
    assert not [line for line in stderr.splitlines() if _OTHERS.search(line)], stderr
    lines = stdout.splitlines()
    found = json.loads(lines.pop()) if lines[-1].startswith("{") else None
    report = lines[next(at for at, line in enumerate(lines) if line.startswith("┏")) :]
    assert not [line for line in report if _LOGGED.search(line)], stdout
    assert any(line.startswith("└") for line in report), stdout
    assert report[-1].startswith("results: "), stdout
    return found
