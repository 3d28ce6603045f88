"""Origin of a result: run id, start, command and machine, recorded in the result directory for its report."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

from raycloud.durable import write_atomically

ORIGIN = "origin.json"
_SECRETS = ("--token", "--api-key")


@dataclass(frozen=True)
class Origin:
    """Origin of a result.

    Args:
        run: id of the run; empty for a result without one.
        began: start in UTC, ISO 8601 with seconds.
        command: command line of the process that began it, without tokens and keys.
        machine: processor of that process and its cores.
    """

    run: str
    began: str
    command: str
    machine: str

    @classmethod
    def now(cls, run: str = "") -> Origin:
        """Origin of what this process begins now."""
        return cls(run, datetime.now(UTC).isoformat(timespec="seconds"), command(sys.argv), processor())

    @classmethod
    def read(cls, folder: Path) -> Origin | None:
        """Origin that a folder holds; None if it holds none, as those of former versions."""
        path = folder / ORIGIN
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def json(self) -> str:
        """Content of :data:`ORIGIN`."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def record(self, folder: Path) -> None:
        """Write it into a folder, unless the folder holds one: a resumed run keeps its origin."""
        if not (folder / ORIGIN).is_file():
            write_atomically(folder / ORIGIN, self.json())

    def __str__(self) -> str:
        return f"{f'Run {self.run}, ' if self.run else ''}{self.began}, by '{self.command}', on {self.machine}."


def command(words: Sequence[str]) -> str:
    """Command line as one would type it; the values of ``--token`` and ``--api-key`` are left out."""
    program = Path(words[0]).name if words else ""
    if program == "default_worker.py":
        return "a worker of Ray"
    shown = ["raycloud" if program == "__main__.py" else program]
    for before, word in pairwise(words):
        option, equals, _ = word.partition("=")
        shown.append("…" if before in _SECRETS else f"{option}=…" if equals and option in _SECRETS else word)
    return " ".join(word if word.endswith("…") else shlex.quote(word) for word in shown)


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Name of the processor, and how many cores this process may use."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {cores()} cores"


def cores() -> int:
    """Number of CPU cores that this process may use: fewer than the machine's under ``taskset`` and in containers."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
