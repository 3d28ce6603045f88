"""Windows that are really trained keep to their budgets of operations, memory and bytes."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import torch

from raycloud.models.chain import block_list_of
from raycloud.models.weights import weights_of
from raycloud.retrain.alarms import DriftAlarm
from raycloud.retrain.cloud import RetrainCloud, retrainable
from raycloud.retrain.domains import DomainMemory
from raycloud.retrain.drift import DriftDetector
from raycloud.retrain.edge import DriftReport, RetrainEdge, WindowPlan
from raycloud.retrain.plan_rivals import full, head_only, last_blocks, random_blocks
from raycloud.retrain.plans import Plan
from raycloud.retrain.recipe import BudgetRecipe, RetrainTraining
from raycloud.retrain.samples import Samples
from raycloud.retrain.source import tap_means
from raycloud.retrain.tasks import TASKS
from tests.retrain.models import task_model, task_samples

MOST = 12
"""Largest number of steps of a plan; enough that most budgets are the limit."""
BUDGETS, PLANS = 8, 8


def random_budget(source: random.Random) -> BudgetRecipe:
    return BudgetRecipe(
        full_steps=source.choice([10, 20, 40, 80]),
        memory_share=source.choice([None, source.uniform(0.5, 1.1)]),
        bytes=source.choice([None, 10 ** source.uniform(4, 6)]),
    )


def random_plan(source: random.Random, report: DriftReport, cloud: RetrainCloud) -> WindowPlan:
    """Plan of the cloud, or of one of the rivals."""
    terms: dict[str, Any] = {"batch": report.batch, "samples": report.samples, "spent": report.estimated}
    given = (report.cost, report.plannable)
    kind = source.choice(["cloud", "random", "random", "last", "full", "head"])
    if kind == "cloud":
        return cloud.plan(report)
    rivals: dict[str, Callable[[], Plan]] = {
        "random": lambda: random_blocks(*given, seed=source.randrange(99), most=MOST, **terms),
        "last": lambda: last_blocks(*given, count=source.randint(1, 2), most=MOST, **terms),
        "full": lambda: full(*given, most=MOST, **terms),
        "head": lambda: head_only(*given, most=MOST, **terms),
    }
    found = rivals[kind]()
    return WindowPlan(found.trained, found.steps, None, found.cost, {})


def test_metered_windows_are_within_their_budgets() -> None:
    """64 windows; operations by torch's counter, memory by hooks, bytes as they are sent."""
    source = random.Random(0)
    model, task = task_model("llama"), TASKS["language_modelling"]
    detector = DriftDetector.calibrated(tap_means(model, task_samples(model, 32)), 8, draws=50)
    memory, blocks = DomainMemory(detector.source, radius=0.5), list(block_list_of(model).blocks)
    cloud = RetrainCloud(retrainable(weights_of(model)), "llama", blocks, None, memory)
    kinds = []
    for number in range(BUDGETS):
        edge = RetrainEdge(
            "edge",
            copy.deepcopy(model),
            "llama",
            task,
            detector,
            DriftAlarm(radius=0.5),
            random_budget(source),
            RetrainTraining(
                batch_size=source.choice([4, 8]), head_steps=source.choice([0, 5]), replay=source.choice([0.0, 0.5])
            ),
            replayed=task_samples(model, 8, seed=1),
        )
        drawn = task_samples(model, source.choice([20, 30]), seed=100 + number)
        samples = Samples(drawn.inputs, torch.ones_like(drawn.labels))  # easily learnt, so that updates are sent
        report = edge.report(samples, edge.observe(samples), seed=number)
        for _ in range(PLANS):
            plan = random_plan(source, report, cloud)
            before = {path: one.clone() for path, one in weights_of(edge.model).items()}
            outcome = edge.retrain(samples, report, plan, seed=number)
            if plan.steps:
                assert outcome.result is not None and outcome.cost.within(report.budget)
            else:  # there is nothing that the budget allows
                assert plan.trained == () and outcome.result is None and outcome.update is None
                assert all(torch.equal(one, before[path]) for path, one in weights_of(edge.model).items())
            kinds.append((bool(plan.steps), outcome.update is not None))
    # Most windows train, and many updates go over the link; others find nothing that they could pay.
    assert sum(steps for steps, _ in kinds) >= 30 and sum(sent for _, sent in kinds) >= 10
    assert (False, False) in kinds
