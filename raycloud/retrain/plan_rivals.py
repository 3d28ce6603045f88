"""Rival plans: the same costs and the same budget, another choice of blocks.

Each gets the steps that its budget buys.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Unpack

from raycloud.errors import RecipeError
from raycloud.retrain.cost import Budget, ModelCost
from raycloud.retrain.planner import plan
from raycloud.retrain.plans import (
    Plan,
    Terms,
    Value,
    affordable_steps,
    empty_plan,
    full_terms,
    priced_plan,
    set_plan,
    training_choices,
    width_penalties,
)


def head_only(model: ModelCost, budget: Budget, *, most: int, law: Value | None = None, **terms: Unpack[Terms]) -> Plan:
    """Plan that trains the head alone."""
    return set_plan(model, budget, (), most=most, law=law, **terms)


def last_blocks(
    model: ModelCost, budget: Budget, *, most: int, count: int = 1, law: Value | None = None, **terms: Unpack[Terms]
) -> Plan:
    """Plan that trains the last ``count`` blocks."""
    blocks = len(model.blocks)
    return set_plan(model, budget, range(max(0, blocks - count), blocks), most=most, law=law, **terms)


def full(model: ModelCost, budget: Budget, *, most: int, law: Value | None = None, **terms: Unpack[Terms]) -> Plan:
    """Plan that trains every block."""
    return set_plan(model, budget, range(len(model.blocks)), most=most, law=law, **terms)


def random_blocks(
    model: ModelCost,
    budget: Budget,
    *,
    seed: int,
    most: int,
    count: int | None = None,
    law: Value | None = None,
    **terms: Unpack[Terms],
) -> Plan:
    """Plan of blocks drawn at random: ``count`` of them, or 1 to all; those that cannot be afforded are left out."""
    source = random.Random(seed)
    blocks = len(model.blocks)
    drawn = source.sample(range(blocks), source.randint(1, blocks) if count is None else min(count, blocks))
    while drawn and not affordable_steps(model, training_choices(model, drawn), budget, most=1, **terms):
        drawn.pop()
    return set_plan(model, budget, drawn, most=most, law=law, **terms)


def best_contiguous(
    model: ModelCost, budget: Budget, law: Value, *, most: int, longest: int | None = None, **terms: Unpack[Terms]
) -> Plan:
    """Plan of the most valuable run of neighbouring blocks (surgical fine-tuning, Lee et al., ICLR 2023).

    Each run is valued at the steps that the budget buys for it; runs have at most ``longest`` blocks.
    """
    blocks = len(model.blocks)
    runs = [
        range(low, high) for low in range(blocks) for high in range(low + 1, min(blocks, low + (longest or blocks)) + 1)
    ]
    plans = [set_plan(model, budget, run, most=most, law=law, **terms) for run in runs]
    return max(plans, key=lambda plan: plan.value)


def taylor(model: ModelCost, budget: Budget, law: Value, *, ratio: float, most: int, **terms: Unpack[Terms]) -> Plan:
    """Plan of the highest gain at a share of full training's FLOPs per step (GreenTrainer, Huang et al., ICLR 2024).

    The published method is given the share and spends the same number of steps whatever it chooses. Here the budget
    gives the steps: as many as full training affords, divided by the share.

    Args:
        model: costs of the parts.
        budget: limits.
        law: first-order gain of each block; see :class:`raycloud.retrain.rival_laws.Score`.
        ratio: FLOPs of a step as a share of full training's, above 0 and at most 1.
        most: largest number of steps.
        terms: terms of the window.

    Raises:
        RecipeError: the ratio is out of range.
    """
    if not 0 < ratio <= 1:
        raise RecipeError(f"ratio must be above 0 and at most 1, got {ratio}")
    # Of the limits, only FLOPs set the steps: memory and bytes do not depend on them.
    steps = affordable_steps(
        model, training_choices(model, range(len(model.blocks))), Budget(budget.flops), most=most, **terms
    )
    chosen = plan(model, budget, law, steps_grid=[min(most, max(1, int(steps / ratio)))], **full_terms(terms))
    return set_plan(model, budget, chosen.trained, most=most, law=law, **terms) if chosen.steps else chosen


def greedy(model: ModelCost, budget: Budget, law: Value, *, steps_grid: Sequence[int], **terms: Unpack[Terms]) -> Plan:
    """Plan built by the action of most value per extra FLOP, as published: one more block, or more steps.

    The published search (BlockTrainer, doi 10.12263/DZXB.20240518) charges the time of another block and overruns its
    window; here an action that exceeds the budget is not allowed, and costs follow the lowest trained block after each
    action.
    """
    penalty = width_penalties(model, None, 0.0)
    best = empty_plan(model, law, terms)
    grid = sorted(set(steps_grid))
    position = -1
    while True:
        sets = [set(best.trained)] if position + 1 < len(grid) else []
        actions = [(position + 1, chosen) for chosen in sets]
        if position >= 0:
            others = set(range(len(model.blocks))) - set(best.trained)
            actions += [(position, {*best.trained, block}) for block in sorted(others)]
        rated = []
        for place, chosen in actions:
            choices = training_choices(model, chosen)
            candidate = priced_plan(model, budget, law, choices, grid[place], penalty, terms)
            if candidate is not None and candidate.value > best.value:
                extra = max(candidate.cost.flops - best.cost.flops, 1.0)
                rated.append(((candidate.value - best.value) / extra, place, candidate))
        if not rated:
            return best
        _, position, best = max(rated, key=lambda action: action[0])
