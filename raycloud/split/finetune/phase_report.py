"""Report of a device about a phase of its run: metrics and records, as JSON. It is checked and then only stored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

PHASES = ("before", "alone", "together")
"""Phases of an edge's run, in order: evaluation before training, training alone, and training with the others."""

MAX_RECORDS = 4096
"""Largest number of records of a report; of longer phases every second, third, … step is reported."""

_Name = Annotated[str, Field(pattern=r"^[\w -]{1,64}$")]
_Count = Annotated[int, Field(ge=0, lt=2**53)]
_TEXT = r"^[^\x00-\x1f\x7f]{0,200}$"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class StepRecord(_Part):
    """Record of a step."""

    kind: Literal["step"] = "step"
    what: Literal["alone", "together"]
    step: _Count
    loss: float
    grad_norm: float
    lr: float
    skipped: bool


class RoundRecord(_Part):
    """Record of a round that the edge continued from."""

    kind: Literal["round"] = "round"
    round: _Count
    counted: bool
    members: list[_Name]
    missed: dict[_Name, _Name]
    waited_s: float
    sent: _Count
    received: _Count


class PhaseReport(_Part):
    """Report of a device about a phase."""

    metrics: dict[_Name, float]
    """Metrics on held-out texts, and ``bytes_per_step`` after training."""
    facts: dict[_Name, _Count | Annotated[str, Field(pattern=_TEXT)] | dict[_Name, _Count]] = {}
    """Numbers of texts, and whether they begin with BOS."""
    records: list[Annotated[StepRecord | RoundRecord, Field(discriminator="kind")]] = Field([], max_length=MAX_RECORDS)

    @classmethod
    def parse(cls, content: bytes) -> PhaseReport:
        """Parse a report of a device.

        Raises:
            ValueError: it is no report, or has too many records.
        """
        try:
            report = cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            raise ValueError(f"report: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        return report

    def pack(self) -> bytes:
        """Encode the report."""
        return self.model_dump_json().encode()

    def found(self) -> dict[str, Any]:
        """Metrics and facts, as the record of an evaluation has them."""
        return {**self.metrics, **self.facts}

    def records_of(self, edge: str) -> list[dict[str, Any]]:
        """Records of an edge, as ``metrics.jsonl`` has them."""
        return [{**record.model_dump(), "edge": edge} for record in self.records]
