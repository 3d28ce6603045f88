"""Windows of edges and versions of the cloud, in one process: drift, plan, retraining, merging, recurrence."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from raycloud.models.chain import block_list_of
from raycloud.models.weights import weights_of
from raycloud.retrain.alarms import DriftAlarm
from raycloud.retrain.cloud import RetrainCloud, retrainable
from raycloud.retrain.cost import Budget
from raycloud.retrain.domains import DomainMemory
from raycloud.retrain.drift import DomainSignature, DriftDetector, tapped
from raycloud.retrain.edge import RetrainEdge
from raycloud.retrain.parts import parts_of
from raycloud.retrain.recipe import BudgetRecipe, RetrainTraining
from raycloud.retrain.samples import Samples
from raycloud.retrain.tasks import TASKS, cross_entropy
from raycloud.retrain.trainer import BlockTrainer, mean_error
from raycloud.retrain.update import BlockUpdate
from tests.retrain.models import task_model

TASK = TASKS["classification"]
PATTERNS = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
ALARM = DriftAlarm(radius=0.5)
SETTINGS = RetrainTraining(batch_size=16, head_steps=20, warmup_steps=2)


def samples(count: int, seed: int, shift: Callable[[torch.Tensor], torch.Tensor] = lambda images: images) -> Samples:
    """Noisy images of four patterns, whose classes they are."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, 4, (count,), generator=generator)
    noise = torch.randn(count, 3, 16, 16, generator=generator)
    return Samples({"pixel_values": shift(PATTERNS[classes]) + 0.5 * noise}, classes)


def mirrored(images: torch.Tensor) -> torch.Tensor:
    return -images.flip(-1)


@pytest.fixture(scope="module")
def source() -> tuple[PreTrainedModel, DriftDetector]:
    model = task_model("vit")
    parts = parts_of(model, samples(2, 0).inputs)
    settings = RetrainTraining(batch_size=32, lr=2e-3)
    BlockTrainer(
        model, parts.groups([0, 1, 2]), samples(256, 1), cross_entropy, settings, start=0, steps=60, seed=0
    ).run()
    with torch.no_grad(), tapped(parts.blocks) as taps:
        model(**samples(600, 2).inputs)
        found = taps.take()
    assert mean_error(model, samples(200, 4), TASK.error) < 0.1
    assert mean_error(model, samples(200, 4, mirrored), TASK.error) > 0.5
    return model, DriftDetector.calibrated(found, 64)


def budget_up_to(flops: float) -> BudgetRecipe:
    return BudgetRecipe(full_steps=None, memory_share=None, flops=flops)


def edge_of(source: tuple[PreTrainedModel, DriftDetector], name: str = "a", flops: float = 3e9) -> RetrainEdge:
    model, detector = source
    return RetrainEdge(
        name, copy.deepcopy(model), "vit", TASK, detector, ALARM, budget_up_to(flops), SETTINGS, share_means=True
    )


def cloud_of(source: tuple[PreTrainedModel, DriftDetector]) -> RetrainCloud:
    model, detector = source
    memory = DomainMemory(detector.source, radius=0.5)
    return RetrainCloud(retrainable(weights_of(model)), "vit", list(block_list_of(model).blocks), None, memory)


def test_a_drift_is_noticed_retrained_within_budget_and_merged(source: tuple[PreTrainedModel, DriftDetector]) -> None:
    edge, cloud = edge_of(source), cloud_of(source)
    assert edge.observe(samples(64, 10)).cause is None
    window = samples(96, 11, mirrored)
    seen = edge.observe(window)
    assert seen.cause == "hidden_states"
    report = edge.report(window, seen, seed=0)
    plan = cloud.plan(report)
    assert plan.trained and plan.steps and not plan.candidates
    assert plan.predicted_error is not None and plan.predicted_error < report.start_error
    number = cloud.open(["a", "b"], deadline=10.0)
    outcome = edge.retrain(window, report, plan, seed=0)
    assert outcome.result is not None and outcome.result.helped and outcome.update is not None
    assert outcome.cost.within(Budget(flops=3e9)) and outcome.cost.bytes == len(outcome.update.to_bytes())
    assert cloud.accept("a", number, outcome.update, seen.signature) is None
    assert cloud.close(5.0) is None
    closed = cloud.close(10.0)
    assert closed is not None and (closed.members, closed.missed, cloud.version) == (("a",), ("b",), number)
    other, test = edge_of(source, "b"), samples(200, 12, mirrored)
    before = mean_error(other.model, test, TASK.error)
    other.load(cloud.weights, cloud.version)
    after = mean_error(other.model, test, TASK.error)
    assert after < before and after == mean_error(edge.model, test, TASK.error)
    # The window of an edge that was away comes too late, and the domain is known when it comes again.
    late = cloud.accept("b", number, outcome.update, seen.signature)
    assert late is not None and late.reason == "closed"
    fresh = edge_of(source, "c")
    again = samples(96, 13, mirrored)
    report = fresh.report(again, fresh.observe(again), seed=0)
    plan = cloud.plan(report)
    assert plan.candidates
    assert fresh.retrain(again, report, plan, seed=1).recalled == 0


def test_a_window_without_budget_changes_nothing(source: tuple[PreTrainedModel, DriftDetector]) -> None:
    edge, cloud = edge_of(source, flops=1e6), cloud_of(source)
    before = {name: one.clone() for name, one in weights_of(edge.model).items()}
    window = samples(96, 11, mirrored)
    report = edge.report(window, edge.observe(window), seed=0)
    plan = cloud.plan(report)
    assert (plan.trained, plan.steps) == ((), 0)
    outcome = edge.retrain(window, report, plan, seed=0)
    assert outcome.result is None and outcome.update is None
    assert all(torch.equal(one, before[name]) for name, one in weights_of(edge.model).items())


def test_without_labels_none_is_read(source: tuple[PreTrainedModel, DriftDetector]) -> None:
    model, detector = source
    window = samples(96, 11, mirrored)
    deltas = []
    for labels in (window.labels, torch.full_like(window.labels, 3)):
        edge = RetrainEdge(
            "a", copy.deepcopy(model), "vit", TASK, detector, ALARM, budget_up_to(3e9), SETTINGS, supervision="none"
        )
        given = Samples(window.inputs, labels)
        report = edge.report(given, edge.observe(given), seed=0)
        outcome = edge.retrain(given, report, cloud_of(source).plan(report), seed=0)
        assert outcome.result is not None
        deltas.append(outcome.result.deltas)
    assert deltas[0].keys() == deltas[1].keys()
    assert all(torch.equal(one, deltas[1][name]) for name, one in deltas[0].items())


def test_blocks_that_two_edges_pull_apart_are_not_merged(source: tuple[PreTrainedModel, DriftDetector]) -> None:
    cloud = cloud_of(source)
    first, second = (f"{path}.mlp.fc1.weight" for path in list(block_list_of(source[0]).blocks)[:2])
    former = {name: cloud.weights[name].clone() for name in (first, second)}
    number = cloud.open(["a", "b"], deadline=1.0)
    for edge, sign in (("a", 1.0), ("b", -1.0)):
        deltas = {first: sign * torch.ones_like(former[first]), second: torch.ones_like(former[second])}
        signature = DomainSignature(torch.tensor([sign, 5.0, 5.0, 5.0]) * 10)
        assert cloud.accept(edge, number, BlockUpdate("vit", 0, 10, deltas), signature) is None
    assert cloud.close(0.0) is not None
    assert torch.equal(cloud.weights[first], former[first])
    assert torch.allclose(cloud.weights[second], former[second] + 1, atol=1e-6)


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        (BlockUpdate("bert", 0, 10, {}), "different_tensors"),
        (BlockUpdate("vit", 7, 10, {}), "wrong_round"),
        (BlockUpdate("vit", 0, 10, {"absent": torch.ones(1)}), "different_tensors"),
    ],
)
def test_updates_that_do_not_fit_are_refused(
    source: tuple[PreTrainedModel, DriftDetector], update: BlockUpdate, reason: str
) -> None:
    cloud = cloud_of(source)
    number = cloud.open(["a"], deadline=1.0)
    refused = cloud.accept("a", number, update, DomainSignature(torch.zeros(4)))
    assert refused is not None and refused.reason == reason
