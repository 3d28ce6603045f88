"""Messages of a device: what it reports comes back as it was, and what is no report is refused."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from raycloud.errors import LinkError
from raycloud.retrain.alarms import ErrorReference
from raycloud.retrain.cost import Budget, Cost
from raycloud.retrain.deployment import Deployment
from raycloud.retrain.drift import DomainSignature, DriftDetector, TapStatistics
from raycloud.retrain.edge import DriftReport, WindowPlan
from raycloud.retrain.gain import BlockGain
from raycloud.retrain.messages import (
    ObservedMessage,
    ObservedRecord,
    ReportMessage,
    parse_message,
    plan_of_tensors,
    plan_tensors,
)
from raycloud.retrain.samples import Samples
from tests.retrain.problems import instance

RECORD = ObservedRecord(
    kind="window",
    edge="shop",
    window=1,
    domain="zoom/small",
    version=3,
    test_before=0.5,
    test_after=0.5,
    score=math.inf,
    drifted=True,
    cause="errors",
    error=0.5,
    seconds=1.5,
)


def report(means: bool) -> DriftReport:
    signature = DomainSignature(torch.rand(3), (torch.rand(4), torch.rand(2)) if means else None)
    gains = (BlockGain(0.5, math.inf, 0.25), BlockGain(1e-30, 2.0, 0.0))
    cost = instance(random.Random(1), 2, (1.0,))
    budget = Budget(1e9, 1e6)
    spent, reserved = Cost(5.0, 6.0), Cost(3.5, 4.5)
    return DriftReport("shop", 3, signature, gains, 0.8, 0.7, 80, 32, cost, budget, spent, 17, reserved, 2)


@pytest.mark.parametrize("means", [False, True])
def test_a_report_comes_back_as_it_was(means: bool) -> None:
    sent = report(means)
    found = parse_message(ObservedMessage(record=RECORD, report=ReportMessage.of(sent)).pack())
    assert isinstance(found, ObservedMessage) and found.record == RECORD and found.report is not None
    back = found.report.report("shop")
    assert (back.cost, back.budget, back.gains, back.estimated) == (
        sent.cost,
        sent.budget,
        sent.gains,
        sent.estimated,
    )
    assert back.budget.bytes == math.inf and back.local_updates == 2 and back.reserved == Cost(3.5, 4.5)
    assert torch.allclose(back.signature.distances, sent.signature.distances)
    assert (back.signature.means is None) == (not means)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"report": {"version": 3}}, "report: report.distances: Field required"),
        ({"record": {**RECORD.model_dump(), "cause": "boredom"}, "report": None}, "report: record.cause"),
        ({"record": {**RECORD.model_dump(), "domain": "<script>"}, "report": None}, "report: record.domain"),
    ],
)
def test_what_is_no_report_is_refused(changes: dict[str, object], said: str) -> None:
    whole = {"record": RECORD.model_dump(), **changes}
    with pytest.raises(ValueError, match=said):
        parse_message(json.dumps(whole, default=str).encode())


def test_costs_below_zero_are_refused() -> None:
    whole = json.loads(ObservedMessage(record=RECORD, report=ReportMessage.of(report(False))).pack())
    whole["report"]["cost"]["stem_forward"] = -1.0
    with pytest.raises(ValueError, match=r"report: .*stem_forward of ModelCost must be finite and 0 or more"):
        parse_message(json.dumps(whole).encode())


@pytest.mark.parametrize("error", [0.25, None])
def test_a_plan_comes_back_as_it_was(error: float | None) -> None:
    plan = WindowPlan((0, 4), 55, error, Cost(1e15, 2.0, 3.0), ({"a.weight": torch.rand(2, 3)}, {"b": torch.rand(1)}))
    back = plan_of_tensors(plan_tensors(plan))
    assert (back.trained, back.steps, back.predicted_error, back.cost) == ((0, 4), 55, error, plan.cost)
    assert [list(one) for one in back.candidates] == [["a.weight"], ["b"]]
    assert torch.equal(back.candidates[0]["a.weight"], plan.candidates[0]["a.weight"])
    with pytest.raises(LinkError, match="the cloud's plan cannot be read"):
        plan_of_tensors({"numbers": torch.zeros(5)})


def test_a_deployment_comes_back_as_it_was() -> None:
    source = TapStatistics((torch.rand(2), torch.rand(3)), (torch.rand(2), torch.rand(3)))
    detector = DriftDetector(source, torch.rand(2), torch.rand(2), 3.25)
    replayed = Samples({"input_ids": torch.arange(6).view(2, 3)}, torch.tensor([0, 1]))
    state = Deployment(7, "abc123", {"w": torch.rand(2)}, detector, ErrorReference(0.1, 0.3, 200), replayed)
    back = Deployment.from_tensors(state.tensors())
    assert (back.version, back.fingerprint, back.usual) == (7, "abc123", state.usual)
    assert back.detector.threshold == 3.25 and torch.equal(back.detector.source.variance[1], source.variance[1])
    assert back.replayed is not None and torch.equal(back.replayed.inputs["input_ids"], replayed.inputs["input_ids"])
    assert torch.equal(back.weights["w"], state.weights["w"])
    with pytest.raises(LinkError, match="the cloud's state cannot be read"):
        Deployment.from_tensors({"numbers": torch.zeros(2)})
