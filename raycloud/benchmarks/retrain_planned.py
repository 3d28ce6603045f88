"""Planned methods of the benchmark of block retraining: ours, its ablations, and rivals that plan, too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from raycloud.benchmarks.retrain_methods import Method, MethodCase, MethodResult, copied, trained
from raycloud.retrain.best_plan import LEAST_GAIN, best_plan
from raycloud.retrain.cost import Cost
from raycloud.retrain.estimate import Estimate, estimate
from raycloud.retrain.gain import Gains, block_gains, gain_samples
from raycloud.retrain.parts import RetrainParts
from raycloud.retrain.plan_rivals import greedy, taylor
from raycloud.retrain.plans import Plan, Terms, Value, set_plan, steps_grid, worthwhile
from raycloud.retrain.rival_laws import PowerLaw, Score
from raycloud.retrain.window import retrain_blocks

RATIO = 0.5
"""FLOPs of GreenTrainer's steps, as a share of full training's; the middle of its published range."""

Solver = Callable[[MethodCase, Value, Terms], Plan]


def exact(misses: Mapping[tuple[int, ...], float]) -> Solver:
    """Best of the exact planner's plan and of all sets that pilots trained, by errors that pilots have corrected.

    Blocks are trained only if they are worth more than the head alone.
    """

    def solve(case: MethodCase, law: Value, terms: Terms) -> Plan:
        return best_plan(case.cost, case.budget, law, misses, most_steps=case.most_steps, **terms)

    return solve


def published(case: MethodCase, law: Value, terms: Terms) -> Plan:
    """Plan of the published greedy search, if it is worth more than the head alone."""
    grid = steps_grid(case.cost, case.budget, most=case.most_steps, **terms)
    chosen = greedy(case.cost, case.budget, law, steps_grid=grid, **terms)
    return worthwhile(chosen, head_alone(case, law, terms), LEAST_GAIN)


def by_score(case: MethodCase, law: Value, terms: Terms) -> Plan:
    """Plan of the highest score at a share of full training's FLOPs per step."""
    return taylor(case.cost, case.budget, law, ratio=RATIO, most=case.most_steps, **terms)


def head_alone(case: MethodCase, law: Value, terms: Terms) -> Plan:
    """Plan that trains no block."""
    return set_plan(case.cost, case.budget, (), most=case.most_steps, law=law, **terms)


def planned(law_of: Callable[[float], Value], solver: Solver) -> Method:
    """Train the head, and let a planner choose within what is left of the budget, by the error that the head leaves.

    Everything that the edge computes is paid from the budget.
    """

    def method(case: MethodCase) -> MethodResult:
        found, head = case.once("estimate", lambda: _estimate(case))
        terms = Terms(batch=case.settings.batch_size, samples=len(case.window), spent=found.cost)
        chosen = solver(case, law_of(found.error), terms)
        return case.once((chosen.trained, chosen.steps), lambda: _train(case, found, head, chosen))

    return method


def _estimate(case: MethodCase) -> tuple[Estimate, dict[str, Tensor]]:
    """Estimate of a case, and the head that it has trained."""
    model, parts = copied(case)
    task = case.task
    found = estimate(model, parts, case.window, task.loss, task.error, case.settings, case.cost, case.budget, case.seed)
    return found, {name: one.detach() for name, one in parts.head.items()}


def _gains(case: MethodCase, model: PreTrainedModel, parts: RetrainParts) -> Gains:
    some = case.window.select(slice(0, gain_samples(case.cost, case.budget, len(case.window))))
    return block_gains(model, parts, some, case.task.loss)


def _load(parts: RetrainParts, head: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, one in parts.head.items():
            one.copy_(head[name])


def _train(case: MethodCase, found: Estimate, head: dict[str, Tensor], chosen: Plan) -> MethodResult:
    """Train what was planned, behind the head's first steps."""
    model, parts = copied(case)
    _load(parts, head)
    late = {"head_lr": case.settings.late_head_lr} if found.head_steps else {}
    settings = case.plain.model_copy(update=late)
    phases = retrain_blocks(
        model, parts, chosen.trained, case.window, case.task.loss, settings, steps=chosen.steps, seed=case.seed
    )
    flops = found.cost.flops + sum(one.flops for one in phases)
    memory = max(found.cost.memory, *(one.memory for one in phases))
    return MethodResult(model, flops, memory, chosen.cost.bytes, chosen.steps, chosen.trained)


def one_shot(case: MethodCase) -> MethodResult:
    """Ablation: ours with the magnitudes of gradients behind the head's first steps as the only guide."""
    found, head = case.once("estimate", lambda: _estimate(case))
    model, parts = copied(case)
    _load(parts, head)
    gains = _gains(case, model, parts)
    paid = replace(found, cost=Cost(gains.flops, gains.memory).after(found.cost))
    terms = Terms(batch=case.settings.batch_size, samples=len(case.window), spent=paid.cost)
    chosen = by_score(case, Score(tuple(one.magnitude for one in gains.blocks)), terms)
    return _train(case, paid, head, chosen)


def green_trainer(case: MethodCase) -> MethodResult:
    """Train what gains most to first order at a share of full training's FLOPs (GreenTrainer, ICLR 2024)."""
    gains = _gains(case, *copied(case))
    spent = Cost(gains.flops, gains.memory)
    law = Score(tuple(one.taylor for one in gains.blocks))
    chosen = by_score(case, law, Terms(batch=case.settings.batch_size, samples=len(case.window), spent=spent))
    return trained(case, chosen.trained, spent=spent)


def published_greedy(law: PowerLaw) -> Method:
    """Train what the published search takes by a law of the published kind (doi 10.12263/DZXB.20240518)."""

    def method(case: MethodCase) -> MethodResult:
        terms = Terms(batch=case.settings.batch_size, samples=len(case.window))
        grid = steps_grid(case.cost, case.budget, most=case.most_steps, **terms)
        return trained(case, greedy(case.cost, case.budget, law, steps_grid=grid, **terms).trained)

    return method
