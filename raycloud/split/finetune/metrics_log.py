"""Records of ``metrics.jsonl``, and the log of a run of several edges, which records repeated work once."""

from __future__ import annotations

from typing import Any

from raycloud.results import ResultDir
from raycloud.training.loop import Step

Record = dict[str, Any]


def step_record(step: Step) -> Record:
    """Record of an optimiser step."""
    return {
        "step": step.step,
        "loss": step.loss,
        "grad_norm": step.grad_norm,
        "lr": step.lr,
        "skipped": step.skipped,
    }


class MetricsLog:
    """Writer of ``metrics.jsonl``.

    Records have a ``kind``: ``evaluation`` (an edge's metrics ``before``, ``alone`` or ``together``), ``step``,
    ``round`` (the round an edge continued from, and its members) and ``died``.

    Args:
        results: result directory of the run; records already in it are not written again.
    """

    def __init__(self, results: ResultDir) -> None:
        self._results = results
        self._last_logged: dict[tuple[str, str, str], int] = {}
        self._evaluated: set[tuple[str, str]] = set()
        for record in results.metrics():
            self._new(record)

    def add(self, record: Record) -> bool:
        """Write a record if it is new; return whether it was."""
        if new := self._new(record):
            self._results.log_metrics(record)
        return new

    def evaluated(self, edge: str, what: str) -> bool:
        """Return whether an edge was evaluated in this phase."""
        return (edge, what) in self._evaluated

    @property
    def records(self) -> list[Record]:
        """All records."""
        return self._results.metrics()

    def _new(self, record: Record) -> bool:
        kind, edge, what = record["kind"], record["edge"], record.get("what", "")
        if kind == "evaluation":
            known = self.evaluated(edge, what)
            self._evaluated.add((edge, what))
            return not known
        if kind in ("step", "round"):
            at = int(record["step" if kind == "step" else "round"])
            if at <= self._last_logged.get((kind, edge, what), -1):
                return False
            self._last_logged[kind, edge, what] = at
        return True
