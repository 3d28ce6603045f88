"""Steps that a budget affords, and the grid of them."""

from __future__ import annotations

import random

from raycloud.retrain.cost import BlockChoice, Budget, training_cost
from raycloud.retrain.plan_rivals import head_only
from raycloud.retrain.plans import Terms, affordable_steps, steps_grid
from tests.retrain.problems import budget_of, instance, terms_of


def test_affordable_steps_are_the_most_that_fit() -> None:
    source = random.Random(8)
    for _ in range(50):
        model, terms = instance(source, 5, (1.0,)), terms_of(source)
        budget = budget_of(source, model, terms)
        choices = [BlockChoice(1.0, source.random() < 0.5) for _ in range(5)]
        steps = affordable_steps(model, choices, budget, most=77, **terms)
        fits = [training_cost(model, choices, steps=count, **terms).within(budget) for count in range(1, 79)]
        assert all(fits[:steps]) and (steps == 77 or not fits[steps])


def test_the_grid_of_steps_reaches_from_full_training_to_the_head_alone() -> None:
    model = instance(random.Random(9), 5, (1.0,))
    terms = Terms(batch=2, samples=9)
    whole = training_cost(model, [BlockChoice(1.0, True)] * 5, steps=40, **terms)
    grid = steps_grid(model, Budget(whole.flops), most=600, **terms)
    assert len(grid) <= 16 and list(grid) == sorted(set(grid))
    assert 39 <= grid[0] <= 40 and grid[-1] == head_only(model, Budget(whole.flops), most=600, **terms).steps
