"""The records of a run of several edges: whatever is done again, after something broke, is told once."""

from __future__ import annotations

from typing import Any

from raycloud.results import ResultDir

Record = dict[str, Any]


class Journal:
    """Writes ``metrics.jsonl``.

    Records are of a ``kind``: ``judged`` (an edge's metrics ``before``, ``alone`` or ``together``), ``step``,
    ``meeting`` (what an edge went on from, and who was in it) and ``died``.

    Args:
        results: of the run; what it has told already is not told again.
    """

    def __init__(self, results: ResultDir) -> None:
        self._results = results
        self._furthest: dict[tuple[str, str, str], int] = {}
        self._judged: set[tuple[str, str]] = set()
        for record in results.metrics():
            self._new(record)

    def add(self, record: Record) -> bool:
        """Write a record, if it is news; whether it is."""
        if new := self._new(record):
            self._results.log(record)
        return new

    def judged(self, edge: str, what: str) -> bool:
        """Whether an edge has been examined after it trained so."""
        return (edge, what) in self._judged

    @property
    def records(self) -> list[Record]:
        """All of them."""
        return self._results.metrics()

    def _new(self, record: Record) -> bool:
        kind, edge, what = record["kind"], record["edge"], record.get("what", "")
        if kind == "judged":
            known = self.judged(edge, what)
            self._judged.add((edge, what))
            return not known
        if kind in ("step", "meeting"):
            at = int(record["step" if kind == "step" else "round"])
            if at <= self._furthest.get((kind, edge, what), -1):
                return False
            self._furthest[kind, edge, what] = at
        return True
