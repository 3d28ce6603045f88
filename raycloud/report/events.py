"""A run's scalars as TensorBoard's event files, made from the records of ``metrics.jsonl`` and nothing else.

Beside each other in TensorBoard stand the students, by optimiser step, and ``round``, by round.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"
_PLACES = ("kind", "student", "step", "round")

Record = Mapping[str, Any]


@contextmanager
def event_files(run: Path) -> Iterator[Callable[[Record], None]]:
    """A function that adds a record to the event files of a result directory, which begin anew.

    So a resumed run, whose records are told again as far as they count, has every step once.
    """
    from tensorboardX import SummaryWriter

    folder = run / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    writers: dict[str, Any] = {}

    def add(record: Record) -> None:
        line = line_of(record)
        if line is None:
            return
        name, at = line
        if name not in writers:
            writers[name] = SummaryWriter(str(folder / name))
        for tag, value in scalars(record):
            writers[name].add_scalar(tag, value, at)
        if record["kind"] == "round":
            for writer in writers.values():
                writer.flush()

    try:
        yield add
    finally:
        for writer in writers.values():
            writer.close()


def line_of(record: Record) -> tuple[str, int] | None:
    """Which curves a record belongs to and where on them; None if to none."""
    if "step" in record:
        return str(record.get("student", record["kind"])), int(record["step"])
    if record["kind"] == "round":
        return "round", int(record["round"])
    return None


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """Its numbers by tag; those of a mapping have its key before theirs, as in ``terms/forward_kl``."""
    for key, value in record.items():
        if key not in _PLACES:
            yield from _numbers(key, value)


def _numbers(tag: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(f"{tag}/{key}", inner)
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield tag, float(value)
