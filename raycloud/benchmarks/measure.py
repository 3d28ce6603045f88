"""How benchmarks measure: interleaved pairs for time, a fresh subprocess for memory."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from raycloud.report.console import console

SMOLLM2 = "builtin:smollm2-135m-instruct"
"""The model that most figures are of."""
PAIRS = 7


def interleaved(
    candidates: Mapping[str, Callable[[], object]], pairs: int = PAIRS, *, warm: bool = False
) -> dict[str, list[float]]:
    """Milliseconds of each candidate, called in turn after one call to warm up, unless all are ``warm`` already.

    On a shared machine only what ran side by side can be compared: take the ratio pair by pair, then its median.
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
    """The median of the ratios pair by pair."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def peak_growth_mb(prepare: Callable[[], Callable[[], object]]) -> float:
    """By how many MB (1e6 bytes) one call raises this process's resident size at its peak. Linux only.

    The peak is set back after ``prepare``, whose temporaries would hide the call's own.
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
    """Run ``python -m module arguments`` and read the JSON on its last line."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def show(title: str, header: list[str], rows: list[list[str]], result: Mapping[str, Any], as_json: bool) -> None:
    """Print the table and, where asked for, the result as one line of JSON."""
    table = Table(*header, title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if as_json:
        print(json.dumps(result), flush=True)
