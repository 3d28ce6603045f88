"""TensorBoard event files of a run, made only from the records of ``metrics.jsonl``.

TensorBoard shows one run per student, by optimiser step, and one named ``round``, by round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raycloud.durable import remove

FOLDER = "tensorboard"
_NO_SCALARS = ("kind", "student", "step", "round")

Record = Mapping[str, Any]


@contextmanager
def tensorboard_events(run: Path) -> Iterator[Callable[[Record], None]]:
    """Yield a function that adds a record to the event files of a result directory; existing event files are removed.

    A resumed run adds its earlier records again, so every step appears once.
    """
    from tensorboardX import SummaryWriter

    folder = run / FOLDER
    remove(folder)
    writers: dict[str, Any] = {}

    def add(record: Record) -> None:
        line = curve_of(record)
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


def curve_of(record: Record) -> tuple[str, int] | None:
    """Return the TensorBoard run and the position on the x axis of a record; None if it belongs to no curve."""
    if "step" in record:
        return str(record.get("student", record["kind"])), int(record["step"])
    if record["kind"] == "round":
        return "round", int(record["round"])
    return None


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a record by tag; those in a mapping have its key as a prefix, as in ``terms/forward_kl``."""
    for key, value in record.items():
        if key not in _NO_SCALARS:
            yield from _numbers(key, value)


def _numbers(tag: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(f"{tag}/{key}", inner)
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield tag, float(value)
