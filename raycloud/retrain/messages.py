"""Messages of a device's windows, as JSON beside tensors: what it saw, the cloud's plan, and what it trained.

All numbers of a device are checked before they are stored or planned with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from raycloud.errors import LinkError, RaycloudError
from raycloud.models.weights import Weights
from raycloud.retrain.cost import Budget, Cost, ModelCost
from raycloud.retrain.drift import DomainSignature
from raycloud.retrain.edge import MOST_CANDIDATES, DriftReport, WindowPlan
from raycloud.retrain.gain import BlockGain

_Count = Annotated[int, Field(ge=0, lt=2**53)]
_Name = Annotated[str, Field(pattern=r"^[\w ./-]{1,64}$")]
_Sizes = dict[Literal["flops", "memory", "bytes"], float]
_BLOCKS = 4096


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    def pack(self) -> bytes:
        """Encode the message."""
        return self.model_dump_json().encode()


_AnyMessage = TypeVar("_AnyMessage", bound=_Message)


class ReportMessage(_Message):
    """Report of a drift; see :class:`~raycloud.retrain.edge.DriftReport`."""

    version: _Count
    distances: list[float] = Field(max_length=_BLOCKS)
    means: list[list[float]] | None = Field(max_length=_BLOCKS)
    gains: list[BlockGain] = Field(max_length=_BLOCKS)
    error: float
    start_error: float
    samples: Annotated[int, Field(ge=1, lt=2**31)]
    batch: Annotated[int, Field(ge=1, lt=2**31)]
    cost: ModelCost
    budget: Budget
    estimated: Cost
    head_steps: _Count
    reserved: Cost
    local_updates: _Count

    @classmethod
    def of(cls, report: DriftReport) -> ReportMessage:
        """Describe a report."""
        means = report.signature.means
        return cls(
            version=report.version,
            distances=report.signature.distances.tolist(),
            means=None if means is None else [one.tolist() for one in means],
            gains=list(report.gains),
            error=report.error,
            start_error=report.start_error,
            samples=report.samples,
            batch=report.batch,
            cost=report.cost,
            budget=report.budget,
            estimated=report.estimated,
            head_steps=report.head_steps,
            reserved=report.reserved,
            local_updates=report.local_updates,
        )

    def report(self, edge: str) -> DriftReport:
        """Return the report of an edge."""
        means = None if self.means is None else tuple(torch.tensor(one) for one in self.means)
        return DriftReport(
            edge,
            self.version,
            DomainSignature(torch.tensor(self.distances), means),
            tuple(self.gains),
            self.error,
            self.start_error,
            self.samples,
            self.batch,
            self.cost,
            self.budget,
            self.estimated,
            self.head_steps,
            self.reserved,
            self.local_updates,
        )


class ObservedRecord(_Message):
    """Record of a window that was served."""

    kind: Literal["window"]
    edge: _Name
    window: _Count
    domain: _Name
    version: _Count
    test_before: float
    test_after: float
    score: float
    drifted: bool
    cause: Literal["hidden_states", "errors", "schedule"] | None
    error: float
    seconds: float
    gains: list[tuple[float, float]] | None = Field(None, max_length=_BLOCKS)
    blocks: _Count | None = None
    budget: _Sizes | None = None


class RetrainedRecord(_Message):
    """Record of a window that was planned."""

    trained: list[_Count] = Field(max_length=_BLOCKS)
    steps: _Count
    head_steps: _Count
    predicted_error: float | None
    planned: _Sizes
    test_after: float
    train_seconds: float
    recalled: bool | None = None
    helped: bool | None = None
    held_out_before: float | None = None
    held_out_after: float | None = None
    paid: _Sizes | None = None
    over_budget: bool | None = None


class ObservedMessage(_Message):
    """Message with what a device saw in a window."""

    record: ObservedRecord
    report: ReportMessage | None


class RetrainedMessage(_Message):
    """Message with what a device trained in a window; the changes follow as tensors."""

    record: RetrainedRecord
    recalled: Annotated[int, Field(ge=0, lt=MOST_CANDIDATES)] | None
    version: _Count
    fingerprint: Annotated[str, Field(pattern=r"^\w{1,64}$")]


def parse_message(content: bytes) -> ObservedMessage | RetrainedMessage:
    """Parse a report of a device.

    Raises:
        ValueError: it is none.
    """
    kind: type[_Message] = ObservedMessage if b'"report"' in content else RetrainedMessage
    try:
        found = kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        raise ValueError(f"report: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except RaycloudError as error:  # of costs that are none
        raise ValueError(f"report: {error}") from None
    assert isinstance(found, ObservedMessage | RetrainedMessage)
    return found


def plan_tensors(plan: WindowPlan) -> dict[str, Tensor]:
    """Return a plan as tensors by name, for safetensors."""
    numbers = [plan.steps, torch.nan if plan.predicted_error is None else plan.predicted_error]
    cost = plan.cost
    found = {
        "trained": torch.tensor(plan.trained, dtype=torch.int64),
        "numbers": torch.tensor([*numbers, cost.flops, cost.memory, cost.bytes], dtype=torch.float64),
    }
    for number, deltas in enumerate(plan.candidates):
        found |= {f"delta/{number}/{name}": one for name, one in deltas.items()}
    return found


def plan_of_tensors(tensors: Weights) -> WindowPlan:
    """Return the plan of a result of :func:`plan_tensors`.

    Raises:
        LinkError: it is none.
    """
    try:
        steps, error, *cost = tensors["numbers"].tolist()
        trained = tuple(int(one) for one in tensors["trained"].tolist())
        candidates: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith("delta/"):
                number, name = key.removeprefix("delta/").split("/", 1)
                candidates.setdefault(int(number), {})[name] = tensor
        found = tuple(candidates[number] for number in sorted(candidates))
        return WindowPlan(trained, int(steps), None if error != error else error, Cost(*cost), found)
    except (KeyError, ValueError, TypeError) as error:
        raise LinkError(f"the cloud's plan cannot be read: {str(error).splitlines()[0]}") from None


def present(record: _Message) -> dict[str, Any]:
    """Return the facts of a record without those that are absent."""
    found: Mapping[str, Any] = record.model_dump()
    return {name: one for name, one in found.items() if one is not None or name in ("cause", "predicted_error")}
