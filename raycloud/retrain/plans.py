"""Plans of retraining: which blocks to train for how many steps, and what a plan costs and is worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from raycloud.errors import ModelError
from raycloud.retrain.cost import NOTHING, BlockChoice, Budget, Cost, ModelCost, training_cost

Floats = npt.NDArray[np.float64]

MOST_GRID = 16
"""Largest number of step counts that a plan chooses from."""


class Value(Protocol):
    """What retraining a block is worth: values add up over blocks, and the error falls with their sum."""

    def value(self, block: npt.ArrayLike, width: npt.ArrayLike, steps: npt.ArrayLike, samples: int) -> Floats:
        """Return the value of training blocks at widths for so many steps; the first three broadcast together."""
        ...

    def head_value(self, steps: npt.ArrayLike) -> Floats:
        """Return the value of training the head, in the shape of ``steps``."""
        ...

    def error(self, trained: Mapping[int, float], steps: int, samples: int) -> float | None:
        """Return the error predicted after training blocks at widths; ``None`` if there is no prediction."""
        ...


class Terms(TypedDict, total=False):
    """Terms of a window that cost every plan alike; see :func:`training_cost`."""

    batch: int
    samples: int
    cached: bool
    spent: Cost | None


@dataclass(frozen=True)
class Plan:
    """What to retrain, for how many steps, and what that costs."""

    choices: tuple[BlockChoice, ...]
    """Width and training of each block."""
    steps: int
    """Optimiser steps; 0 for the empty plan, which trains nothing, not even the head."""
    predicted_error: float | None
    """Error predicted after the steps; ``None`` where nothing predicts it."""
    cost: Cost
    """Cost of the window, what was spent before included."""
    value: float
    """Sum of the values of head and trained blocks, less the penalties of widths."""
    gap: float = 0.0
    """Most that the value of a better plan can be above this one's: 0 unless lists were too long to keep whole."""

    @property
    def trained(self) -> tuple[int, ...]:
        """Trained blocks."""
        return tuple(block for block, choice in enumerate(self.choices) if choice.trained)


def affordable_steps(
    model: ModelCost, choices: Sequence[BlockChoice], budget: Budget, *, most: int, **terms: Unpack[Terms]
) -> int:
    """Largest number of steps, up to ``most``, that a budget allows; 0 if it allows none."""

    def fits(steps: int) -> bool:
        return training_cost(model, choices, steps=steps, **full_terms(terms)).within(budget)

    if most < 1 or not fits(1):
        return 0
    if fits(most):
        return most
    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def steps_grid(model: ModelCost, budget: Budget, *, most: int, **terms: Unpack[Terms]) -> tuple[int, ...]:
    """Step counts for a plan: at most 16, evenly in logs, up to what the head alone can afford.

    The lowest is what training every block affords, or 1.
    """
    high = affordable_steps(model, frozen_choices(model), budget, most=most, **terms)
    low = affordable_steps(model, training_choices(model, range(len(model.blocks))), budget, most=most, **terms)
    if high == 0:
        return (1,)
    grid = np.geomspace(max(1, min(low, high)), high, MOST_GRID)
    return tuple(sorted({int(steps) for steps in np.append(np.floor(grid), high)}))[-MOST_GRID:]


def head_phase(
    model: ModelCost, budget: Budget, *, most: int, share: float, batch: int, samples: int, times: int = 1
) -> tuple[int, Cost]:
    """Steps that train the head alone before a plan, and their cost; the head's changes are sent once, with the plan's.

    Args:
        model: costs of the parts.
        budget: limits of the window.
        most: largest number of steps.
        share: share of the budget's FLOPs that they may take.
        batch: samples of each step.
        samples: different samples of the window.
        times: number of times that the steps are taken, as in cross-validation.
    """
    allowed = Budget(share * budget.flops, budget.memory)
    choices = frozen_choices(model)
    steps = affordable_steps(model, choices, allowed, most=times * most, batch=batch, samples=samples) // times
    cost = training_cost(model, choices, steps=times * steps, batch=batch, samples=samples)
    return steps, Cost(cost.flops, cost.memory)


def empty_plan(model: ModelCost, law: Value | None, terms: Terms) -> Plan:
    """Plan that trains nothing, not even the head; it costs what was spent before."""
    error = law.error({}, 0, terms["samples"]) if law else None
    return Plan(frozen_choices(model), 0, error, terms.get("spent") or NOTHING, 0.0)


def set_plan(
    model: ModelCost,
    budget: Budget,
    blocks: Sequence[int] | set[int] | range,
    *,
    most: int,
    law: Value | None = None,
    **terms: Unpack[Terms],
) -> Plan:
    """Plan that trains given blocks, whole, for the steps that the budget buys; empty if it buys none."""
    choices = training_choices(model, blocks)
    steps = affordable_steps(model, choices, budget, most=most, **terms)
    penalty = width_penalties(model, None, 0.0)
    priced = priced_plan(model, budget, law, choices, steps, penalty, terms) if steps else None
    return priced or empty_plan(model, law, terms)


def corrected(plans: Sequence[Plan], misses: Mapping[tuple[int, ...], float]) -> Plan:
    """Plan of the lowest predicted error, after adding what predictions for its blocks miss in the mean.

    For blocks without a known miss the largest one is added: they are taken only if they are better by that.
    """
    worst = max(misses.values(), default=0.0)
    named = [
        replace(one, predicted_error=one.predicted_error + misses.get(one.trained, worst))
        for one in plans
        if one.predicted_error is not None
    ]
    return min(named, key=lambda one: one.predicted_error or 0.0)


def worthwhile(chosen: Plan, without: Plan, least: float) -> Plan:
    """Plan, if its predicted error is lower by ``least`` than that of a plan without blocks, which is taken otherwise.

    A law never tells that training harms, but blocks that have nothing to gain fit the noise of few samples.
    """
    if chosen.predicted_error is None or without.predicted_error is None:
        return chosen
    return chosen if without.predicted_error - chosen.predicted_error >= least else without


def priced_plan(
    model: ModelCost,
    budget: Budget,
    law: Value | None,
    choices: tuple[BlockChoice, ...],
    steps: int,
    penalty: Mapping[tuple[int, float], float],
    terms: Terms,
) -> Plan | None:
    """Plan with its value and cost, or ``None`` if it exceeds the budget."""
    cost = training_cost(model, choices, steps=steps, **full_terms(terms))
    if not cost.within(budget):
        return None
    if law is None:
        return Plan(choices, steps, None, cost, 0.0)
    samples = terms["samples"]
    trained = {block: choice.width for block, choice in enumerate(choices) if choice.trained}
    values = law.value(list(trained), list(trained.values()), steps, samples) if trained else np.zeros(0)
    lost = sum(penalty[block, choice.width] for block, choice in enumerate(choices))
    value = float(law.head_value(steps)) + float(np.sum(values)) - lost
    return Plan(choices, steps, law.error(trained, steps, samples), cost, value)


def width_penalties(
    model: ModelCost, penalty: Callable[[int, float], float] | None, weight: float
) -> Mapping[tuple[int, float], float]:
    """Weighted penalty of each width of each block."""
    table = {
        (block, option.width): weight * penalty(block, option.width) if penalty else 0.0
        for block, menu in enumerate(model.blocks)
        for option in menu
    }
    for (block, width), value in table.items():
        if not math.isfinite(value):
            raise ModelError(f"penalty of block {block} at width {width} must be finite, got {value}")
    return table


def frozen_choices(model: ModelCost) -> tuple[BlockChoice, ...]:
    """Choices that leave every block whole and frozen."""
    return training_choices(model, ())


def training_choices(model: ModelCost, blocks: Sequence[int] | set[int] | range) -> tuple[BlockChoice, ...]:
    """Choices that leave every block whole and train the given ones."""
    return tuple(BlockChoice(width, block in blocks) for block, width in enumerate(model.whole))


class FullTerms(TypedDict):
    """Terms of a window, all given."""

    batch: int
    samples: int
    cached: bool
    spent: Cost | None


def full_terms(terms: Terms) -> FullTerms:
    """Terms with their defaults."""
    return {
        "batch": terms["batch"],
        "samples": terms["samples"],
        "cached": terms.get("cached", True),
        "spent": terms.get("spent"),
    }
