"""Planner: the best plan of retraining within a budget of FLOPs, memory and bytes.

:func:`plan` solves the knapsack of a step count and a lowest trained block, the most promising first, until the bounds
tell that no other one leads to a better plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace

import numpy as np

from raycloud.errors import RecipeError
from raycloud.retrain.cost import Budget, Cost, ModelCost
from raycloud.retrain.knapsack import PlanningProblem, less
from raycloud.retrain.plans import (
    MOST_GRID,
    Floats,
    Plan,
    Terms,
    Value,
    affordable_steps,
    empty_plan,
    priced_plan,
    width_penalties,
)

LONGEST = 4096
"""Partial plans of a list beyond which only those of the highest bounds are kept; the plan then tells its gap."""
_FIRST = 256
"""Length of lists in a first search, whose plan lets the second one leave out more."""


_Pair = tuple[int, int, Floats, float]
_Search = Generator[_Pair, float, None]


def plan(
    model: ModelCost,
    budget: Budget,
    law: Value,
    *,
    steps_grid: Sequence[int],
    batch: int,
    samples: int,
    cached: bool = True,
    spent: Cost | None = None,
    width_penalty: Callable[[int, float], float] | None = None,
    penalty_weight: float = 1.0,
    stretch: bool = False,
    longest: int = LONGEST,
) -> Plan:
    """Best plan within the budget, among all widths and sets of trained blocks, for the best step count of a grid.

    It maximises the head's and the trained blocks' values less the weighted penalties of widths. If no plan fits the
    budget, or none is worth more than doing nothing, the plan is empty.

    Args:
        model: costs of the parts.
        budget: limits, which no plan exceeds.
        law: value of training each block.
        steps_grid: step counts to choose from, at most 16.
        batch: samples of each step.
        samples: different samples of the window.
        cached: whether the hidden states before the lowest trained block are cached.
        spent: cost of what the window has done before.
        width_penalty: loss of value of a block at a width, trained or not.
        penalty_weight: factor of the penalties.
        stretch: spend what the chosen plan leaves of the budget on more steps, up to the grid's highest. The value
            does then not always grow with the budget, since the blocks are chosen before.
        longest: partial plans of a list that are kept; the plan is exact if that many suffice, and tells its gap if
            not. Only wide menus with several scarce resources need more than a few hundred.

    Raises:
        RecipeError: the grid is empty, too long or has a number below 1.
        ModelError: a value or penalty is not finite.
    """
    if not 1 <= len(steps_grid) <= MOST_GRID or min(steps_grid) < 1:
        raise RecipeError(f"steps_grid must be 1 to {MOST_GRID} numbers of 1 or more, got {list(steps_grid)}")
    terms = Terms(batch=batch, samples=samples, cached=cached, spent=spent)
    penalty = width_penalties(model, width_penalty, penalty_weight)
    best, possible = empty_plan(model, law, terms), -math.inf
    problem = PlanningProblem(model, budget, law, np.asarray(sorted(set(steps_grid)), dtype=np.int64), penalty, terms)
    search = _promising(problem)
    pair = next(search, None)
    while pair is not None:
        row, lowest, multipliers, floor = pair
        steps, left_out = int(problem.steps[row]), -math.inf
        for length in (min(_FIRST, longest), longest):
            plans, left_out = problem.best(row, lowest, multipliers, max(floor, best.value), length)
            candidates = (priced_plan(model, budget, law, choices, steps, penalty, terms) for choices in plans)
            best = max(best, next(filter(None, candidates), best), key=lambda plan: plan.value)
            if left_out <= best.value:
                break
        possible = max(possible, left_out)
        pair = _next(search, best.value)
    best = replace(best, gap=max(0.0, possible - best.value))
    if stretch and best.steps:
        steps = affordable_steps(model, best.choices, budget, most=max(steps_grid), **terms)
        longer = priced_plan(model, budget, law, best.choices, steps, penalty, terms)
        best = max(best, replace(longer, gap=best.gap) if longer else best, key=lambda plan: plan.value)
    assert not best.steps or best.cost.within(budget)
    return best


def _next(search: _Search, known: float) -> _Pair | None:
    """Next pair of a search that is told the value of the best plan so far; ``None`` if none is left."""
    try:
        return search.send(known)
    except StopIteration:
        return None


def _promising(problem: PlanningProblem) -> _Search:
    """Step counts and lowest trained blocks that may lead to a better plan than known, the most promising first.

    Args:
        problem: the problem.

    Yields:
        Index of the step count, lowest trained block, multipliers, and the value below which plans are of no interest;
        after each it is sent the value of the best plan so far, which for the empty plan is 0.
    """
    blocks = len(problem.menus)
    coarse = problem.bound(np.arange(len(problem.steps)), None)
    floor, known = coarse.found, 0.0
    for row in np.argsort(-coarse.value, kind="stable"):
        floor = max(floor, known)
        if coarse.value[row] <= known or coarse.value[row] < less(floor):
            return
        start = np.repeat(coarse.multipliers[row][None], blocks + 1, axis=0)
        fine = problem.bound(np.full(blocks + 1, row), np.arange(blocks + 1), start)
        floor = max(floor, fine.found)
        for lowest in np.argsort(-fine.value, kind="stable"):
            floor = max(floor, known)
            if fine.value[lowest] <= known or fine.value[lowest] < less(floor):
                break
            known = yield int(row), int(lowest), fine.multipliers[lowest], floor
