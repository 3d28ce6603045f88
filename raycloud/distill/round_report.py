"""Report of a device about a round of training: the numbers that an actor returns with its weights, as JSON."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raycloud.distill.diagnostics import StudentDiagnostics
from raycloud.distill.learner import StudentUpdate
from raycloud.link.meter import Meter
from raycloud.models.weights import Weights
from raycloud.training.loop import Step

_NAME = r"^[\w /-]{1,64}$"
_MOST_WARNINGS, _WARNING = 32, 500

_Count = Annotated[int, Field(ge=0, lt=2**53)]
_Kind = Annotated[str, Field(pattern=_NAME)]


class RoundReport(BaseModel):
    """Report of a device about a round. What it says is data of a device: it is checked and then only shown."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    steps: list[Step]
    seconds: float = Field(gt=0, allow_inf_nan=False)
    payload: dict[_Kind, _Count]
    messages: dict[_Kind, _Count]
    diagnostics: StudentDiagnostics

    @classmethod
    def of(cls, update: StudentUpdate) -> RoundReport:
        """Make the report of an update."""
        return cls(
            steps=update.steps,
            seconds=update.seconds,
            payload=dict(update.meter.payload),
            messages=dict(update.meter.messages),
            diagnostics=update.diagnostics,
        )

    @classmethod
    def parse(cls, content: bytes, most_steps: int) -> RoundReport:
        """Parse a report of a device.

        Args:
            content: bytes of the report.
            most_steps: number of steps of a round.

        Raises:
            ValueError: it is no report, or of more than a round.
        """
        try:
            report = cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            raise ValueError(f"report: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        diagnostics = report.diagnostics
        if not 1 <= len(report.steps) <= most_steps or len(diagnostics.steps) > most_steps:
            raise ValueError(f"report: {len(report.steps)} steps; allowed: 1 to {most_steps}")
        texts = [text for one in diagnostics.warnings.items() for text in one]
        if len(texts) > 2 * _MOST_WARNINGS or not all(len(text) <= _WARNING and text.isprintable() for text in texts):
            raise ValueError("report: warnings that are too many, too long or not printable")
        return report

    def update(self, name: str, number: int, weights: Weights, tokens: int) -> StudentUpdate:
        """Return the update that the report is about.

        Args:
            name: name of the edge.
            number: number of the round.
            weights: trained weights.
            tokens: number of tokens that they were trained on, by which they are averaged.
        """
        meter = Meter()
        meter.payload.update(self.payload)
        meter.messages.update(self.messages)
        return StudentUpdate(name, number, dict(weights), tokens, self.steps, self.seconds, meter, self.diagnostics)

    def pack(self) -> bytes:
        """Encode the report."""
        return self.model_dump_json().encode()
