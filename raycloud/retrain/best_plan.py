"""Best plan of a window: the exact planner's and the pilots' sets, by errors that pilots have corrected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack

from raycloud.retrain.cost import Budget, ModelCost
from raycloud.retrain.planner import plan
from raycloud.retrain.plans import Plan, Terms, Value, corrected, full_terms, set_plan, steps_grid, worthwhile

LEAST_GAIN = 0.02
"""Least fall of the error for which blocks are trained at all."""


def best_plan(
    cost: ModelCost,
    budget: Budget,
    law: Value,
    misses: Mapping[tuple[int, ...], float],
    *,
    most_steps: int,
    least_gain: float = LEAST_GAIN,
    **terms: Unpack[Terms],
) -> Plan:
    """Plan a window; blocks are trained only if they are worth more than the head alone.

    Args:
        cost: costs of the model's parts.
        budget: budget of the window.
        law: law of the error.
        misses: what predictions for sets of blocks miss in the mean; see
            :func:`~raycloud.retrain.law_prior.mean_misses`. Empty if no drift was simulated.
        most_steps: largest number of steps.
        least_gain: least predicted fall of the error below that of the head alone.
        terms: terms of the window.
    """
    grid = steps_grid(cost, budget, most=most_steps, **terms)
    chosen = plan(cost, budget, law, steps_grid=grid, stretch=True, **full_terms(terms))
    known = [set_plan(cost, budget, one, most=most_steps, law=law, **terms) for one in misses]
    head = set_plan(cost, budget, (), most=most_steps, law=law, **terms)
    return worthwhile(corrected([chosen, *known], misses), corrected([head], misses), least_gain)
