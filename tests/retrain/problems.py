"""Problems of planning at random, and their best plans by enumeration."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from raycloud.retrain.cost import BlockChoice, Budget, Cost, ModelCost, WidthCost, training_cost
from raycloud.retrain.plans import Terms

GRID = (4, 16, 60)


class Curves:
    """Saturating values of blocks, and of the head."""

    def __init__(self, ceilings: list[float], steps: list[float], head: float) -> None:
        self.ceilings, self.steps, self.head = np.asarray(ceilings), np.asarray(steps), head

    def value(
        self, block: npt.ArrayLike, width: npt.ArrayLike, steps: npt.ArrayLike, samples: int
    ) -> npt.NDArray[np.float64]:
        block = np.asarray(block)
        share = -np.expm1(-np.asarray(steps, dtype=np.float64) / self.steps[block])
        return self.ceilings[block] * np.sqrt(np.asarray(width, dtype=np.float64)) * share

    def head_value(self, steps: npt.ArrayLike) -> npt.NDArray[np.float64]:
        return -self.head * np.expm1(-np.asarray(steps, dtype=np.float64) / 5)

    def error(self, trained: Mapping[int, float], steps: int, samples: int) -> float:
        total = self.head_value(steps) + sum(
            float(self.value(block, width, steps, samples)) for block, width in trained.items()
        )
        return float(np.exp(-total))


def instance(source: random.Random, blocks: int, widths: tuple[float, ...], whole: bool = False) -> ModelCost:
    """Model of random costs; whole numbers make many plans cost the same."""

    def number(low: float, high: float) -> float:
        return float(source.randint(int(low), int(high))) if whole else source.uniform(low, high)

    def option(width: float) -> WidthCost:
        if width == 0:
            return WidthCost(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        terms = [(5, 15), (5, 20), (5, 15), (1, 5), (5, 30), (1, 9), (2, 15), (0, 4), (1, 9)]
        made = [width * number(*term) for term in terms]
        # With several widths the solver counts the smallest saving, so it is exact with equal ones only.
        return WidthCost(width, *made, lowest_saving=made[1] * 0.5 if len(widths) == 1 else 0.0)

    menus = tuple(tuple(option(width) for width in widths) for _ in range(blocks))
    boundary = tuple(number(0, 6) for _ in range(blocks + 1))
    return ModelCost(
        menus, number(0, 3), number(1, 3), number(1, 3), number(1, 3), number(1, 20), number(1, 5), boundary
    )


def curves(source: random.Random, blocks: int) -> Curves:
    ceilings = [max(0.0, source.uniform(-0.1, 0.6)) for _ in range(blocks)]
    return Curves(ceilings, [source.uniform(3, 80) for _ in range(blocks)], source.uniform(0, 0.5))


def budget_of(source: random.Random, model: ModelCost, terms: Terms) -> Budget:
    """Budget between nothing and more than everything, at times without a limit, at times just reached by a plan."""
    everything = training_cost(model, [BlockChoice(width, True) for width in model.whole], steps=max(GRID), **terms)
    if source.random() < 0.2:
        chosen = [BlockChoice(width, source.random() < 0.5) for width in model.whole]
        reached = training_cost(model, chosen, steps=source.choice(GRID), **terms)
        return Budget(reached.flops, reached.memory, reached.bytes)
    limits = [
        math.inf if source.random() < 0.2 else source.uniform(0, 1.1) * most
        for most in (everything.flops, everything.memory, everything.bytes)
    ]
    return Budget(*limits)


def terms_of(source: random.Random) -> Terms:
    spent = Cost(source.uniform(0, 50), source.uniform(0, 100), source.uniform(0, 2)) if source.random() < 0.3 else None
    return Terms(batch=source.randint(1, 4), samples=source.randint(1, 30), cached=source.random() < 0.7, spent=spent)


def enumerated(
    model: ModelCost, budget: Budget, law: Curves, terms: Terms, penalty: Callable[[int, float], float], weight: float
) -> float:
    """Highest value of all plans, that of doing nothing among them."""
    menus = [
        [
            BlockChoice(option.width, trained)
            for option in menu
            for trained in (False, True)
            if option.width or not trained
        ]
        for menu in model.blocks
    ]
    values = {
        (block, choice, steps): (
            float(law.value(block, choice.width, steps, terms["samples"])) if choice.trained else 0.0
        )
        - weight * penalty(block, choice.width)
        for block, menu in enumerate(menus)
        for choice in menu
        for steps in GRID
    }
    best = 0.0
    for choices in itertools.product(*menus):
        for steps in GRID:
            value = float(law.head_value(steps)) + sum(
                values[block, choice, steps] for block, choice in enumerate(choices)
            )
            if value > best and training_cost(model, choices, steps=steps, **terms).within(budget):
                best = value
    return best


def penalty(block: int, width: float) -> float:
    return (1 + block % 3) * (1 - width)
