"""Knapsack of a plan: the work that it takes for many blocks."""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt
import pytest

from raycloud.retrain import knapsack
from raycloud.retrain.cost import BlockChoice, Budget, training_cost
from raycloud.retrain.planner import plan
from raycloud.retrain.plans import Terms, steps_grid
from tests.retrain.problems import curves, instance


def test_sixty_blocks_are_solved_exactly_with_short_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work, not time: the partial plans compared for 62 different blocks and three scarce resources."""
    source = random.Random(13)
    model, law = instance(source, 62, (1.0,)), curves(source, 62)
    compared = []
    plain = knapsack._undominated

    def counted(cost: npt.NDArray[np.float64], value: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        compared.append(len(value))
        return plain(cost, value)

    monkeypatch.setattr(knapsack, "_undominated", counted)
    terms = Terms(batch=2, samples=50)
    whole = training_cost(model, [BlockChoice(1.0, True)] * 62, steps=100, **terms)
    budget = Budget(whole.flops * 0.2, whole.memory * 0.45, whole.bytes * 0.4)
    found = plan(model, budget, law, steps_grid=steps_grid(model, budget, most=1000, **terms), **terms)
    assert found.gap <= 1e-9 and found.trained
    assert max(compared) < 10_000 and sum(compared) < 200_000
