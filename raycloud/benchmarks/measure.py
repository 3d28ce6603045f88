"""Measurement for benchmarks: interleaved calls for time, a fresh subprocess for memory."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raycloud.benchmarks.machine import commit, machine
from raycloud.report.console import console
from raycloud.report.table import print_table
from raycloud.results import plain_json

SMOLLM2 = "builtin:smollm2-135m-instruct"
"""Model that most benchmarks use."""
PAIRS = 7


def interleaved(
    candidates: Mapping[str, Callable[[], object]], pairs: int = PAIRS, *, warm: bool = False
) -> dict[str, list[float]]:
    """Measure the milliseconds of each call of several candidates, which are called in turn.

    On a shared machine only measurements made side by side can be compared: take the ratio of each pair, then the
    median of the ratios (:func:`median_ratio`).

    Args:
        candidates: functions by name.
        pairs: number of measured calls of each candidate.
        warm: skip the unmeasured first call of each candidate.

    Returns:
        Milliseconds of each measured call, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for call in () if warm else candidates.values():
        call()
    for _ in range(pairs):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def median_ratio(above: list[float], below: list[float]) -> float:
    """Median of the ratios of paired measurements."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def peak_growth_mb(prepare: Callable[[], Callable[[], object]]) -> float:
    """Measure the growth of this process's peak resident size during one call, in MB (1e6 bytes). Linux only.

    The recorded peak is reset after ``prepare``, so that its temporaries do not hide those of the call.

    Args:
        prepare: makes the inputs, and returns the function to measure.
    """
    call = prepare()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_kib("VmRSS")
    call()
    return (_status_kib("VmHWM") - before) * 1024 / 1e6


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def in_subprocess(module: str, *arguments: str) -> Any:
    """Run ``python -m module arguments`` and return the JSON value on the last line of its output."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@dataclass(frozen=True)
class Measured:
    """Result of a benchmark: a table with its title and notes, and the figures."""

    title: str
    header: list[str]
    rows: list[list[str]]
    figures: Mapping[str, Any]
    notes: Sequence[str] = ()

    def show(self, *, quick: bool, as_json: bool) -> None:
        """Print notes and table, and the figures as JSON if asked for; table and JSON include machine and commit."""
        for note in self.notes:
            console.print(note)
        where = {"quick": quick, "machine": machine(), "commit": commit()}
        caption = f"{'quick run, proves no figure; ' * quick}{where['machine']}; commit {where['commit']}"
        print_table(self.header, self.rows, title=self.title, caption=caption)
        if as_json:
            print(plain_json({**self.figures, **where}), flush=True)
